"""The store: Optuna's study and every finished block of results, in one database.

The blocks of a job are written in one transaction before the next job; what jobs under way have
answered is in their journals. Results are keyed by recipe, not by trial: a recipe proposed twice is
evaluated once.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import optuna
from optuna.storages import RDBStorage
from optuna.study import Study
from sqlalchemy import (
    Boolean,
    Column,
    Engine,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, InterfaceError, InternalError, OperationalError
from sqlalchemy.pool import NullPool

from objectives.base import ItemResult, printable
from search.racing.race import Floats
from search.storing.address import DATABASE_ERRORS, Storage, cause_of, is_damage, opening, reason_of
from search.storing.folder import Interrupted
from search.storing.intact import damaged, digest_of, reading_stored
from search.storing.snapshot import StoredItem
from search.study.spec import StudyError

PAUSES: Final = (1, 2, 4, 8, 15, 30, 60, 60, 60)  # seconds between attempts to reach a server
RECONNECTS: Final = 20  # lost connections that a session survives

_META = MetaData()
_ANSWERS = Table(
    "mergesearch_answers",
    _META,
    Column("study", Integer, primary_key=True),
    Column("recipe", String(32), primary_key=True),
    Column("split", String(16), primary_key=True),
    Column("block", Integer, primary_key=True),
    Column("items", Integer, nullable=False),  # how many
    Column("answers", Text, nullable=False),  # JSON list, one value per item in scoring order
    Column("margins", Text, nullable=False),  # JSON list, a number or null per item
    Column("faults", Text, nullable=False),  # JSON list, a reason or null per item
    Column("tokens", Text, nullable=False),  # JSON list, how many were written per item
    Column("seconds", Float, nullable=False),
    Column("digest", String(32), nullable=False),  # of the row except items and seconds
    Index("mergesearch_asked", "study", "split", "recipe", "items", "seconds"),  # to count by
)
_STEPS = Table(
    "mergesearch_steps",
    _META,
    Column("study", Integer, primary_key=True),
    Column("path", Integer, primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("is_point", Boolean, nullable=False),
    Column("evaluations", Integer, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("losses", Text, nullable=False),  # JSON, the mean of each task's items
    Column("units", Integer, nullable=False),
    # See `search.proposing.tuning.update`, (4, units, donors), float64, little-endian; NULL
    # where a later step has them and this is no point.
    Column("state", LargeBinary(1 << 24)),
)
_ITEMS = Table(
    "mergesearch_items",
    _META,
    Column("study", Integer, primary_key=True),
    Column("place", Integer, primary_key=True),
    *(
        Column(field.name, Integer if field.name == "doc_id" else Text, nullable=False)
        for field in fields(StoredItem)
    ),
    Column("digest", String(32), nullable=False),
)


@dataclass(frozen=True)
class PathStep:
    """One step of tuning by gradient: an update of a path's weights."""

    path: int  # number of the path, from 0 on
    step: int  # number of updates on its path so far; 0: the start
    is_point: bool  # whether the weights after it are a point of the path, so that they are kept
    evaluations: int  # item evaluations that it took; an item's gradient counts three
    seconds: float  # time it took
    losses: Mapping[str, float]  # the mean over each task's items, before the update


def _opened(storage: Storage, *, begun: bool = False, **options: Any) -> RDBStorage:
    url = storage.url.render_as_string(hide_password=False)
    database = RDBStorage(url, {**storage.engine_options(), **options}, skip_table_creation=begun)
    if not begun:
        _META.create_all(database.engine)
    return database


