"""Statistics of tensors, counter-based noise, packed tensors and how kernels are run."""
