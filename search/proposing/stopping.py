"""Early stopping of the search, when no further gain can be told from noise.

The search stops when the mean expected improvement of the last ``WINDOW`` proposals is below
``SHARE`` of the standard error that a recipe's lead has on the select split. If tuned
weights are in the lead, it also stops when the last ``PATIENCE`` proposals have not raised the best
estimate by as much: then tuning finds the good recipes, not the sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from search.storing.trials import TrialRecord

WINDOW: Final = 10
SHARE: Final = 0.05
PATIENCE: Final = 10


def should_stop(trials: Sequence[TrialRecord], items: int, share: float = SHARE) -> bool:
    """Return whether to stop the search, by its expected improvement.

    Proposals without one (of samplers other than ``gp``, or with several objectives) never stop it.
    Recipes that failed after the search count, too.
    """
    complete = [trial for trial in trials if trial.estimate is not None]
    last = [trial.expected_improvement for trial in complete[-WINDOW:]]
    if len(last) < WINDOW:
        return False
    improvements = [np.inf if one is None else one for one in last]
    return bool(np.mean(improvements) < share * standard_error(complete, items))


def has_stalled(trials: Sequence[TrialRecord], items: int, since: int) -> bool:
    """Return whether ``PATIENCE`` proposals in a row have not raised the best estimate.

    Args:
        trials: Those that are finished.
        items: Of the select split.
        since: Number of the trial after which proposals count.
    """
    complete = [trial for trial in trials if trial.state == "complete"]
    later = [t for t in complete if t.number > since and t.expected_improvement is not None]
    if len(later) < PATIENCE:
        return False
    first = later[-PATIENCE].number
    before = min(trial.sort_key for trial in complete if trial.number < first)
    after = min(trial.sort_key for trial in later[-PATIENCE:])
    least = SHARE * standard_error(complete, items)
    return after[0] >= before[0] and (after[0] > before[0] or before[1] - after[1] < least)


def standard_error(complete: Sequence[TrialRecord], items: int) -> float:
    """Estimate the standard error of a recipe's lead on ``items`` items, from complete trials."""
    of_one_item = [trial.variance * trial.items for trial in complete]
    return float(np.sqrt(np.median(of_one_item) / items))
