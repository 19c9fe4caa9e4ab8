"""When a search is over before its trials are: what it may still gain could not be told anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from search.storing.trials import TrialRecord

LAST: Final = 10  # proposals whose expected gains are averaged
SHARE: Final = 0.05  # of the standard error that is too little to go on for


def exhausted(trials: Sequence[TrialRecord], items: int, share: float = SHARE) -> bool:
    """Whether the last proposals were expected to gain too little for the select items to tell.

    Only ``gp`` expects anything, and with one goal.

    Args:
        trials: Finished, in their order; the complete ones with their variance and items.
        items: To select the winner on.
        share: As SHARE.
    """
    trials = [trial for trial in trials if trial.state == "complete"]
    gains = [trial.expected_improvement for trial in trials[-LAST:]]
    last = [np.inf if gain is None else gain for gain in gains]
    return len(last) == LAST and bool(np.mean(last) < share * resolution(trials, items))


def resolution(trials: Sequence[TrialRecord], items: int) -> float:
    """The standard error of a recipe's lead on so many items, from what complete trials say."""
    of_one = [trial.estimate.variance * trial.items for trial in trials if trial.estimate]
    return float(np.sqrt(np.median(of_one) / items))
