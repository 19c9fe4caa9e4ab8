"""The verdict on the test items, and how many items would be needed to reach one.

All noise is item sampling, so everything is compared on the same items. The best search scores are
partly luck: finalists are therefore evaluated on fresh select items, the winner is the best on both
together, and only the test items, used once, give its score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from objectives.scores import Interval
from search.racing.item_scores import ItemScores
from search.racing.race import Strata

SELECT_SHARE: Final = 0.25  # budget of the selection, relative to the search's item evaluations


def items_to_decide(winner: ItemScores, other: ItemScores) -> int | None:
    """Compute how many items would show a difference of this size with a power of 80 %.

    ``n = 7.85 v / d^2``, with the difference d and v its variance per item; 7.85 is
    ``(1.96 + 0.84)^2``: a two-sided test at 5 % with a power of 80 %.

    Returns:
        None if these items have shown it, or if the winner is not ahead.
    """
    differences = np.subtract(winner.values, other.values)
    found = Strata(winner.tasks, winner.weights).estimate(differences)
    if found.value <= 0 or found.value > 1.96 * found.variance**0.5:
        return None
    return math.ceil(7.85 * found.variance * len(differences) / found.value**2)


def verdict(differences: Sequence[Interval]) -> Literal["better", "not better"]:
    """Decide whether the winner beats every model it was merged from: each interval above zero.

    Requiring all of them needs no multiple-comparison correction (an intersection-union test).
    """
    return "better" if differences and all(d.low > 0 for d in differences) else "not better"
