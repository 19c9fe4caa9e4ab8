"""Test scores of a run's models, for a terminal, a report or a model card to lay out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from search.storing.result import Difference, DonorDifference, Result, Score
from search.wording import OWN_TEMPLATE, UNTUNED, short_names


class OtherTrial(NamedTuple):
    """A trial that is not the winner."""

    number: int
    search_score: float | None  # its estimate; None: it failed during the search
    items: int  # search items it was evaluated on
    test: Score | None  # None: it was not tested


class ScoreRow(NamedTuple):
    """A model in a table of test scores."""

    kind: Literal["base", "donor", "uniform", "untuned", "winner", "trial"]
    name: str  # short and unique in the table
    model: str  # a donor's folder or id; else the name, or the trial of the recipe
    test: Score
    lead: Difference | None = None  # of the winner over it; None: it is the winner or a trial
    own_template: bool = False  # the donor is evaluated under its own chat template


@dataclass(frozen=True)
class ScoreTable:
    """Test scores of the models of a run."""

    tasks: Mapping[str, str]  # short name of each task
    # Base, donors, uniform average, the best recipe without tuned weights, and last the winner or
    # another trial.
    rows: Sequence[ScoreRow]

    @classmethod
    def of_result(cls, result: Result, other: OtherTrial | None = None) -> Self:
        """Tabulate a result; the last row is another trial's, where one is given and tested."""
        names = short_names(result.donors, "/")
        rows = [ScoreRow("base", "base", "base", result.base.test, result.base.difference)]
        for model, donor in result.donors.items():
            name, own = names[model], donor.own_template
            rows.append(ScoreRow("donor", name, model, donor.test, donor.difference))
            if own:
                name = f"{name} {OWN_TEMPLATE}"
                rows.append(ScoreRow("donor", name, model, own.test, own.difference, True))
        uniform = result.uniform
        rows.append(ScoreRow("uniform", "uniform", "uniform", uniform.test, uniform.difference))
        if one := result.untuned:
            rows.append(
                ScoreRow("untuned", UNTUNED, f"trial {one.trial}", one.test, one.difference)
            )
        if other and other.test:
            rows.append(ScoreRow("trial", "this trial", f"trial {other.number}", other.test))
        else:
            winner = result.winner
            rows.append(ScoreRow("winner", "winner", f"trial {winner.trial}", winner.test))
        return cls(short_names(result.winner.test.tasks, "_"), rows)

    def best_donor(self, lead: DonorDifference) -> ScoreRow:
        """Return the row of the donor that a lead is over."""
        wanted = (lead.donor, lead.own_template)
        return next(
            row
            for row in self.rows
            if row.kind == "donor" and (row.model, row.own_template) == wanted
        )
