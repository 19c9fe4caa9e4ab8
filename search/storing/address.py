"""The address of a run's database, and the meaning of its driver's errors.

A run's database is a file in its folder or, with ``--storage``, one that several runs share. The
folder then remembers its URL, without a password, and the study's name in it.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self

from optuna.exceptions import StorageInternalError
from pydantic import ValidationError
from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from merge_engine.replacing import replace_text
from merge_engine.schema import FrozenModel
from search.storing.folder import DATABASE, REMEMBERED, Interrupted
from search.study.spec import StudyError

# So that a lost server is noticed instead of blocking the run.
_NETWORK = {"connect_timeout": 10, "keepalives_idle": 30, "tcp_user_timeout": 60_000}
CONNECT_OPTIONS: Final[Mapping[str, dict[str, int]]] = {
    "sqlite": {"timeout": 60},  # seconds another program may hold its lock
    "psycopg": _NETWORK,
    "psycopg2": _NETWORK,
}
DATABASE_ERRORS: Final = (DBAPIError, StorageInternalError)
_SECRET: Final = re.compile(r"pass|pwd|secret|token|key|cred|auth", re.IGNORECASE)


class _Remembered(FrozenModel):
    """Contents of REMEMBERED."""

    url: str
    study: str


@dataclass(frozen=True)
class Storage:
    """The address of a run's study: a database's URL, and the study's name in it."""

    url: URL
    study: str = "mergesearch"

    @classmethod
    def file(cls, file: Path) -> Self:
        """Address a database that is a file of its own."""
        return cls(URL.create("sqlite", database=str(file.absolute())))

    @classmethod
    def of(cls, folder: Path, url: str | None = None, *, new: bool = False) -> Self:
        """Address a run folder's study: the one it remembers, else the URL's, else a file in it.

        With ``new``, what the folder remembers is ignored.

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
                "--storage away, choose another --out, or start over with --force-new"
            )
        return own

    @classmethod
    def _remembered(cls, folder: Path) -> Self | None:
        if (file := folder / REMEMBERED).is_file():
            try:
                known = _Remembered.model_validate_json(file.read_bytes())
                return cls(_parsed(known.url), known.study)
            except (ValidationError, StudyError):
                raise StudyError(
                    f"{file}: damaged: it has no database's url and study; restore it, or remove "
                    "it and start over with --force-new"
                ) from None
        return cls.file(folder / DATABASE) if (folder / DATABASE).exists() else None

    def remember(self, folder: Path) -> None:
        """Write the address into the run folder, without a password."""
        if self != self.file(folder / DATABASE):
            known = {"url": self.name, "study": self.study}
            replace_text(folder / REMEMBERED, json.dumps(known) + "\n", private=True)

    @property
    def name(self) -> str:
        """The URL without a password."""
        secrets = [key for key in self.url.query if _SECRET.search(key)]
        url = self.url.difference_update_query(secrets)
        parts = (url.username, None, url.host, url.port, url.database, url.query)
        return URL.create(url.drivername, *parts).render_as_string()

    @property
    def secrets(self) -> list[str]:
        """The password, and secrets among the URL's options, which must not be printed."""
        values = [value for key, value in self.url.query.items() if _SECRET.search(key)]
        return [str(each) for each in (self.url.password, *values) if each]

    @property
    def is_file(self) -> bool:
        """Whether the database is a file, without a server."""
        return self.url.get_backend_name() == "sqlite"

    def engine_options(self) -> dict[str, Any]:
        """Return the options that SQLAlchemy's engine is made with."""
        options = CONNECT_OPTIONS.get(self.url.get_driver_name(), {})
        if self.is_file:
            options = CONNECT_OPTIONS["sqlite"]
        return {"connect_args": options, "pool_pre_ping": not self.is_file}

    def check(self, run: Path) -> None:
        """Check that a server accepts a connection, or that a file's folder exists.

        The run folder itself need not exist: it will be made.
        """
        if self.is_file:
            folder = Path(str(self.url.database)).parent
            if not folder.is_dir() and folder != run.absolute():
                raise StudyError(f"--storage: {folder}: no such folder; make it, or name another")
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
        if "@" in f"{url.host}{url.database}":  # what is in front of it belongs to the password
            raise StudyError("--storage: write an @ in a user's name or a password as %40")
        return url
    if url.host or url.username:
        raise StudyError("--storage: SQLite has no hosts; it looks like sqlite:////folder/file.db")
    if url.database in (None, "", ":memory:"):
        raise StudyError("--storage: a database in memory keeps nothing; name a file")
    return url.set(database=str(Path(url.database).absolute()))


@contextmanager
def opening(storage: Storage) -> Iterator[None]:
    """Turn a driver's errors while a database is opened into one line.

    Raises:
        StudyError: The database cannot be used.
        Interrupted: Its disk is full, or another program has it locked.
    """
    try:
        yield
    except ImportError as error:
        ours = storage.url.get_driver_name() == "psycopg"
        module = getattr(error.__cause__ or error, "name", "")
        package = "'mergesearch[postgresql]'" if ours else module
        raise StudyError(f"{storage.name} needs a driver: pip install {package}") from None
    except RuntimeError as error:
        if "table schema" not in str(error):
            raise
        raise StudyError(
            f"{storage.name}: written by another version of Optuna than {version('optuna')}, or "
            "damaged; install that version, restore the database, or start over with --force-new"
        ) from None
    except DATABASE_ERRORS as error:
        what = _without(storage.secrets, reason_of(error))
        if is_transient(error):
            raise Interrupted(f"{storage.name}: {what}") from None
        to_do = (
            "choose another folder, or restore the file"
            if storage.is_file
            else "see to the URL, and the password ($PGPASSWORD and ~/.pgpass will do, too)"
        )
        raise StudyError(f"{storage.name}: {what}; {to_do}") from None


def _without(secrets: Iterable[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def cause_of(error: Exception) -> BaseException | None:
    """Return the driver's error that Optuna may have wrapped."""
    return error.__cause__ if isinstance(error, StorageInternalError) else error


def reason_of(error: Exception) -> str:
    """Return the first line of a driver's message."""
    cause = cause_of(error)
    return str(cause.orig if isinstance(cause, DBAPIError) else cause).splitlines()[0]


def is_transient(error: Exception) -> bool:
    """Return whether SQLite's file is intact, but its disk full or its lock held."""
    name = getattr(getattr(cause_of(error), "orig", None), "sqlite_errorname", "")
    return name.startswith(("SQLITE_FULL", "SQLITE_BUSY", "SQLITE_IOERR"))


def is_damage(error: Exception) -> bool:
    """Return whether SQLite's file is damaged."""
    name = getattr(getattr(cause_of(error), "orig", None), "sqlite_errorname", "")
    corrupt = name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))
    return corrupt or "Could not decode" in reason_of(error)
