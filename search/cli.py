"""The entry point: parse the command line, run the command, turn errors into exit codes."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from typing import TYPE_CHECKING, Any

from merge_engine.out_of_memory import is_out_of_memory
from search.arguments import COMMANDS, UsageError, parse
from search.options import Options
from search.process import (
    collector_paused,
    interrupted_by_sigterm,
    open_streams,
    quiet_libraries,
)

if TYPE_CHECKING:
    from search.running.events import Listener

STOPPED, BAD_INPUT, INTERRUPTED = 1, 2, 130
AGAIN = "repeat the command to continue"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done (also when the verdict is "not better"), 1 stopped by the machine (a full disk, a
        database that is gone) or by a fault of this program, 2 bad input, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    open_streams()
    try:
        with interrupted_by_sigterm():
            _run(*parse(argv))
    except UsageError as error:
        message, code = str(error), BAD_INPUT
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the terminal shows the keys
        message, code = f"stopped; {AGAIN}", INTERRUPTED
    except SystemExit:
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        message, code = _expected(error) or (_fault(error), STOPPED)
    else:
        return 0
    print(f"mergesearch: {message}", file=sys.stderr)
    if "--json" in argv:
        print(json.dumps({"event": "error", "message": message, "exit": code}))
    return code


def _run(command: str, options: Options) -> None:
    """Run a command, its libraries kept quiet from before they are imported."""
    try:
        os.getcwd()
    except FileNotFoundError:  # libraries would end the process
        raise UsageError("the current folder has been removed; change to another") from None
    with quiet_libraries(lambda text: listener(Note(text)), verbose=options.verbose):
        listener = _make_listener(json_lines=options.json)
        with collector_paused():
            from merge_engine.models.cache_folder import default_folder
            from merge_engine.models.statistics_cache import user_limit
            from search.running.events import Note

            default_folder(), user_limit()  # fail now, not in the middle of a search
            module = import_module(f"search.commands.{COMMANDS[command].module}")
        run: Callable[[Any, Listener], None] = getattr(module, command)
        # Tasks may print to stdout, which is for events alone.
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            run(options, listener)


def _make_listener(*, json_lines: bool) -> Listener:
    if json_lines:
        from search.showing.json_lines import JsonLines

        return JsonLines(sys.stdout)
    from rich.console import Console

    from search.showing.terminal import Terminal

    piped = not sys.stdout.isatty()  # no line breaks and no live view then
    return Terminal(Console(soft_wrap=piped, force_interactive=False if piped else None))


def _expected(error: BaseException) -> tuple[str, int] | None:
    """Return message and exit code of an expected error; None for a bug of this program."""
    if is_out_of_memory(error):  # first, for there may be none left to import by
        return f"there is not enough memory; with more, {AGAIN}", STOPPED
    from merge_engine.errors import FULL, MergeError
    from objectives.base import ObjectiveError, printable
    from search.storing.folder import Interrupted
    from search.study.spec import StudyError

    if isinstance(error, MergeError | ObjectiveError | StudyError):
        return printable(str(error)), BAD_INPUT  # it may quote a file's or a model's own words
    if isinstance(error, Interrupted):
        return f"{error}; when that is fixed, {AGAIN}", STOPPED
    if isinstance(error, OSError):
        return _of_system(error, full=error.errno in FULL)
    return _of_database(error)


def _of_system(error: OSError, *, full: bool) -> tuple[str, int] | None:
    where = f"{error.filename}: " if error.filename else ""
    if full:
        return f"{where}{error.strerror}; when there is space, {AGAIN}", STOPPED
    if error.errno == errno.ENAMETOOLONG:
        return f"{where[:100]}...: {error.strerror}; choose another", BAD_INPUT
    if error.errno in (errno.EACCES, errno.EROFS) and where:
        return f"{where}{error.strerror}; change its permissions", BAD_INPUT
    return None


def _of_database(error: BaseException) -> tuple[str, int] | None:
    if type(error).__module__.partition(".")[0] not in ("sqlalchemy", "optuna"):
        return None
    from objectives.base import printable
    from search.storing.address import DATABASE_ERRORS, is_transient, reason_of

    if not isinstance(error, DATABASE_ERRORS):
        return None
    what = f"the run's database: {printable(reason_of(error))}"
    if is_transient(error):
        return f"{what}; when that is fixed, {AGAIN}", STOPPED
    return f"{what}; restore it from a copy, or start over with --force-new", BAD_INPUT


def _fault(error: BaseException) -> str:
    """Write an unexpected error's traceback to a file, and return a message that names it."""
    from merge_engine.errors import reason
    from objectives.base import printable

    summary = printable(f"{type(error).__name__}: {reason(error)}")
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="mergesearch-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return f"a fault of mergesearch: {summary}; please report it"
    return f"a fault of mergesearch: {summary}; please report it with {file.name}"


if __name__ == "__main__":
    sys.exit(main())
