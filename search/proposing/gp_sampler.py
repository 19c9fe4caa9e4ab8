"""The sampler ``gp``: the recipe of the highest expected improvement of a Gaussian process.

The process is fitted to the complete trials (if there are very many, to the best and the latest);
trials still running are imputed at their posterior means. With several objectives every proposal
draws weights between them (ParEGO). Parts of the model share weights at first and get their own
stage after stage (``Space.shared_units``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from optuna.samplers import BaseSampler, RandomSampler

from search.proposing.edges import widen_at_edges, widen_to
from search.proposing.encoding import Candidates, RecipeEncoding
from search.proposing.gp import Observation, Posterior, TrainingData, fit_kernel, one_thread
from search.proposing.proposal import Proposal, ProposalRequest
from search.racing.race import Estimate
from search.storing.trials import TrialRecord

MAX_TRIALS: Final = 400  # in the training set, whose cost is the cube of their number
REFRESH: Final = 50  # trials after which a thinned training set is chosen again
AUGMENTATION: Final = 0.05  # weight of all objectives besides the one that is furthest behind

# The search for the highest acquisition: random candidates, the best of them to step from, steps
# from each, and the steps' widths.
RANDOM: Final = 300
BEST: Final = 10
STEPS: Final = 10
WIDTHS: Final = (0.3, 0.1, 0.03)


def propose(request: ProposalRequest) -> Proposal | BaseSampler:
    """Return the point of the highest acquisition, after the start-up; before, a random one."""
    complete = [trial for trial in request.trials if trial.state == "complete"]
    pending = [trial for trial in request.trials if trial.state == "running"]
    space = request.space
    encoding = RecipeEncoding(space, space.shared_units(len(complete) - request.startup))
    if len(complete) < request.startup:
        if not encoding.shared:
            return RandomSampler(request.trial_seed)
        generator = np.random.default_rng(request.trial_seed)
        return Proposal(encoding.point(encoding.random(1, generator)))
    with one_thread():
        point, improvement = _best_point(request, encoding.shared, training_set(complete), pending)
    # It says nothing about the mean if there are several objectives, nor about unshared weights.
    modelled = not request.front and not encoding.shared
    return Proposal(point, improvement if modelled else None)


def _best_point(
    request: ProposalRequest,
    shared: tuple[int, ...],
    complete: Sequence[TrialRecord],
    pending: Sequence[TrialRecord],
) -> Proposal:
    """Fit the process to complete trials and maximise its acquisition.

    Default ranges are widened first where the best trial lies at their edge.
    """
    space = widen_to(request.space, [trial.point for trial in (*complete, *pending)])
    encoding = RecipeEncoding(space, shared)
    posterior = _fitted(request, encoding, complete)
    best = complete[int(np.argmax(posterior.feasible_means))]
    if (wider := widen_at_edges(space, best.point)) != space:
        encoding = RecipeEncoding(wider, shared)
        posterior = _fitted(request, encoding, complete)
    tried = encoding.candidates([trial.point for trial in complete])
    if pending:
        others = encoding.candidates([trial.point for trial in pending])
        posterior = posterior.condition_on_pending(encoding.encode(others), others.method)
        tried += others
    found, acquisition = maximise_acquisition(posterior, encoding, tried, request.trial_seed)
    return Proposal(encoding.point(found), acquisition * posterior.data.spread)


def _fitted(
    request: ProposalRequest, encoding: RecipeEncoding, complete: Sequence[TrialRecord]
) -> Posterior:
    """Fit the process to complete trials."""
    tried = encoding.candidates([trial.point for trial in complete])
    observed = observations(complete, tried, encoding)
    kernel = fit_kernel(observed[: refit_size(len(observed), request.startup)])
    if request.front:
        scalars = scalarise([trial.tasks for trial in complete], request.trial_seed)
        observed = tuple(
            one._replace(value=scalar.value, variance=scalar.variance)
            for one, scalar in zip(observed, scalars, strict=True)
        )
    return Posterior(TrainingData.from_observations(observed), kernel)


def maximise_acquisition(
    posterior: Posterior, encoding: RecipeEncoding, tried: Candidates, seed: int
) -> tuple[Candidates, float]:
    """Search among random candidates and steps, ever smaller ones, from the best of them.

    Returns:
        One candidate, and its acquisition.
    """
    generator = np.random.default_rng(seed)

    def steps(start: Candidates, width: float) -> Candidates:
        return encoding.perturb(start[np.tile(np.arange(len(start)), STEPS)], width, generator)

    good = tried[np.argsort(-posterior.feasible_means, kind="stable")[:BEST]]
    found = encoding.random(RANDOM, generator)
    for width in WIDTHS:
        found += steps(good, width)
    for width in WIDTHS:
        acquisition = posterior.acquisition(encoding.encode(found), found.method)
        found = found[np.argsort(-acquisition, kind="stable")[:BEST]]
        found += steps(found, width)
    acquisition = posterior.acquisition(encoding.encode(found), found.method)
    best = int(np.argmax(acquisition))
    return found[[best]], float(acquisition[best])


def training_set(trials: Sequence[TrialRecord]) -> Sequence[TrialRecord]:
    """Return all complete trials up to MAX_TRIALS; if there are more, the best and the latest.

    The choice changes once every REFRESH trials, so that hyper-parameters are not fitted for every
    proposal; newer trials are added.
    """
    if len(trials) <= MAX_TRIALS:
        return trials
    settled = len(trials) - (len(trials) - MAX_TRIALS) % REFRESH
    latest = settled - MAX_TRIALS // 2
    best = sorted(range(latest), key=lambda index: trials[index].sort_key)[: MAX_TRIALS // 2]
    return [*(trials[index] for index in sorted(best)), *trials[latest:]]


def refit_size(count: int, first: int) -> int:
    """Return the largest size up to ``count`` at which hyper-parameters are fitted.

    The sizes grow from ``first`` on by an eighth each.
    """
    size = first
    while (higher := size + max(1, size // 8)) <= count:
        size = higher
    return size


def observations(
    trials: Sequence[TrialRecord], encoded: Candidates, encoding: RecipeEncoding
) -> tuple[Observation, ...]:
    """Return n complete trials as the process sees them."""
    features = encoding.encode(encoded).tolist()
    return tuple(
        Observation(method, tuple(row), trial.value, trial.variance, trial.violation)
        for trial, method, row in zip(trials, encoded.method.tolist(), features, strict=True)
    )


def scalarise(estimates: Sequence[Mapping[str, Estimate]], seed: int) -> list[Estimate]:
    """Combine each trial's objectives into one, with weights that the seed draws.

    The augmented Chebyshev function of ParEGO, which is highest near the best in each objective:
    Knowles 2006, eq. 2, https://doi.org/10.1109/TEVC.2005.851274.
    """
    values, variances = np.array([list(one.values()) for one in estimates]).transpose(2, 0, 1)
    spread = np.ptp(values, axis=0)
    spread[spread == 0] = 1.0
    weights = np.random.default_rng(seed).dirichlet(np.ones(values.shape[1])) / spread
    behind = weights * (values.max(axis=0) - values)  # (n, tasks)
    scalars = -(behind.max(axis=1) + AUGMENTATION * behind.sum(axis=1))
    worst = behind.argmax(axis=1)
    variance = weights[worst] ** 2 * variances[np.arange(len(values)), worst]
    return [Estimate(*one) for one in zip(scalars.tolist(), variance.tolist(), strict=True)]
