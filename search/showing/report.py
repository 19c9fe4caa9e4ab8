"""report.html: what a run found, how and how surely, on one page that needs nothing else.

All of it is read from the run's database and result.json: no model is loaded, nothing is asked.
What the page says of recipes between and beyond the trials is what the process of
``search.proposing.gp`` believes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from merge_engine.recipe.recipe import Recipe
from objectives.base import without_settings
from objectives.scores import Interval, paired_bootstrap, score_interval
from search.proposing.encoding import Candidates
from search.proposing.gp import one_thread
from search.proposing.gp_sampler import MAX_TRIALS
from search.proposing.insight import HALF_WIDTH, PosteriorView, method_chances, sensitivity
from search.proposing.space import Space
from search.proposing.starts import UNIFORM, baselines
from search.racing.item_scores import ItemScores
from search.racing.race import Floats
from search.showing.charts import Axis, Chart, IntervalRow, intervals
from search.storing.result import Difference, Result, Score, read_result
from search.storing.samples import read_samples
from search.storing.snapshot import FrozenItem
from search.storing.store import Store
from search.storing.trials import TrialLog, TrialRecord
from search.study.spec import StudySpec
from search.wording import printable_lines, short_names, shortened

TEMPLATE = Path(__file__).with_name("report.html")
DRAWN = 2000  # trials on the timeline
MOMENTS = 40  # at which what was believed is worked out again
SHOWN = 12  # items gained, and as many lost
PAIRS = 6  # of tasks, whose fronts are drawn
RESAMPLES = 2000  # for a task's interval
TRIFLE = 1e-9  # a move along a coordinate that is rounding alone
COLOURS = 8  # the style sheet has for methods
PARTS = {
    "build": "building recipes",
    "score": "asking them",
    "ask": "proposing the next",
}


def make_report(run: Path, store: Store, *, held: bool | None = None) -> str:
    """The page of a run, with its result if it has one so far.

    Args:
        run: Its folder.
        store: Its answers.
        held: Whether a process is at work on it; None: this one, which draws as it goes.

    Raises:
        StudyError: Another version of this program wrote the result.
    """
    result = read_result(run)
    samples = read_samples(run, result) if result else []
    with one_thread():
        contents = _contents(str(run), RunFacts(store, result))
    now = datetime.now().astimezone()
    return _template().render(contents, samples=samples, words=printable_lines, held=held, now=now)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _contents(name: str, facts: RunFacts) -> dict[str, Any]:
    result = facts.result
    model = PosteriorView(facts.space, facts.complete) if len(facts.complete) > 2 else None
    asked, scoring = facts.store.evaluations()
    return {
        "name": name,
        "facts": facts,
        "result": result,
        "spec": facts.spec,
        "study": yaml.safe_dump(facts.spec.model_dump(mode="json"), sort_keys=False),
        "verdict": result and result.verdict_text,
        "winner": result and _outcome(facts, result),
        "best": model and model.best,
        "so_far": _so_far(facts, model.best.trial) if model and not facts.is_finished else None,
        "progress": model and _progress(facts, model),
        "timeline": facts.complete and _timeline(facts),
        "curves": model and _curves(facts, model),
        "chances": model and method_chances(model),
        "drawn": DRAWN,
        "modelled": MAX_TRIALS,
        "tried": Counter(trial.point["method"] for trial in facts.complete),
        "importance": model and sensitivity(model),
        "asked": asked,
        "times": _times(facts, scoring),
    }


class RunFacts:
    """What the database holds of a run, and what follows from it without a model."""

    def __init__(self, store: Store, result: Result | None) -> None:
        self.store, self.result = store, result
        log = TrialLog(store.study())
        header = log.header()
        self.spec = StudySpec.model_validate(header["spec"])
        self.seconds: Mapping[str, float] = header.get("seconds", {})
        self.trials = sorted(
            log.finished(), key=lambda trial: (trial.completed or datetime.min, trial.number)
        )
        self.complete = [trial for trial in self.trials if trial.state == "complete"]
        self.failed = [trial for trial in self.trials if trial.state == "fail"]
        self.names = short_names(self.spec.models_but_base, "/") | {UNIFORM: "uniform"}
        self.names[self.spec.base_model] = "base"

        # Runs of versions before this one have neither.
        self.weights: Mapping[str, float] = header.get("weights", {})
        self.baselines: Mapping[str, str] = header.get("baselines", {})

    @property
    def last_told(self) -> datetime | None:
        """When the last trial was."""
        return self.trials[-1].completed if self.trials else None

    @property
    def base_name(self) -> str:
        """The base model's, without its folders."""
        return self.spec.base_model.rsplit("/", 1)[-1]

    @property
    def is_finished(self) -> bool:
        """Whether the result is that of all trials."""
        result = self.result
        return bool(result and result.trials + result.failed_trials >= len(self.trials))

    @cached_property
    def space(self) -> Space:
        """What was searched; its recipes are the run's if there is a result."""
        search = self.spec.search.model_copy(update={"start": ()})  # the files may be gone
        dtype = self.result.winner.recipe["out_dtype"] if self.result else "float32"
        return Space.from_spec(self.spec.model_copy(update={"search": search}), (), dtype)

    @cached_property
    def evaluations(self) -> dict[int, int]:
        """How many items had been asked after each trial, by its number."""
        asked, total, after = Counter[str](), 0, {}
        for trial in self.trials:
            recipe, items = trial.recipe, trial.items
            more = max(0, items - asked[recipe])  # who was asked before is not asked again
            asked[recipe] += more
            after[trial.number] = total = total + more
        return after

    def kind(self, method: str) -> str:
        """The class of a method's colour."""
        return f"m{self.spec.search.methods.index(method) % COLOURS}"

    def says(self, trial: TrialRecord) -> str:
        """A trial in a line."""
        numbers = [f"{n}={v:.2f}" for n, v in trial.point.items() if n != "method"]
        items = trial.items
        return f"trial {trial.number}: {' '.join([trial.point['method'], *numbers])}, {items} items"

    @cached_property
    def items(self) -> Mapping[str, Sequence[FrozenItem]]:
        """Those of each split, in scoring order."""
        of_split = defaultdict(list)
        for item in self.store.items():
            of_split[item.split].append(item)
        return of_split

    def tested(self, recipe: Recipe) -> dict[str, list[float]]:
        """A recipe's answers to the test items of each task."""
        by_task: dict[str, list[float]] = {}
        for item, value in zip(self.items["test"], self.answers(recipe.key, "test"), strict=True):
            by_task.setdefault(item.task, []).append(value)
        return by_task

    def answers(self, recipe: str, split: str) -> list[float]:
        """A recipe's answers to the first items of a split, up to a block that it lacks."""
        blocks = self.store.results(recipe, split)
        end = next(number for number in range(len(blocks) + 1) if number not in blocks)
        return [answer.value for number in range(end) for answer in blocks[number]]


