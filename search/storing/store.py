"""The store: Optuna's study and every finished block of results, in one database.

The blocks of a job are stored in one transaction before the next job; the responses to jobs under
way are in their journals. Results are keyed by recipe, not by trial: a recipe proposed twice is
evaluated once.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import optuna
from optuna.study import Study
from sqlalchemy import Column, Engine, Select, event, func, select, update
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError

from objectives.base import ItemResult, printable
from search.racing.race import Floats
from search.storing.address import DATABASE_ERRORS, Storage, cause_of, is_damage, opening, reason_of
from search.storing.folder import Interrupted
from search.storing.intact import damaged, digest_of, reading_stored
from search.storing.snapshot import StoredItem
from search.storing.tables import ANSWERS, ITEMS, STEPS, check_tables, make_tables, open_rdb
from search.study.spec import StudyError

PAUSES: Final = (1, 2, 4, 8, 15, 30, 60, 60, 60)  # seconds between attempts to reach a server
RECONNECTS: Final = 20  # lost connections that a session survives
# Columns that hold a block's results as JSON lists, and the fields of ``ItemResult`` in them, in
# the order of the fields.
RESULT_COLUMNS: Final = {
    "answers": "value",
    "margins": "margin",
    "faults": "fault",
    "tokens": "tokens",
}


@dataclass(frozen=True)
class PathStep:
    """One step of tuning by gradient: an update of a path's weights."""

    path: int  # number of the path, from 0 on
    step: int  # number of updates on its path so far; 0: the start
    is_point: bool  # whether the weights after it are a point of the path, so that they are kept
    evaluations: int  # item evaluations that it took; an item's gradient counts three
    seconds: float  # time it took
    losses: Mapping[str, float]  # the mean over each task's items, before the update


