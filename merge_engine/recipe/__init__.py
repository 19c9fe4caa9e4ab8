"""mergekit's YAML, both ways, and the value of each parameter for each tensor."""
