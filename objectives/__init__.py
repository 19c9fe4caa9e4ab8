"""Evaluate a live model on a benchmark's items. Knows nothing of recipes.

``base`` the protocol of every objective · ``entries`` entries of a study's task list · ``items``
search, select and test splits in blocks · ``scores`` means and intervals of per-item values ·
``harness`` lm-eval's tasks as an objective · ``inference`` the model's forward passes, fast ·
``plugin`` a user's own objective, and several as one.
"""
