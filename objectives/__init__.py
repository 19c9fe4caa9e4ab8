"""Score a live model on a benchmark's items. Knows nothing of recipes.

``base`` the protocol every objective follows · ``registered`` lm-eval's names, found fast ·
``tasks`` its tasks, loaded without a model · ``prompts`` what a model is shown of them ·
``harness`` asks one live model, the ``fast`` way: questions in ``rows``, tried first for
``agreement`` with lm-eval's own, whose bars and log are kept ``quiet`` · ``judging`` answers to
values · ``plugin`` a user's own objective, and several as one · ``items`` search, select and test
splits in blocks · ``scores`` per-item values to means.
"""