class Store:
    """The study of one run and the results of its recipes.

    Args:
        storage: The study's address; or an SQLite file.
        say: Called with a line while waiting for a server.
        begun: The run is there already: nothing is made, so a read-only file will do.

    Raises:
        StudyError: It cannot be opened, or another version of this program made it.
    """

    def __init__(
        self, storage: Storage | Path, say: Callable[[str], None] = print, *, begun: bool = False
    ) -> None:
        self.storage = Storage.file(storage) if isinstance(storage, Path) else storage
        self._say, self._begun = say, begun
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with opening(self.storage):
            if not begun:
                make_tables(self.storage)
            check_tables(self.storage)
            self._rdb = open_rdb(self.storage, begun=begun)
            with reading_stored(self.storage.name):
                self.study()
                self._study = self._rdb.get_study_id_from_name(self.storage.study)
        event.listen(self._engine, "do_connect", self._reconnect)

    @property
    def _engine(self) -> Engine:
        engine: Engine = self._rdb.engine
        return engine

    def _reconnect(self, dialect: Any, record: Any, args: Any, options: Any) -> Any:  # noqa: ARG002
        """Reconnect, waiting for a server that was reachable before."""
        for pause in (0, *PAUSES):
            time.sleep(pause)
            try:
                return dialect.connect(*args, **options)
            except dialect.loaded_dbapi.OperationalError as error:
                reason = str(error).splitlines()[0]
            if not pause:
                self._say(f"{self.storage.name} is gone, waiting for it: {reason}")
        raise Interrupted(f"{self.storage.name} is gone: {reason}")

    def persist(self, attempt: Callable[[], None]) -> None:
        """Do work that resumes from what is stored; repeat it after a lost connection."""
        for _ in range(RECONNECTS):
            try:
                return attempt()
            except DATABASE_ERRORS as error:
                if is_damage(error):
                    raise damaged(self.storage.name, printable(reason_of(error))) from error
                cause = cause_of(error)
                if not isinstance(cause, OperationalError | InterfaceError | InternalError):
                    raise
                stopped = Interrupted(f"{self.storage.name}: {reason_of(error)}")
                if not cause.connection_invalidated:
                    raise stopped from error
                self._say(f"{stopped}; going on with what was stored before")
        raise stopped

    def study(self) -> Study:
        """Load the run's study, or make it unless the run is to have begun."""
        if self._begun:
            try:
                return optuna.load_study(storage=self._rdb, study_name=self.storage.study)
            except KeyError:
                why = "the run was stopped before it began; run it again"
                raise StudyError(f"{self.storage.name} has no such study: {why}") from None
        return optuna.create_study(
            storage=self._rdb,
            study_name=self.storage.study,
            direction="maximize",
            load_if_exists=True,
        )

    def _read(self, query: Select[Any]) -> Sequence[Any]:
        with self._engine.connect() as connection:
            return connection.execute(query).all()

    def items(self) -> list[StoredItem]:
        """Read the snapshots of the study's items; none before a run has begun."""
        columns = [ITEMS.c[field.name] for field in fields(StoredItem)]
        mine = select(ITEMS.c.place, ITEMS.c.digest, *columns).where(ITEMS.c.study == self._study)
        items = []
        with reading_stored(self.storage.name):
            for place, digest, *content in self._read(mine.order_by(ITEMS.c.place)):
                items.append(StoredItem(*content))
                if digest != digest_of(place, asdict(items[-1])):
                    raise damaged(self.storage.name, f"item {place} is not as it was written")
        return items

    def save_items(self, items: Sequence[StoredItem]) -> None:
        """Store the snapshots of the study's items, all or none."""
        rows = [
            {
                "study": self._study,
                "place": number,
                "digest": digest_of(number, asdict(item)),
                **asdict(item),
            }
            for number, item in enumerate(items)
        ]
        with self._engine.begin() as connection:
            connection.execute(ITEMS.insert(), rows)

    def results(self, recipe: str, split: str) -> Mapping[int, list[ItemResult]]:
        """Read a recipe's results on a split, by block number and in the order of these."""
        found = {}
        with reading_stored(self.storage.name):
            columns = [ANSWERS.c[name] for name in RESULT_COLUMNS]
            mine = self._evaluated(recipe, split, ANSWERS.c.block, ANSWERS.c.digest, *columns)
            for block, digest, *parts in self._read(mine.order_by(ANSWERS.c.block)):
                if digest != digest_of(recipe, split, block, *parts):
                    what = f"the answers of recipe {recipe}, {split} block {block}"
                    raise damaged(self.storage.name, f"{what} are not as they were written")
                values = zip(*map(json.loads, parts), strict=True)
                found[block] = [ItemResult(*of_item) for of_item in values]
        return found

    def blocks(self, recipe: str, split: str) -> set[int]:
        """List the numbers of the blocks of a split that a recipe was evaluated on."""
        return {row.block for row in self._read(self._evaluated(recipe, split, ANSWERS.c.block))}

    def _evaluated(self, recipe: str, split: str, *columns: Column[Any]) -> Select[Any]:
        """Select columns of the results of a recipe on a split."""
        return select(*columns).where(
            ANSWERS.c.study == self._study, ANSWERS.c.recipe == recipe, ANSWERS.c.split == split
        )

    def save(
        self,
        recipe: str,
        split: str,
        results: Mapping[int, Sequence[ItemResult]],
        seconds: float,
    ) -> None:
        """Store results by block number, in one transaction.

        ``seconds`` is the time of all of them; it is divided among blocks by items.
        """
        per_item = seconds / sum(map(len, results.values()))
        rows = []
        for block, of_block in results.items():
            parts = {
                column: json.dumps([getattr(one, field) for one in of_block])
                for column, field in RESULT_COLUMNS.items()
            }
            row = {"study": self._study, "recipe": recipe, "split": split, "block": block}
            row |= {"items": len(of_block), "seconds": per_item * len(of_block), **parts}
            rows.append(row | {"digest": digest_of(recipe, split, block, *parts.values())})
        with self._engine.begin() as connection:
            connection.execute(ANSWERS.insert(), rows)

    def recipes(self, split: str) -> set[str]:
        """List the keys of the recipes that have results on a split."""
        evaluated = select(ANSWERS.c.recipe).distinct()
        mine = evaluated.where(ANSWERS.c.study == self._study, ANSWERS.c.split == split)
        return {row.recipe for row in self._read(mine)}

    def evaluations(self) -> tuple[Mapping[str, int], Mapping[str, float]]:
        """Count the item evaluations of each split, and sum the seconds they took."""
        sums = (func.sum(ANSWERS.c["items"]), func.sum(ANSWERS.c.seconds))
        mine = select(ANSWERS.c.split, *sums).where(ANSWERS.c.study == self._study)
        rows = self._read(mine.group_by(ANSWERS.c.split))
        counts = Counter({row[0]: int(row[1]) for row in rows})
        seconds = {row[0]: float(row[2]) for row in rows}
        if steps := self.steps():
            counts["tune"] = sum(step.evaluations for step in steps)
            seconds["tune"] = sum(step.seconds for step in steps)
        return counts, seconds

    def save_step(self, step: PathStep, state: Floats) -> None:
        """Store a step of tuning and its state (4, U, k); earlier states stay only at points."""
        row = {**asdict(step), "losses": json.dumps(step.losses), "study": self._study}
        stale = update(STEPS).where(
            STEPS.c.study == self._study, STEPS.c.is_point.is_(False), STEPS.c.state.is_not(None)
        )
        with self._engine.begin() as connection:
            connection.execute(stale.values(state=None))
            stored = {"units": state.shape[1], "state": state.astype("<f8").tobytes()}
            connection.execute(STEPS.insert().values(**row, **stored))

    def steps(self) -> list[PathStep]:
        """Read the steps of tuning, in their order."""
        columns = [STEPS.c[field.name] for field in fields(PathStep)]
        mine = select(*columns).where(STEPS.c.study == self._study)
        rows = self._read(mine.order_by(STEPS.c.path, STEPS.c.step))
        return [replace(PathStep(*row), losses=json.loads(row.losses)) for row in rows]

    def states(self, *, points: bool) -> list[Floats]:
        """Read the states (4, U, k) at the points of all paths, or else after the last step."""
        mine = select(STEPS.c.units, STEPS.c.state).where(STEPS.c.study == self._study)
        if points:
            mine = mine.where(STEPS.c.is_point.is_(True)).order_by(STEPS.c.path, STEPS.c.step)
        else:
            mine = mine.order_by(STEPS.c.path.desc(), STEPS.c.step.desc()).limit(1)
        rows = self._read(mine)
        return [np.frombuffer(state, "<f8").reshape(4, units, -1) for units, state in rows]
