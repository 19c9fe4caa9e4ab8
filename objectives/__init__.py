"""Evaluate a live model on a benchmark's items. Knows nothing of recipes.

``base`` the protocol of every objective · ``entries`` entries of a study's task list · ``items``
splits into search, select, test and tune · ``scores`` means and intervals of per-item values ·
``harness`` lm-eval's tasks as an objective · ``inference`` fast forward passes of the model ·
``plugin`` a user's own objective, and several as one.
"""
