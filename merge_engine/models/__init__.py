"""Checkpoints, adapters and vocabularies; sets of models, their placement and statistics."""
