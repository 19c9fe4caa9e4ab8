"""Mixtures of k donors: shares that sum to 1, their stick-breaking coordinates, small weights.

Stick breaking maps k - 1 coordinates in [0, 1] to the simplex one to one, and uniform coordinates
to uniform mixtures (a Dirichlet distribution with all parameters 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from search.racing.race import Floats

NEGLIGIBLE: Final = 0.1  # a weight below this share of the donors' mean weight becomes zero


def break_sticks(sticks: Floats) -> Floats:
    """Map sticks (..., k - 1) in [0, 1] to shares (..., k): uniform sticks to uniform mixtures."""
    left, shares = np.ones(sticks.shape[:-1]), []
    for index, more in enumerate(range(sticks.shape[-1], 0, -1)):
        shares.append(left * (1 - (1 - sticks[..., index]) ** (1 / more)))
        left = left - shares[-1]
    return np.stack([*shares, np.maximum(left, 0.0)], axis=-1)


def join_sticks(shares: Sequence[float]) -> list[float]:
    """Return the k - 1 sticks of k shares: the inverse of ``break_sticks``."""
    sticks, left = [], 1.0
    for index, share in enumerate(shares[:-1]):
        part = min(1.0, share / left) if left > 1e-12 else 0.0
        sticks.append(1 - (1 - part) ** (len(shares) - 1 - index))
        left -= share
    return sticks


def keep_heaviest(weights: Floats, most: int | None) -> Floats:
    """Set all but the ``most`` heaviest of k donors to zero, in every unit; None: keep all.

    Each unit keeps its sum; a unit without any of the kept donors gets all of them evenly.

    Args:
        weights: Of k donors in u units of n recipes, (n, u, k).
        most: Donors that a recipe may use, the same ones in each of its units.
    """
    if most is None or most >= weights.shape[-1]:
        return weights
    chosen = heaviest(weights, most)[:, None, :]
    kept = np.where(chosen, weights, 0.0)
    totals = kept.sum(axis=-1, keepdims=True)
    shares = np.where(totals > 0, kept / np.where(totals > 0, totals, 1.0), chosen / most)
    scaled: Floats = shares * weights.sum(axis=-1, keepdims=True)
    return scaled


def heaviest(weights: Floats, most: int) -> NDArray[np.bool_]:
    """Return which ``most`` of k donors weigh most over all units, (n, k), of weights (n, u, k).

    Of equal ones the first.
    """
    order = np.argsort(-weights.sum(axis=1), axis=1, kind="stable")
    ranks = np.argsort(order, axis=1, kind="stable")
    chosen: NDArray[np.bool_] = ranks < most
    return chosen


def zero_small_weights(weights: Floats) -> Floats:
    """Set weights (..., k) below ``NEGLIGIBLE`` of their mean to zero and rescale the others.

    The sum stays. Dropping a donor thereby has positive probability.
    """
    kept = np.where(weights < NEGLIGIBLE * weights.mean(axis=-1, keepdims=True), 0.0, weights)
    totals = kept.sum(axis=-1, keepdims=True)
    scaled: Floats = kept * weights.sum(axis=-1, keepdims=True) / np.where(totals > 0, totals, 1.0)
    return scaled
