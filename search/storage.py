"""What survives a kill: Optuna's study and every finished block of answers, in one database.

A block is written in one transaction before the next is asked, so a kill loses at most the block
at work. Answers are keyed by the recipe's own key, not by trial: a recipe proposed twice is
answered once, whoever proposed it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.study import Study
from sqlalchemy import Column, Float, Integer, MetaData, String, Table, Text, inspect, select

from objectives.base import Answer
from search.frozen import FrozenItem
from search.spec import StudyError

_META = MetaData()
_ANSWERS = Table(
    "mergesearch_answers",
    _META,
    Column("recipe", String(32), primary_key=True),
    Column("split", String(16), primary_key=True),
    Column("block", Integer, primary_key=True),
    Column("answers", Text, nullable=False),  # JSON list, one value per item in scoring order
    Column("margins", Text, nullable=False),  # JSON list, a number or null per item
    Column("faults", Text, nullable=False),  # JSON list, a reason or null per item
    Column("tokens", Text, nullable=False),  # JSON list, how many were written per item
    Column("seconds", Float, nullable=False),
)
_ITEMS = Table(
    "mergesearch_items",
    _META,
    Column("place", Integer, primary_key=True),
    *(
        Column(field.name, Integer if field.name == "doc_id" else Text, nullable=False)
        for field in fields(FrozenItem)
    ),
)
STUDY = "mergesearch"


class Store:
    """The database of one run: SQLite in the run folder.

    Raises:
        StudyError: Another version of this program made it.
    """

    def __init__(self, file: Path) -> None:
        self._rdb = RDBStorage(f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": 60}})
        _META.create_all(self._rdb.engine)
        for table in _META.sorted_tables:
            columns = inspect(self._rdb.engine).get_columns(table.name)
            theirs = {column["name"] for column in columns}
            if theirs != set(table.columns.keys()):
                raise StudyError(
                    f"{file} was made by another version of mergesearch (table {table.name} has "
                    f"{', '.join(sorted(theirs))}); choose another --out"
                )

    def study(self) -> Study:
        """The run's study, made if there is none."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return optuna.create_study(
            storage=self._rdb, study_name=STUDY, direction="maximize", load_if_exists=True
        )

    def items(self) -> list[FrozenItem]:
        """The items of the study, as they were asked from the first; none before that."""
        columns = [column for column in _ITEMS.columns if column.name != "place"]
        with self._rdb.engine.connect() as connection:
            rows = connection.execute(select(*columns).order_by(_ITEMS.c.place))
            return [FrozenItem(**row._mapping) for row in rows]

    def save_items(self, items: Sequence[FrozenItem]) -> None:
        """Store the items of the study, all or none."""
        rows = [{"place": place, **asdict(item)} for place, item in enumerate(items)]
        with self._rdb.engine.begin() as connection:
            connection.execute(_ITEMS.insert(), rows)

    def answers(self, recipe: str, split: str) -> Mapping[int, list[Answer]]:
        """The blocks of a split that a recipe has answered, by block number."""
        wanted = (_ANSWERS.c.recipe == recipe) & (_ANSWERS.c.split == split)
        with self._rdb.engine.connect() as connection:
            rows = connection.execute(select(_ANSWERS).where(wanted))
            return {row.block: _loaded(row) for row in rows}

    def save(
        self, recipe: str, split: str, block: int, answers: Sequence[Answer], seconds: float
    ) -> None:
        """Store one finished block, in one transaction."""
        row: dict[str, Any] = {
            "recipe": recipe,
            "split": split,
            "block": block,
            "answers": json.dumps([answer.value for answer in answers]),
            "margins": json.dumps([answer.margin for answer in answers]),
            "faults": json.dumps([answer.fault for answer in answers]),
            "tokens": json.dumps([answer.tokens for answer in answers]),
            "seconds": seconds,
        }
        with self._rdb.engine.begin() as connection:
            connection.execute(_ANSWERS.insert().values(**row))

    def recipes(self, split: str) -> set[str]:
        """Keys of the recipes that have answered some of a split."""
        with self._rdb.engine.connect() as connection:
            rows = connection.execute(select(_ANSWERS.c.recipe).where(_ANSWERS.c.split == split))
            return {recipe for (recipe,) in rows}

    def scored(self) -> tuple[Mapping[str, int], float]:
        """Item evaluations of each split so far, and the seconds they all took."""
        query = select(_ANSWERS.c.split, _ANSWERS.c.answers, _ANSWERS.c.seconds)
        with self._rdb.engine.connect() as connection:
            rows = connection.execute(query).all()
        asked = Counter[str]()
        for row in rows:
            asked[row.split] += len(json.loads(row.answers))
        return asked, sum(row.seconds for row in rows)


def _loaded(row: Any) -> list[Answer]:
    """One answer per item of a block."""
    columns = (row.answers, row.margins, row.faults, row.tokens)
    return [Answer(*parts) for parts in zip(*map(json.loads, columns), strict=True)]
