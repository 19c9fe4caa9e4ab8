"""Score a live model on a benchmark's items. Knows nothing of recipes.

``base`` the protocol every objective follows · ``tasks`` lm-eval tasks, loaded, prompts built ·
``harness`` asks them of one live model · ``judging`` answers to values · ``items`` search, select
and test splits in blocks · ``scores`` per-item values to means.
"""
