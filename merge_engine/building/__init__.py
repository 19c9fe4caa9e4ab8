"""A recipe into weights: plan, passes, the live model, the checkpoint."""
