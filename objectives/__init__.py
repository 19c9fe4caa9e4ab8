"""Score a live model on a benchmark's items. Knows nothing of recipes.

``base`` the protocol every objective follows · ``harness`` lm-eval tasks, prepared once ·
``items`` search, select and test splits in blocks · ``scores`` per-item values to means.
"""
