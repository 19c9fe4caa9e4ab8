"""Propose the next recipe: search space, encoding, Gaussian process, samplers."""