def some_of(complete: Sequence[TrialRecord], most: int) -> list[TrialRecord]:
    """Of very many trials the best, and as many of the others, in their order."""
    if len(complete) <= most:
        return [*complete]
    places = range(len(complete))
    ranked = sorted(places, key=lambda one: complete[one].sort_key)
    best, others = ranked[: most // 2], ranked[most // 2 :]
    step = -(-len(others) // (most // 2))
    return [complete[place] for place in sorted([*best, *others[::step]])]


class Cell(NamedTuple):
    """A score, and the winner's lead over it, with 95 % intervals, in per cent."""

    score: IntervalRow
    lead: IntervalRow | None = None


class Row(NamedTuple):
    """A model on some items: a cell for the mean and one for each task, None where it has none.

    ``note`` stands beneath its name.
    """

    name: str
    title: str
    note: str
    tokens: float | None
    cells: Sequence[Cell | None]


class Change(NamedTuple):
    """An item that the winner answers otherwise than the best donor."""

    task: str
    number: int
    prompt: str
    before: float
    after: float


def _outcome(facts: RunFacts, result: Result) -> dict[str, Any]:
    """What the test items said."""
    winner, best = Recipe.model_validate(result.winner.recipe), result.difference_to_best_donor
    recipes, own = baselines(facts.space), facts.tested(winner)
    inputs = {facts.spec.base_model: result.base, **result.donors, UNIFORM: result.uniform}
    rows = [
        _row(facts.names[model], model, it.test, facts.tested(recipes[model]), (it.difference, own))
        for model, it in inputs.items()
    ]
    rows.append(_row("winner", f"trial {result.winner.trial}", result.winner.test, own))
    front = [
        _row(
            f"trial {one.trial}",
            str(one.recipe["merge_method"]),
            one.test,
            facts.tested(Recipe.model_validate(one.recipe)),
        )
        for one in result.front
    ]
    columns = ["mean", *short_names(own, "_").values()]
    changes = _changes(facts, recipes[best.donor], winner)
    return {
        "best_donor": facts.names[best.donor],
        "columns": columns,
        "rows": rows,
        "floors": result.floors_text,
        "charts": _compared(columns, rows),
        "front": front,
        "pairs": _pairs(columns, [*rows, *front]) if front else [],
        "changed": _counts(own, facts.tested(recipes[best.donor])),
        "gained": [change for change in changes if change.after > change.before],
        "lost": [change for change in changes if change.after < change.before],
        "shown": SHOWN,
        "yaml": winner.to_yaml(),
        "folders": [model for model in winner.models_read if Path(model).is_absolute()],
    }


def _row(
    name: str,
    title: str,
    score: Score,
    answers: Mapping[str, Sequence[float]],
    rival: tuple[Difference, Mapping[str, Sequence[float]]] | None = None,
) -> Row:
    """A model's row from its score, its answers by task, and those of who leads it."""
    if rival is None:
        cells = [Cell(_known(name, score, "chosen"))]
        for task, values in answers.items():
            cells.append(_cell(name, _sheet(task, values), kind="chosen"))
        return Row(name, title, title, score.tokens, cells)
    lead, own = rival
    cells = [Cell(_known(name, score), _known(name, lead))]
    for task, values in answers.items():
        cells.append(_cell(name, _sheet(task, values), _sheet(task, own[task])))
    return Row(name, title, "", score.tokens, cells)


def _known(name: str, of: Score | Difference, kind: str = "") -> IntervalRow:
    return IntervalRow(name, 100 * of.mean, 100 * of.ci95[0], 100 * of.ci95[1], kind)


def _sheet(task: str, values: Sequence[float]) -> ItemScores:
    return ItemScores(tuple(values), (task,) * len(values), {task: 1.0})


def _cell(name: str, sheet: ItemScores, ahead: ItemScores | None = None, kind: str = "") -> Cell:
    """A sheet's mean, and the lead of the one that is to be ahead on the same items."""
    score = score_interval(sheet.values, sheet.tasks, sheet.weights)
    if ahead is None:
        return Cell(_in_percent(name, score, kind))
    lead = paired_bootstrap(
        ahead.values, sheet.values, sheet.tasks, sheet.weights, resamples=RESAMPLES
    )
    return Cell(_in_percent(name, score, kind), _in_percent(name, lead))


def _in_percent(name: str, found: Interval, kind: str = "") -> IntervalRow:
    return IntervalRow(name, 100 * found.mean, 100 * found.low, 100 * found.high, kind)


def _so_far(facts: RunFacts, best: TrialRecord) -> dict[str, Any] | None:
    """What the best so far and what it is made from answered to the search items they saw."""
    if not facts.weights:
        return None
    tasks = [item.task for item in facts.items["search"]]
    columns = [facts.weights, *({task: 1.0} for task in facts.weights)]
    own = facts.answers(best.recipe, "search")

    def row(name: str, title: str, values: Sequence[float], *, is_best: bool = False) -> Row:
        cells: list[Cell | None] = []
        for weights in columns:
            there = [n for n, _ in enumerate(values) if tasks[n] in weights]
            sheet, ahead = (
                ItemScores(tuple(some[n] for n in there), tuple(tasks[n] for n in there), weights)
                for some in (values, own)
            )
            known = {*sheet.tasks} == {*weights}
            cells.append(_cell(name, sheet, None if is_best else ahead) if known else None)
        return Row(name, title, f"{len(values)} items", None, cells)

    answers = {name: facts.answers(key, "search") for name, key in facts.baselines.items()}
    rows = [row(facts.names[name], name, values[: len(own)]) for name, values in answers.items()]
    rows.append(row("best so far", f"trial {best.number}", own, is_best=True))
    return {"columns": ["mean", *short_names(facts.weights, "_").values()], "rows": rows}


def _compared(columns: Sequence[str], rows: Sequence[Row]) -> list[Markup]:
    """A chart of every model for the mean and for each task, on one axis."""
    scores = [[cell.score for cell in row.cells if cell] for row in rows]
    ends = [end for row in scores for score in row for end in (score.low, score.high)]
    axis = Axis.around("test score, %", ends)
    return [
        intervals(axis, [row[place] for row in scores], f"{column}: score on test")
        for place, column in enumerate(columns)
    ]


def _pairs(columns: Sequence[str], rows: Sequence[Row]) -> list[Markup]:
    """The front and what it was made from, for pairs of tasks."""
    charts = []
    for one, other in list(combinations(range(1, len(columns)), 2))[:PAIRS]:
        cells = [(row.cells[one], row.cells[other]) for row in rows]
        points = [(x.score, y.score) for x, y in cells if x and y]
        chart = Chart(
            Axis.around(f"{columns[one]}, %", [x.mean for x, _ in points]),
            Axis.around(f"{columns[other]}, %", [y.mean for _, y in points]),
        )
        for x, y in points:
            chart.dot(x.mean, y.mean, f"{x.name}: {x.mean:.1f}, {y.mean:.1f}", x.kind, 4)
        charts.append(chart.svg(f"the front in {columns[one]} and {columns[other]}"))
    return charts


def _changes(facts: RunFacts, donor: Recipe, winner: Recipe) -> list[Change]:
    """The test items that two recipes answer differently, the largest differences first."""
    answers = [facts.answers(recipe.key, "test") for recipe in (donor, winner)]
    both = zip(facts.items["test"], *answers, strict=True)
    changes = [
        Change(item.task, item.doc_id, shortened(without_settings(item.prompt), 240), before, after)
        for item, before, after in both
        if before != after
    ]
    return sorted(changes, key=lambda one: -abs(one.after - one.before))


def _counts(
    own: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]
) -> dict[str, tuple[int, int, int]]:
    """How many items of each task the winner gained, lost, and answers as the other does."""
    found = {}
    for task, values in own.items():
        ahead = np.sign(np.subtract(values, theirs[task]))
        found[task] = (int((ahead > 0).sum()), int((ahead < 0).sum()), int((ahead == 0).sum()))
    return found


def _progress(facts: RunFacts, model: PosteriorView) -> Markup:
    """What the best recipe was believed to be worth, over item evaluations."""
    counts = np.unique(np.linspace(3, len(model.trials), MOMENTS).astype(int))
    asked, means, deviations = [], [], []
    for count in counts.tolist():
        known = model.after(count)
        best = int(np.argmax(known.feasible_means))
        mean, deviation = known.values(known.data.x[[best]], known.data.method[[best]])
        asked.append(facts.evaluations[model.trials[count - 1].number])
        means.append(100 * float(mean[0]))
        deviations.append(100 * HALF_WIDTH * float(deviation[0]))
    x, y, side = np.array(asked, dtype=float), np.array(means), np.array(deviations)
    chart = Chart(
        Axis("item evaluations", 0, max(asked)),
        Axis.around("believed value of the best, %", [*y, y.max() + side[-1], y.max() - side[-1]]),
    )
    chart.band(x, y - side, y + side, "chosen")
    chart.line(x, y, "chosen")
    return chart.svg("what the best recipe so far was believed to be worth")


def _timeline(facts: RunFacts) -> Markup:
    """Every trial, over item evaluations."""
    trials = some_of(facts.complete, DRAWN)
    values = [100 * trial.value for trial in trials]
    most = max(trial.items for trial in trials)
    ends = facts.evaluations.values()
    chart = Chart(
        Axis("item evaluations", -0.02 * max(ends), 1.02 * max(ends)),
        Axis.around("value told, %", values),
    )
    for trial, value in zip(trials, values, strict=True):
        side = 100 * HALF_WIDTH * trial.estimate.variance**0.5 if trial.estimate else 0.0
        x, kind = facts.evaluations[trial.number], facts.kind(trial.point["method"])
        chart.upright(x, value - side, value + side, kind)
        missed = " missed" if trial.violation else ""
        radius = 2 + 2.5 * trial.items / most
        says = f"{value:.1f} ± {side:.1f} %, {facts.says(trial)}"
        chart.dot(x, value, says, f"{kind}{missed}", radius)
    for trial in facts.failed[:DRAWN]:
        says = f"failed: {facts.says(trial)}: {trial.error}"
        chart.dot(facts.evaluations[trial.number], chart.y.low, says, "failed", 5)
    return chart.svg("every trial's value")


def _curves(facts: RunFacts, model: PosteriorView) -> dict[str, Any] | None:
    """The response to the scale, all else being as in the winner, of methods that have one."""
    result, (low, high) = facts.result, facts.space.scale
    through = model.best.trial
    if result:
        through = next(t for t in facts.complete if t.number == result.winner.trial)
    one = model.encoding.candidates([through.point])
    mean = float(one.weights.mean())
    shape = one.weights[0] / mean if mean else np.ones_like(one.weights[0])
    scales = np.linspace(low, high, 61)
    found: dict[int, tuple[Floats, Floats]] = {}
    for number in range(len(facts.space.methods)):
        along = Candidates(
            np.full(len(scales), number),
            scales[:, None, None] * shape,
            np.repeat(one.values, len(scales), axis=0),
        )
        if np.ptp(model.encoding.encode(along[1:]), axis=0).max() > TRIFLE:  # at 0 ratios are lost
            found[number] = model.values(along)
    if not found:
        return None
    y = Axis.around("value, %", np.concatenate([values for values, _ in found.values()]))
    charts = {}
    for number, (values, deviations) in found.items():
        method = facts.space.methods[number]
        chart, kind = Chart(Axis("scale", low, high), y, height=170), facts.kind(method)
        chart.band(scales, values - HALF_WIDTH * deviations, values + HALF_WIDTH * deviations, kind)
        chart.line(scales, values, kind)
        for tried in model.tried.weights[model.tried.method == number].mean(axis=(1, 2)).tolist():
            chart.upright(tried, y.low, y.low + 0.05 * (y.high - y.low), kind)
        if number == one.method[0]:
            chart.dot(mean, float(model.values(one)[0][0]), facts.says(through), "chosen", 4)
        charts[method] = chart.svg(f"value of {method} over the scale")
    return {"through": through.number, "charts": charts}


def _times(facts: RunFacts, scoring: float) -> list[tuple[str, float]]:
    """Where the seconds of all sessions went."""
    known = dict(facts.result.seconds) if facts.result and facts.is_finished else {
        **facts.seconds, "score": scoring,
    }  # fmt: skip
    parts = [(what, known.get(name, 0.0)) for name, what in PARTS.items()]
    rest = known.get("total", 0.0) - sum(seconds for _, seconds in parts)
    return [*parts, ("all else", rest)] if rest > 0 else parts
