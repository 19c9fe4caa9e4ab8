"""Statistics of tensors, counter-based noise, packs of tensors, and how kernels are run."""
