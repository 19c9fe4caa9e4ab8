"""Model files, adapters, vocabularies, and the set of models that fit together."""
