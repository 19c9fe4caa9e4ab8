"""Early stopping of the search: no further gain is expected that could be told from noise.

The search stops when the mean expected improvement of the last ``WINDOW`` proposals is below
``SHARE`` of the standard error that a recipe's lead has on the select split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from search.storing.trials import TrialRecord

WINDOW: Final = 10
SHARE: Final = 0.05


def should_stop(trials: Sequence[TrialRecord], items: int, share: float = SHARE) -> bool:
    """Return whether the search is to stop.

    Proposals without an expected improvement (every sampler's but ``gp``, and several objectives')
    never stop it. A recipe that fails after the search changes nothing.
    """
    complete = [trial for trial in trials if trial.estimate is not None]
    last = [trial.expected_improvement for trial in complete[-WINDOW:]]
    if len(last) < WINDOW:
        return False
    improvements = [np.inf if one is None else one for one in last]
    return bool(np.mean(improvements) < share * standard_error(complete, items))


def standard_error(complete: Sequence[TrialRecord], items: int) -> float:
    """Return the standard error of a recipe's lead on so many items, from complete trials."""
    of_one_item = [trial.variance * trial.items for trial in complete]
    return float(np.sqrt(np.median(of_one_item) / items))