def _check_tables(storage: Storage) -> None:
    """Refuse a missing database, or one that this version has not written; change nothing."""
    if storage.is_file and not Path(str(storage.url.database)).is_file():
        raise StudyError(f"{storage.name}: no such file; restore it from a copy")
    found = inspect(create_engine(storage.url, **storage.engine_options(), poolclass=NullPool))
    for name, table in _META.tables.items():
        theirs = {
            each["name"] for each in (found.get_columns(name) if found.has_table(name) else ())
        }
        if not theirs:
            raise StudyError(
                f"{storage.name} has no table {name}, so it is not a run's database; restore it "
                "from a copy, or start over with --force-new"
            )
        if theirs != set(table.columns.keys()):
            raise StudyError(
                f"{storage.name} was made by another version of mergesearch (table {name} has "
                f"{', '.join(sorted(theirs))}); choose another --out"
            )


def _make_tables(storage: Storage) -> None:
    """Make the missing tables; other runs may be making them at the same time."""
    if storage.is_file:
        if not Path(str(storage.url.database)).exists():
            _make_file(storage)
        return
    for pause in (0.1, 0.5, 2.0, None):
        try:
            _opened(storage, poolclass=NullPool)  # a failed one leaves none open
            return
        except DATABASE_ERRORS as error:
            others = isinstance(cause_of(error), IntegrityError) or "exists" in reason_of(error)
            if pause is None or not others:
                raise
            time.sleep(pause)


