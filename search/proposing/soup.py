"""The greedy soup: donors join a uniform average, the best first, while its score improves.

Wortsman et al. 2022, "Model soups", recipe 1, https://arxiv.org/abs/2203.05482. Each step is a
trial, so the next one follows from the finished trials, also when a run is resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from search.proposing.recipes import to_recipe
from search.proposing.space import Space
from search.proposing.starts import even_weights, soup_steps
from search.storing.trials import TrialRecord

SOUP_PREFIX = "soup + "  # of the steps' labels; the donor that is added follows


def next_step(
    space: Space, ranking: Sequence[int], trials: Sequence[TrialRecord]
) -> tuple[str, dict[str, Any]] | None:
    """Return label and point of the soup's next step.

    None if the soup is finished, or if its last step is still being evaluated.

    Args:
        space: The study's.
        ranking: Indices of the donors, the best first; empty: there is no soup.
        trials: All trials so far.
    """
    by_label = {trial.start: trial for trial in trials if trial.start}
    by_recipe = {trial.recipe: trial for trial in reversed(trials) if trial.recipe}
    left = soup_steps(space) - sum(label.startswith(SOUP_PREFIX) for label in by_label)
    soup: list[int] = []
    best: tuple[float, float] | None = None
    for donor in ranking:
        added = [*soup, donor]
        point = space.point("task_arithmetic", even_weights(space, added, round(1 / len(added), 6)))
        if len(added) > space.used or not space.contains(point):
            return None
        label = f"{SOUP_PREFIX}{space.donors[donor]}"
        step = by_label.get(label) or by_recipe.get(to_recipe(space, point).key)
        if step is None:
            return (label, point) if left > 0 else None
        if step.state in ("waiting", "running"):
            return None
        if step.state == "complete" and (best is None or step.sort_key <= best):
            soup, best = added, step.sort_key
    return None
