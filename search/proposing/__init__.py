"""Which recipe is tried next: search space, encoding, Gaussian process, samplers."""
