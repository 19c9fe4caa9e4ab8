"""Checkpoints, adapters and vocabularies; models that are merged, placed and measured."""
