"""The tables of a run's database, besides Optuna's: making and checking them."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage
from sqlalchemy import (
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    inspect,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.pool import NullPool

from search.storing.address import DATABASE_ERRORS, Storage, cause_of, reason_of
from search.storing.snapshot import StoredItem
from search.study.spec import StudyError

_META = MetaData()
ANSWERS = Table(
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
    Column("tokens", Text, nullable=False),  # JSON list, how many were generated per item
    Column("seconds", Float, nullable=False),
    Column("digest", String(32), nullable=False),  # of the row except items and seconds
    Index("mergesearch_asked", "study", "split", "recipe", "items", "seconds"),  # to count by
)
STEPS = Table(
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
ITEMS = Table(
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


def open_rdb(storage: Storage, *, begun: bool = False, **options: Any) -> RDBStorage:
    """Open Optuna's storage, and make the tables unless the run has ``begun``."""
    url = storage.url.render_as_string(hide_password=False)
    database = RDBStorage(url, {**storage.engine_options(), **options}, skip_table_creation=begun)
    if not begun:
        _META.create_all(database.engine)
    return database


def check_tables(storage: Storage) -> None:
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


def make_tables(storage: Storage) -> None:
    """Make the missing tables; other runs may be making them at the same time."""
    if storage.is_file:
        if not Path(str(storage.url.database)).exists():
            _make_file(storage)
        return
    for pause in (0.1, 0.5, 2.0, None):
        try:
            open_rdb(storage, poolclass=NullPool)  # a failed one leaves none open
            return
        except DATABASE_ERRORS as error:
            others = isinstance(cause_of(error), IntegrityError) or "exists" in reason_of(error)
            if pause is None or not others:
                raise
            time.sleep(pause)


def _make_file(storage: Storage) -> None:
    """Make an SQLite file with all tables, readable by its owner only: it will hold prompts.

    It gets its name when it is complete, so that a kill cannot leave it without some tables.
    """
    file = Path(str(storage.url.database))
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch(mode=0o600, exist_ok=False)
        made = replace(storage, url=storage.url.set(database=str(partial)))
        open_rdb(made, poolclass=NullPool)
        with contextlib.suppress(FileExistsError):  # another run has made it meanwhile
            os.link(partial, file)
    finally:
        partial.unlink(missing_ok=True)
        partial.with_name(f"{partial.name}-journal").unlink(missing_ok=True)
