"""Build recipes: plan, merge packs of tensors, write a live model or a checkpoint."""
