"""The fast forward pass: token trees, greedy decoding, agreement with lm-eval."""
