"""report.html: the search and the result of a run on one page that needs no other file.

Everything is read from the run's database and result.json; no model is loaded. The page's policy
lets it load nothing and run no script but its own, whatever untrusted text it shows.
Statements about recipes that were not tried are predictions of the Gaussian process
(``proposing.gp``).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import jinja2
import yaml

from merge_engine.recipe.recipe import Recipe
from objectives.base import printable
from search.proposing.gp import one_thread
from search.proposing.gp_sampler import MAX_TRIALS
from search.proposing.insight import PosteriorView, method_chances, sensitivity
from search.showing.charts import (
    DRAWN,
    colour,
    front_charts,
    progress_chart,
    scale_charts,
    score_charts,
    trial_chart,
)
from search.showing.comparison import (
    count_changes,
    front_rows,
    item_changes,
    result_rows,
    search_rows,
)
from search.showing.facts import RunFacts, describe_trial
from search.showing.score_table import ScoreTable
from search.showing.tuning_charts import AVERAGED, path_charts, weight_maps
from search.storing.result import Result, read_result
from search.storing.resume import check_result
from search.storing.samples import read_samples
from search.storing.store import Store
from search.study.public_names import public_names, without_paths
from search.wording import bracketed, percent, plus_minus, printable_lines, short_names

_CONTROL: Final = re.compile(r"[^\n -~]")  # or a letter, which is left as it is
TEMPLATE: Final = Path(__file__).with_name("report.html")
SHOWN: Final = 12  # items gained, and as many lost
LEAST_TRIALS: Final = 3  # complete, for the Gaussian process


def make_report(run: Path, store: Store, *, held: bool | None = None) -> str:
    """Render the page of a run, with its result if it has one so far.

    ``held``: whether another process holds the folder; None: this one does.

    Raises:
        StudyError: Another version of this program wrote the result.
    """
    result = read_result(run)
    facts = RunFacts(store, result)
    if result:
        check_result(run, result, facts.trials)
    with one_thread():
        contents = _search_part(facts) | (_result_part(facts, result) if result else {})
    page = _template().render(
        contents,
        name=str(run),
        facts=facts,
        result=result,
        samples=read_samples(run, result) if result else [],
        study=yaml.safe_dump(facts.spec.model_dump(mode="json"), sort_keys=False),
        held=held,
        now=datetime.now().astimezone(),
    )
    names = public_names(facts.spec) | {str(run.absolute()): f"./{run.name}"}
    return _CONTROL.sub(lambda match: printable(match[0]), without_paths(page, names))


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {
        "bracketed": bracketed,
        "describe_trial": describe_trial,
        "percent": percent,
        "plus_minus": plus_minus,
        "printable_lines": printable_lines,
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = hashlib.sha256(script.encode()).digest()
    environment.globals["script_hash"] = base64.b64encode(digest).decode()
    return environment.from_string(text)


def _search_part(facts: RunFacts) -> dict[str, Any]:
    """Describe the search; what needs a Gaussian process is None where trials are too few."""
    view = None
    if len(facts.complete) >= LEAST_TRIALS:
        view = PosteriorView(facts.space, facts.complete)
    return {
        "best": view and view.best,
        "so_far": search_rows(facts, view.best.trial) if view and not facts.is_finished else None,
        "search_columns": ["mean", *short_names(facts.weights, "_").values()],
        "progress": view and progress_chart(facts, view),
        "timeline": facts.complete and trial_chart(facts),
        "path": path_charts(facts),
        "curves": view and scale_charts(facts, view),
        "chances": view and method_chances(view),
        "averaged": AVERAGED,
        "drawn": DRAWN,
        "modelled": MAX_TRIALS,
        "colour": partial(colour, methods=facts.spec.search.methods),
        "tried": Counter(trial.point["method"] for trial in facts.complete),
        "importance": view and sensitivity(view),
    }


def _result_part(facts: RunFacts, result: Result) -> dict[str, Any]:
    """Describe the winner and what it was compared with on the test items."""
    winner = Recipe.model_validate(result.winner.recipe)
    lead = result.difference_to_best_donor
    best = ScoreTable.of_result(result).best_donor(lead)
    donor_key = facts.donor_key(lead.donor, own_template=lead.own_template)
    scores = facts.test_scores(winner.key)
    columns = ["mean", *short_names(scores, "_").values()]
    rows = result_rows(facts, result, scores)
    front = front_rows(facts, result.front)
    changes = item_changes(facts, donor_key, winner.key)
    return {
        "best_donor": best.name,
        "columns": columns,
        "rows": rows,
        "charts": score_charts(columns, rows),
        "front": front,
        "pairs": front_charts(columns, [*rows, *front]) if front else [],
        "changed": count_changes(facts.test_scores(donor_key), scores),
        "gained": [change for change in changes if change.after > change.before],
        "lost": [change for change in changes if change.after < change.before],
        "shown": SHOWN,
        "tuned": weight_maps(facts),
        "yaml": winner.to_yaml(),
        "folders": [model for model in winner.models_read if Path(model).is_absolute()],
    }
