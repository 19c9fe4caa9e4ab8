"""What survives a kill: Optuna's study and every finished block of answers, in one database.

A block is written in one transaction before the next is asked, so a kill loses at most the block
at work. Answers are keyed by the recipe's own key, not by trial: a recipe proposed twice is
answered once, whoever proposed it.

The database is a file in the run folder or, with ``--storage``, one that several runs share.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final, Self

import optuna
from optuna.distributions import json_to_distribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import (
    URL,
    Column,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    inspect,
    make_url,
    select,
)
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    InternalError,
    OperationalError,
)
from sqlalchemy.pool import NullPool

from objectives.base import ItemResult
from search.storing.folder import DATABASE, REMEMBERED, replace_text
from search.storing.snapshot import FrozenItem
from search.study.spec import StudyError

PAUSES: Final = (1, 2, 4, 8, 15, 30, 60, 60, 60)  # seconds between attempts to reach a server
RECONNECTS: Final = 20  # transactions that a session may lose with their connections
# A server that is gone is noticed, and does not hang the run.
_NETWORK = {"connect_timeout": 10, "keepalives_idle": 30, "tcp_user_timeout": 60_000}
_CONNECT: Final[Mapping[str, dict[str, int]]] = {
    "sqlite": {"timeout": 60},  # seconds another program may hold its lock
    "psycopg": _NETWORK,
    "psycopg2": _NETWORK,
}

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
    Index("mergesearch_asked", "study", "split", "recipe", "items", "seconds"),  # to count by
)
_ITEMS = Table(
    "mergesearch_items",
    _META,
    Column("study", Integer, primary_key=True),
    Column("place", Integer, primary_key=True),
    *(
        Column(field.name, Integer if field.name == "doc_id" else Text, nullable=False)
        for field in fields(FrozenItem)
    ),
)
DATABASE_ERRORS: Final = (DBAPIError, StorageInternalError)


@dataclass(frozen=True)
class Storage:
    """Which study of which database."""

    url: URL
    study: str = "mergesearch"

    @classmethod
    def file(cls, file: Path) -> Self:
        """A database that is a file of its own."""
        return cls(URL.create("sqlite", database=str(file.absolute())))

    @classmethod
    def of(cls, folder: Path, url: str | None = None, *, new: bool = False) -> Self:
        """That of a run folder: the one it remembers, else the one named, else a file in it.

        Args:
            folder: May not exist yet.
            url: As Optuna's RDBStorage takes it.
            new: Whatever the folder remembers.

        Raises:
            StudyError: The URL is not one, or not that of the run.
        """
        named = None if url is None else _parsed(url)
        known = None if new else cls._remembered(folder)
        if known is None:
            name = f"{folder.absolute().name}-{uuid.uuid4().hex[:12]}"
            return cls.file(folder / DATABASE) if named is None else cls(named, name)
        if named is None:
            return known
        own = replace(known, url=named)
        if own.name != known.name:
            raise StudyError(
                f"the study of {folder} is in {known.name}, and not in {own.name}; leave "
                "--storage away, choose another --out, or begin anew with --force-new"
            )
        return own

    @classmethod
    def _remembered(cls, folder: Path) -> Self | None:
        if (folder / REMEMBERED).is_file():
            known = json.loads((folder / REMEMBERED).read_text(encoding="utf-8"))
            return cls(make_url(known["url"]), known["study"])
        return cls.file(folder / DATABASE) if (folder / DATABASE).exists() else None

    def remember(self, folder: Path) -> None:
        """Have the folder know it, without a password."""
        if self != self.file(folder / DATABASE):
            known = {"url": self.name, "study": self.study}
            replace_text(folder / REMEMBERED, json.dumps(known) + "\n")

    @property
    def name(self) -> str:
        """The URL without a password."""
        secrets = [key for key in self.url.query if "password" in key]
        url = self.url.difference_update_query(secrets)
        place = (url.username, None, url.host, url.port, url.database, url.query)
        return URL.create(url.drivername, *place).render_as_string()

    @property
    def is_file(self) -> bool:
        """Whether there is no server."""
        return self.url.get_backend_name() == "sqlite"

    def engine_options(self) -> dict[str, Any]:
        """What its engine is made with."""
        options = _CONNECT.get(self.url.get_driver_name(), {})
        if self.is_file:
            options = _CONNECT["sqlite"]
        return {"connect_args": options, "pool_pre_ping": not self.is_file}

    def check(self) -> None:
        """Make sure that its server lets us in, if it has one.

        Raises:
            StudyError: It does not, or its driver is not installed.
        """
        if self.is_file:
            return
        with opening(self):
            engine = create_engine(self.url, **self.engine_options())
            engine.connect().close()
            engine.dispose()


def _parsed(text: str) -> URL:
    try:
        url = make_url(text)
        url.get_dialect()
    except (ArgumentError, ValueError):  # the message might quote a password
        raise StudyError(
            "--storage: no URL of a database that SQLAlchemy knows; "
            "it looks like postgresql+psycopg://user@host/database"
        ) from None
    if url.get_backend_name() != "sqlite":
        return url
    if url.database in (None, "", ":memory:"):
        raise StudyError("--storage: a database in memory keeps nothing; name a file")
    return url.set(database=str(Path(url.database).absolute()))


class Interrupted(Exception):  # noqa: N818  what happened, not what is wrong
    """The machine's doing, not the input's; when it is mended, the same command goes on."""


@contextmanager
def opening(storage: Storage) -> Iterator[None]:
    """Say in one line why a database cannot be used.

    Raises:
        StudyError: Instead of what the drivers raise.
        Stopped: Its disk is full, or another program has it locked.
    """
    try:
        yield
    except ImportError as error:
        ours = storage.url.get_driver_name() == "psycopg"
        module = getattr(error.__cause__ or error, "name", "")
        package = "'mergesearch[postgresql]'" if ours else module
        raise StudyError(f"{storage.name} needs a driver: pip install {package}") from None
    except DATABASE_ERRORS as error:
        what = _reason(error)
        if _passes(error):
            raise Interrupted(f"{storage.name}: {what}") from None
        to_do = (
            "choose another folder, or restore the file"
            if storage.is_file
            else "see to the URL, and the password ($PGPASSWORD and ~/.pgpass will do, too)"
        )
        raise StudyError(f"{storage.name}: {what}; {to_do}") from None


def _cause(error: Exception) -> BaseException | None:
    """What Optuna has wrapped."""
    return error.__cause__ if isinstance(error, StorageInternalError) else error


def _reason(error: Exception) -> str:
    """The first line of what the driver says."""
    cause = _cause(error)
    return str(cause.orig if isinstance(cause, DBAPIError) else cause).splitlines()[0]


def _passes(error: Exception) -> bool:
    """Whether a file is right, and only its disk full or its lock held."""
    name = getattr(getattr(_cause(error), "orig", None), "sqlite_errorname", "")
    return name.startswith(("SQLITE_FULL", "SQLITE_BUSY", "SQLITE_IOERR"))


class _Database(RDBStorage):
    """Optuna's, but that a run of many trials is opened in a fraction of the time.

    Its trials report nothing in between.
    """

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        if states is not None or trial_id_greater_than >= 0:  # at first all are asked for
            return super()._get_trials(study_id, states, included_trial_ids, trial_id_greater_than)
        one: Any = models.TrialModel.__table__
        mine = one.c.study_id == study_id
        known = cache(json_to_distribution)  # of a few kinds
        values = defaultdict[int, list[float]](list)
        params, kinds, user, system = (defaultdict[int, dict[str, Any]](dict) for _ in range(4))

        def rows_of(model: Any, *columns: str) -> Sequence[Any]:
            of = model.__table__.c
            wanted = select(of.trial_id, *(of[name] for name in columns)).join(one).where(mine)
            return connection.execute(wanted.order_by(*model.__table__.primary_key)).all()

        with self.engine.connect() as connection:
            of = models.TrialValueModel
            for trial, *stored in rows_of(of, "value", "value_type"):
                values[trial].append(of.stored_repr_to_value(*stored))
            columns = ("param_name", "param_value", "distribution_json")
            for trial, name, value, text in rows_of(models.TrialParamModel, *columns):
                kinds[trial][name] = kind = known(text)
                params[trial][name] = kind.to_external_repr(value)
            for noted, model in (
                (user, models.TrialUserAttributeModel),
                (system, models.TrialSystemAttributeModel),
            ):
                rows = rows_of(model, "key", "value_json")
                said = json.loads(f"[{','.join(row.value_json for row in rows)}]")  # all at once
                for (trial, key, _), value in zip(rows, said, strict=True):
                    noted[trial][key] = value
            return [
                FrozenTrial(
                    trial_id=trial.trial_id,
                    number=trial.number,
                    state=trial.state,
                    value=None,
                    values=values.get(trial.trial_id),
                    datetime_start=_local(trial.datetime_start),
                    datetime_complete=_local(trial.datetime_complete),
                    params=params[trial.trial_id],
                    distributions=kinds[trial.trial_id],
                    user_attrs=user[trial.trial_id],
                    system_attrs=system[trial.trial_id],
                    intermediate_values={},
                )
                for trial in connection.execute(select(one).where(mine).order_by(one.c.trial_id))
            ]


def _local(utc: datetime | None) -> datetime | None:
    """The time here, as Optuna has it in trials."""
    return utc and utc.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def _opened(storage: Storage, **options: Any) -> _Database:
    """The database, with all its tables."""
    url = storage.url.render_as_string(hide_password=False)
    database = _Database(url, engine_kwargs={**storage.engine_options(), **options})
    _META.create_all(database.engine)
    return database


def _make_tables(storage: Storage) -> None:
    """Make what is not there yet; other runs may be about to make the same."""
    for pause in (0.1, 0.5, 2.0, None):
        try:
            _opened(storage, poolclass=NullPool)  # one that fails leaves no connection open
            return
        except DATABASE_ERRORS as error:
            others = isinstance(_cause(error), IntegrityError) or "exists" in _reason(error)
            if pause is None or not others:
                raise
            time.sleep(pause)


class Store:
    """The study of one run and its answers.

    Args:
        storage: Where it is; or a file.
        say: Told when a server is waited for.

    Raises:
        StudyError: It cannot be opened, or another version of this program made it.
    """

    def __init__(self, storage: Storage | Path, say: Callable[[str], None] = print) -> None:
        self.storage = Storage.file(storage) if isinstance(storage, Path) else storage
        self.opened = time.perf_counter()
        self._say = say
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with opening(self.storage):
            _make_tables(self.storage)
            self._rdb = _opened(self.storage)
            self._check_tables()
            self.study()
            self._study = self._rdb.get_study_id_from_name(self.storage.study)
        event.listen(self._engine, "do_connect", self._reconnect)

    @property
    def _engine(self) -> Engine:
        engine: Engine = self._rdb.engine
        return engine

    def _check_tables(self) -> None:
        for table in _META.sorted_tables:
            columns = inspect(self._engine).get_columns(table.name)
            theirs = {column["name"] for column in columns}
            if theirs != set(table.columns.keys()):
                raise StudyError(
                    f"{self.storage.name} was made by another version of mergesearch (table "
                    f"{table.name} has {', '.join(sorted(theirs))}); choose another --out"
                )

    def _reconnect(self, dialect: Any, record: Any, args: Any, options: Any) -> Any:  # noqa: ARG002
        """Wait for a server that was there before."""
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
        """Do what goes on from what is stored; once more when a broken connection ended it.

        Raises:
            Stopped: The database cannot go on.
        """
        for _ in range(RECONNECTS):
            try:
                return attempt()
            except DATABASE_ERRORS as error:
                cause = _cause(error)
                if not isinstance(cause, OperationalError | InterfaceError | InternalError):
                    raise
                stopped = Interrupted(f"{self.storage.name}: {_reason(error)}")
                if not cause.connection_invalidated:
                    raise stopped from error
                self._say(f"{stopped}; going on with what was stored before")
        raise stopped

    def study(self) -> Study:
        """The run's study, made if there is none."""
        return optuna.create_study(
            storage=self._rdb,
            study_name=self.storage.study,
            direction="maximize",
            load_if_exists=True,
        )

    def items(self) -> list[FrozenItem]:
        """The items of the study, as they were asked from the first; none before that."""
        columns = [_ITEMS.c[field.name] for field in fields(FrozenItem)]
        mine = select(*columns).where(_ITEMS.c.study == self._study)
        with self._engine.connect() as connection:
            rows = connection.execute(mine.order_by(_ITEMS.c.place))
            return [FrozenItem(**row._mapping) for row in rows]

    def save_items(self, items: Sequence[FrozenItem]) -> None:
        """Store the items of the study, all or none."""
        rows = [
            {"study": self._study, "place": place, **asdict(item)}
            for place, item in enumerate(items)
        ]
        with self._engine.begin() as connection:
            connection.execute(_ITEMS.insert(), rows)

    def answers(self, recipe: str, split: str) -> Mapping[int, list[ItemResult]]:
        """The blocks of a split that a recipe has answered, by block number."""
        wanted = select(_ANSWERS).where(
            _ANSWERS.c.study == self._study, _ANSWERS.c.recipe == recipe, _ANSWERS.c.split == split
        )
        with self._engine.connect() as connection:
            rows = connection.execute(wanted.order_by(_ANSWERS.c.block))
            return {row.block: _loaded(row) for row in rows}

    def blocks(self, recipe: str, split: str) -> set[int]:
        """The numbers of those blocks."""
        wanted = select(_ANSWERS.c.block).where(
            _ANSWERS.c.study == self._study, _ANSWERS.c.recipe == recipe, _ANSWERS.c.split == split
        )
        with self._engine.connect() as connection:
            return set(connection.execute(wanted).scalars())

    def save(
        self, recipe: str, split: str, block: int, answers: Sequence[ItemResult], seconds: float
    ) -> None:
        """Store one finished block, in one transaction."""
        row: dict[str, Any] = {
            "study": self._study,
            "recipe": recipe,
            "split": split,
            "block": block,
            "items": len(answers),
            "answers": json.dumps([answer.value for answer in answers]),
            "margins": json.dumps([answer.margin for answer in answers]),
            "faults": json.dumps([answer.fault for answer in answers]),
            "tokens": json.dumps([answer.tokens for answer in answers]),
            "seconds": seconds,
        }
        with self._engine.begin() as connection:
            connection.execute(_ANSWERS.insert().values(**row))

    def recipes(self, split: str) -> set[str]:
        """Keys of the recipes that have answered some of a split."""
        asked = select(_ANSWERS.c.recipe).distinct()
        mine = asked.where(_ANSWERS.c.study == self._study, _ANSWERS.c.split == split)
        with self._engine.connect() as connection:
            return set(connection.execute(mine).scalars())

    def scored(self) -> tuple[Mapping[str, int], float]:
        """Item evaluations of each split so far, and the seconds they all took."""
        sums = (func.sum(_ANSWERS.c["items"]), func.sum(_ANSWERS.c.seconds))
        mine = select(_ANSWERS.c.split, *sums).where(_ANSWERS.c.study == self._study)
        with self._engine.connect() as connection:
            rows = connection.execute(mine.group_by(_ANSWERS.c.split)).all()
        return Counter({row[0]: int(row[1]) for row in rows}), sum(row[2] for row in rows)


def _loaded(row: Any) -> list[ItemResult]:
    """One answer per item of a block."""
    columns = (row.answers, row.margins, row.faults, row.tokens)
    return [ItemResult(*parts) for parts in zip(*map(json.loads, columns), strict=True)]
