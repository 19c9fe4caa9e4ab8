"""lm-eval's tasks: loaded, asked and judged as lm-eval does."""
