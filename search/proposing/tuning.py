"""Tuning by gradient, as pure functions: the items of a step, and the update of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from typing import Final

import numpy as np

from search.racing.race import Floats

FIRST_POINT: Final = 10  # steps to a path's first point; each further one is at twice as many
LEAST_STEPS: Final = 80  # the limit of the first path is never lower
BATCH: Final = 16  # items of a step; more if that is less than two per task
AT_ONCE: Final = 8  # items whose losses are computed together
GRADIENT_COST: Final = 3  # item evaluations per gradient of an item: backward takes two
_DECAYS: Final = (0.9, 0.999)  # of the running means of gradients, and of their squares
DECAY: Final = 1 / 6  # share of the distance to their mean that weights lose, by step size
_AVERAGED: Final = 0.95  # weight of the past in the mean of the weights
_EPSILON: Final = 1e-8


def batch_size(tasks: int) -> int:
    """Return the number of items of a step, given the number of tasks."""
    return max(BATCH, 2 * tasks)


def most_steps(trials: int, items: int, batch: int) -> int:
    """Return the maximum number of steps of all paths of a study together.

    They may take a fifth of the evaluations of ``trials`` on all ``items`` of the search split, but
    at least ``LEAST_STEPS``, in which most of the gain is found.
    """
    return max(LEAST_STEPS, int(trials * items / 5 / (GRADIENT_COST * batch)))


def point_steps(steps: int) -> list[int]:
    """Return the steps, up to ``steps``, after which a path has a point."""
    return [*takewhile(lambda step: step <= steps, (FIRST_POINT * 2**n for n in count()))]


def minibatch(
    by_task: Mapping[str, Sequence[int]],
    weights: Mapping[str, float],
    size: int,
    step: int,
    seed: Sequence[int],
) -> tuple[int, ...]:
    """Return the items of a step: of each task a number in proportion to its weight.

    After any number of steps, every task is within one item of its share. A task's items are
    shuffled again after each pass over them.

    Args:
        by_task: Items of each task, one or more.
        weights: Weights of the tasks, of any scale.
        size: Number of items of a step.
        step: Number of the step, from 0 on.
        seed: Seed of the shuffles.
    """
    total = sum(weights[task] for task in by_task)
    drawn = dict.fromkeys(by_task, 0)
    found = []
    for draw in range((step + 1) * size):
        task = max(by_task, key=lambda task: (draw + 1) * weights[task] / total - drawn[task])
        if draw >= step * size:
            items = by_task[task]
            epoch, position = divmod(drawn[task], len(items))
            generator = np.random.default_rng([*seed, [*by_task].index(task), epoch])
            found.append(items[int(generator.permutation(len(items))[position])])
        drawn[task] += 1
    return tuple(found)


def items_of_job(items: int, most: int, workers: int) -> int:
    """Return the number of items of a job, such that all workers get equally many jobs of a step.

    Args:
        items: Number of items of the step.
        most: Maximum number of items of a job.
        workers: Number of workers.
    """
    each = math.ceil(items / most / workers)  # jobs of a worker
    return math.ceil(items / (each * workers))


def first_state(weights: Floats) -> Floats:
    """Return the state (4, U, k) before the first update of weights (U, k)."""
    return np.stack([weights, np.zeros_like(weights), np.zeros_like(weights), weights])


def update(state: Floats, gradient: Floats, step: int, rate: float) -> Floats:
    """Return the state after one update of Adam, and of the mean of the weights along the path.

    Kingma and Ba 2014, algorithm 1, https://arxiv.org/abs/1412.6980, with decoupled
    weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101): a donor's weights
    decay towards their mean over the units, because the gradient of a few items for a single unit
    is mostly noise. The mean along the path generalises better than its end, which circles around
    it (Polyak and Juditsky 1992, https://doi.org/10.1137/0330046).

    Args:
        state: Weights, the running means of gradients and of their squares, and the mean of the
            weights, (4, U, k).
        gradient: Of the loss at the weights, (U, k).
        step: Number of the update, from 1 on.
        rate: The step size.
    """
    weights, mean, square, average = state
    mean = _DECAYS[0] * mean + (1 - _DECAYS[0]) * gradient
    square = _DECAYS[1] * square + (1 - _DECAYS[1]) * gradient**2
    unbiased = mean / (1 - _DECAYS[0] ** step), square / (1 - _DECAYS[1] ** step)
    weights = weights - rate * unbiased[0] / (np.sqrt(unbiased[1]) + _EPSILON)
    weights = weights - rate * DECAY * (weights - weights.mean(axis=0))
    kept = min(_AVERAGED, step / (step + 9))  # a shorter memory for the first steps
    return np.stack([weights, mean, square, kept * average + (1 - kept) * weights])