def _make_file(storage: Storage) -> None:
    """Make an SQLite file with all tables, readable by its owner only: it will hold answers.

    It gets its name when it is complete, so that a kill cannot leave it without some tables.
    """
    file = Path(str(storage.url.database))
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch(mode=0o600, exist_ok=False)
        made = replace(storage, url=storage.url.set(database=str(partial)))
        _opened(made, poolclass=NullPool)
        with contextlib.suppress(FileExistsError):  # another run has made it meanwhile
            os.link(partial, file)
    finally:
        partial.unlink(missing_ok=True)
        partial.with_name(f"{partial.name}-journal").unlink(missing_ok=True)


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
                _make_tables(self.storage)
            _check_tables(self.storage)
            self._rdb = _opened(self.storage, begun=begun)
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

    def items(self) -> list[StoredItem]:
        """Read the snapshots of the study's items; none before a run has begun."""
        columns = [_ITEMS.c[field.name] for field in fields(StoredItem)]
        mine = select(*columns).where(_ITEMS.c.study == self._study)
        digests = select(_ITEMS.c.place, _ITEMS.c.digest).where(_ITEMS.c.study == self._study)
        with self._engine.connect() as connection, reading_stored(self.storage.name):
            rows = connection.execute(mine.order_by(_ITEMS.c.place)).mappings()
            items = [StoredItem(**row) for row in rows]
            written = connection.execute(digests.order_by(_ITEMS.c.place)).all()
            for item, (place, digest) in zip(items, written, strict=True):
                if digest != digest_of(place, asdict(item)):
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
            connection.execute(_ITEMS.insert(), rows)

    def results(self, recipe: str, split: str) -> Mapping[int, list[ItemResult]]:
        """Read a recipe's results on a split, by block number."""
        wanted = select(_ANSWERS).where(
            _ANSWERS.c.study == self._study, _ANSWERS.c.recipe == recipe, _ANSWERS.c.split == split
        )
        with self._engine.connect() as connection, reading_stored(self.storage.name):
            rows = connection.execute(wanted.order_by(_ANSWERS.c.block)).all()
            for row in rows:
                if row.digest != _digest_of(row):
                    what = f"the answers of recipe {recipe}, {split} block {row.block}"
                    raise damaged(self.storage.name, f"{what} are not as they were written")
            return {row.block: _results_of(row) for row in rows}

    def blocks(self, recipe: str, split: str) -> set[int]:
        """List the numbers of the blocks of a split that a recipe was evaluated on."""
        wanted = select(_ANSWERS.c.block).where(
            _ANSWERS.c.study == self._study, _ANSWERS.c.recipe == recipe, _ANSWERS.c.split == split
        )
        with self._engine.connect() as connection:
            return set(connection.execute(wanted).scalars())

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
        rows: list[dict[str, Any]] = [
            {
                "study": self._study,
                "recipe": recipe,
                "split": split,
                "block": block,
                "items": len(of_block),
                "answers": json.dumps([one.value for one in of_block]),
                "margins": json.dumps([one.margin for one in of_block]),
                "faults": json.dumps([one.fault for one in of_block]),
                "tokens": json.dumps([one.tokens for one in of_block]),
                "seconds": per_item * len(of_block),
            }
            for block, of_block in results.items()
        ]
        for row in rows:
            row["digest"] = _digest_of(SimpleNamespace(**row))
        with self._engine.begin() as connection:
            connection.execute(_ANSWERS.insert(), rows)

    def recipes(self, split: str) -> set[str]:
        """List the keys of the recipes that have results on a split."""
        asked = select(_ANSWERS.c.recipe).distinct()
        mine = asked.where(_ANSWERS.c.study == self._study, _ANSWERS.c.split == split)
        with self._engine.connect() as connection:
            return set(connection.execute(mine).scalars())

    def evaluations(self) -> tuple[Mapping[str, int], float]:
        """Count the item evaluations of each split, and sum the seconds they all took."""
        sums = (func.sum(_ANSWERS.c["items"]), func.sum(_ANSWERS.c.seconds))
        mine = select(_ANSWERS.c.split, *sums).where(_ANSWERS.c.study == self._study)
        with self._engine.connect() as connection:
            rows = connection.execute(mine.group_by(_ANSWERS.c.split)).all()
        counts = Counter({row[0]: int(row[1]) for row in rows})
        seconds: float = sum(row[2] for row in rows)
        if steps := self.steps():
            counts["tune"] += sum(step.evaluations for step in steps)
            seconds += sum(step.seconds for step in steps)
        return counts, seconds

    def save_step(self, step: PathStep, state: Floats) -> None:
        """Store a step of tuning and its state (4, U, k); earlier states stay only at points."""
        row = {**asdict(step), "losses": json.dumps(step.losses), "study": self._study}
        stale = update(_STEPS).where(
            _STEPS.c.study == self._study, _STEPS.c.is_point.is_(False), _STEPS.c.state.is_not(None)
        )
        with self._engine.begin() as connection:
            connection.execute(stale.values(state=None))
            stored = {"units": state.shape[1], "state": state.astype("<f8").tobytes()}
            connection.execute(_STEPS.insert().values(**row, **stored))

    def steps(self) -> list[PathStep]:
        """Read the steps of tuning, in their order."""
        columns = [_STEPS.c[field.name] for field in fields(PathStep)]
        mine = select(*columns).where(_STEPS.c.study == self._study)
        with self._engine.connect() as connection:
            rows = connection.execute(mine.order_by(_STEPS.c.path, _STEPS.c.step)).mappings()
            return [PathStep(**{**row, "losses": json.loads(row["losses"])}) for row in rows]

    def states(self, *, points: bool) -> list[Floats]:
        """Read the states (4, U, k) at the points of all paths, or else after the last step."""
        mine = select(_STEPS.c.units, _STEPS.c.state).where(_STEPS.c.study == self._study)
        if points:
            mine = mine.where(_STEPS.c.is_point.is_(True)).order_by(_STEPS.c.path, _STEPS.c.step)
        else:
            mine = mine.order_by(_STEPS.c.path.desc(), _STEPS.c.step.desc()).limit(1)
        with self._engine.connect() as connection:
            rows = connection.execute(mine).all()
        return [np.frombuffer(state, "<f8").reshape(4, units, -1) for units, state in rows]


def _digest_of(row: Any) -> str:
    results = row.answers, row.margins, row.faults, row.tokens
    return digest_of(row.recipe, row.split, row.block, *results)


def _results_of(row: Any) -> list[ItemResult]:
    columns = (row.answers, row.margins, row.faults, row.tokens)
    return [ItemResult(*parts) for parts in zip(*map(json.loads, columns), strict=True)]
