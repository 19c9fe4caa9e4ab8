"""What survives a kill: Optuna's study and every finished block of answers, in one database.

A block is written in one transaction before the next is asked, so a kill loses at most the block
at work. Answers are keyed by the recipe's own key, not by trial: a recipe proposed twice is
answered once, whoever proposed it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.study import Study
from sqlalchemy import Column, Float, Integer, MetaData, String, Table, Text, select

_META = MetaData()
_ANSWERS = Table(
    "mergesearch_answers",
    _META,
    Column("recipe", String(32), primary_key=True),
    Column("split", String(16), primary_key=True),
    Column("block", Integer, primary_key=True),
    Column("answers", Text, nullable=False),  # JSON list, one number per item in scoring order
    Column("seconds", Float, nullable=False),
)
STUDY = "mergesearch"


class Store:
    """The database of one run: SQLite in the run folder."""

    def __init__(self, file: Path) -> None:
        self._rdb = RDBStorage(f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": 60}})
        _META.create_all(self._rdb.engine)

    def study(self) -> Study:
        """The run's study, made if there is none."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return optuna.create_study(
            storage=self._rdb, study_name=STUDY, direction="maximize", load_if_exists=True
        )

    def answers(self, recipe: str, split: str) -> Mapping[int, list[float]]:
        """The blocks of a split that a recipe has answered, by block number."""
        wanted = (_ANSWERS.c.recipe == recipe) & (_ANSWERS.c.split == split)
        with self._rdb.engine.connect() as connection:
            rows = connection.execute(select(_ANSWERS.c.block, _ANSWERS.c.answers).where(wanted))
            return {block: json.loads(answers) for block, answers in rows}

    def save(
        self, recipe: str, split: str, block: int, answers: Sequence[float], seconds: float
    ) -> None:
        """Store one finished block, in one transaction."""
        row: dict[str, Any] = {"recipe": recipe, "split": split, "block": block}
        with self._rdb.engine.begin() as connection:
            connection.execute(
                _ANSWERS.insert().values(**row, answers=json.dumps(list(answers)), seconds=seconds)
            )

    def recipes(self, split: str) -> set[str]:
        """Keys of the recipes that have answered some of a split."""
        with self._rdb.engine.connect() as connection:
            rows = connection.execute(select(_ANSWERS.c.recipe).where(_ANSWERS.c.split == split))
            return {recipe for (recipe,) in rows}

    def scored(self) -> tuple[int, float]:
        """Item evaluations so far, and the seconds they took."""
        query = select(_ANSWERS.c.answers, _ANSWERS.c.seconds)
        with self._rdb.engine.connect() as connection:
            rows = connection.execute(query).all()
        return sum(len(json.loads(row[0])) for row in rows), sum(row[1] for row in rows)
