"""Runs stored in a file or on a server, which may go away, and which other runs use as well."""

import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, event

from landscape import planted
from objectives.base import ItemResult
from postgresql import PASSWORD, running
from search.cli import main
from search.running.search_loop import search
from search.running.workers import LocalWorker
from search.storing.address import Storage
from search.storing.folder import DATABASE, REMEMBERED
from search.storing.store import Store
from search.storing.trials import TrialLog
from simulated import simulated_context, simulated_run


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def study(make_study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return make_study(folder, search__trials=8, search__methods=["task_arithmetic"])


@pytest.fixture(scope="module")
def undisturbed(study, tmp_path_factory):
    """The folder of a run with a file of its own."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(command(study, run)) == 0
    return run


def command(study, run, *options):
    return ["run", str(study), "--out", str(run), "--device", "cpu", *options]


def outcome(run, url=None):
    """Return all complete trials, and all results on search items."""
    store = Store(Storage.of(run, url))
    trials = TrialLog(store.study()).complete()
    answers = {key: store.results(key, "search") for key in store.recipes("search")}
    return [(trial.number, trial.point, trial.value) for trial in trials], answers


def after(monkeypatch, blocks, what):
    """Have something happen once, before the block of this number is evaluated."""
    begun, evaluate = [], LocalWorker.next

    def next_of(self):
        begun.append(0)
        if len(begun) == blocks:
            what()
        return evaluate(self)

    monkeypatch.setattr(LocalWorker, "next", next_of)


def lost_in_a_transaction(server):
    """Have the server end the session that is about to store the eighth block."""
    seen = []

    def end(connection, cursor, statement, *_):
        seen.append(statement.startswith("INSERT INTO mergesearch_answers"))
        if seen[-1] and sum(seen) == 8:
            with psycopg.connect(server.url().replace("+psycopg", "")) as other:
                pid = connection.connection.dbapi_connection.info.backend_pid
                other.execute("select pg_terminate_backend(%s, 5000)", [pid])

    event.listen(Engine, "before_cursor_execute", end)
    return end


def test_run_on_a_server_that_goes_and_comes_is_as_on_a_file(
    study, undisturbed, server, tmp_path, monkeypatch, capfd
):
    run = tmp_path / "run"
    after(monkeypatch, 12, lambda: signal.raise_signal(signal.SIGINT))
    listener = lost_in_a_transaction(server)
    try:
        assert main(command(study, run, "--storage", server.url())) == 130
    finally:
        event.remove(Engine, "before_cursor_execute", listener)
    assert "going on with what was stored before" in capfd.readouterr().out
    assert not any(PASSWORD in file.read_text() for file in run.iterdir())
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    after(monkeypatch, 4, lambda: server.control("restart", "-m", "immediate"))
    assert main(command(study, run)) == 0
    assert not (run / DATABASE).exists()
    assert outcome(run) == outcome(undisturbed)
    assert (run / "recipe.yaml").read_text() == (undisturbed / "recipe.yaml").read_text()


def test_run_whose_server_stays_away_stops_and_goes_on_later(
    study, undisturbed, server, tmp_path, monkeypatch, capfd
):
    run = tmp_path / "run"
    monkeypatch.setattr("search.storing.store.PAUSES", (0.1, 0.1))
    after(monkeypatch, 6, lambda: server.control("stop", "-m", "immediate"))
    options = ("--storage", server.url())
    try:
        assert main(command(study, run, *options)) == 1
    finally:
        server.control("start")
    out, error = capfd.readouterr()
    assert out.count("waiting for it") == 1
    assert "is gone: connection failed" in error
    assert "repeat the command to continue" in error
    assert PASSWORD not in out + error
    assert main(command(study, run, *options)) == 0
    decisions, _ = outcome(run, server.url())
    assert decisions == outcome(undisturbed)[0]


def test_studies_in_one_database_do_not_mix(server):
    one, other = (Store(Storage.of(folder, server.url())) for folder in map(_folder, "ab"))
    one.save("recipe", "search", {0: [ItemResult(1.0), ItemResult(0.0)]}, 3.0)
    other.save("recipe", "search", {0: [ItemResult(0.5)]}, 1.0)
    other.save("another", "test", {2: [ItemResult(0.5)]}, 1.0)
    one.study().enqueue_trial({})
    assert [len(store.study().trials) for store in (one, other)] == [1, 0]
    assert one.results("recipe", "search") == {0: [ItemResult(1.0), ItemResult(0.0)]}
    assert one.evaluations() == ({"search": 2}, {"search": 3.0})
    counts, seconds = other.evaluations()
    assert counts == {"search": 1, "test": 1}
    assert sum(seconds.values()) == 2.0
    assert one.recipes("test") == set()
    assert other.recipes("test") == {"another"}


def test_runs_that_begin_at_once_in_one_new_database_are_each_as_on_a_file(server, tmp_path):
    with psycopg.connect(server.url().replace("+psycopg", ""), autocommit=True) as admin:
        admin.execute("create database shared")
    url = server.url(database="shared")
    counts = {"search": 40, "select": 20, "test": 20}
    context = simulated_context(planted(0), 0, counts, search={"trials": 12})

    def begin(folder, url=None):
        folder.mkdir()
        run = simulated_run(folder, context, store=Store(Storage.of(folder, url)))
        search(run)
        answers = {key: run.store.results(key, "search") for key in run.store.recipes("search")}
        return [(one.number, one.point, one.value) for one in run.log.complete()], answers

    alone = begin(tmp_path / "alone")
    with ThreadPoolExecutor(2) as at_once:
        both = [*at_once.map(lambda name: begin(tmp_path / name, url), "ab")]
    assert both == [alone, alone]


def test_stores_opened_at_once_make_the_tables_once(server):
    with psycopg.connect(server.url().replace("+psycopg", ""), autocommit=True) as admin:
        admin.execute("create database raced")
    url = server.url(database="raced")
    with ThreadPoolExecutor(4) as at_once:
        storages = [Storage.of(_folder(name), url) for name in "abcd"]
        stores = list(at_once.map(Store, storages))
    assert len({store.storage.study for store in stores}) == 4
    assert [store.items() for store in stores] == [[]] * 4  # all tables are there


def _folder(name):
    return Path("/nowhere") / name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"port": 1}, "connection failed: connection to server"),
        ({"password": "s3cret%3Fnot"}, 'password authentication failed for user "postgres"'),
        ({"database": "none"}, 'database "none" does not exist'),
    ],
)
def test_server_that_does_not_let_us_in_is_exit_2_and_one_line(
    study, server, tmp_path, capsys, wrong, message
):
    assert main(command(study, tmp_path / "run", "--storage", server.url(**wrong))) == 2
    error = capsys.readouterr().err
    assert error.startswith("mergesearch: postgresql+psycopg://postgres@127.0.0.1:")
    assert message in error
    assert error.count("\n") == 1
    assert "s3cret" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense:s3cret", "no URL of a database"),
        ("nosuch://me:s3cret@host/db", "no URL of a database"),
        ("sqlite://", "a database in memory keeps nothing"),
        ("postgresql://me:s3cret@host/db", "pip install 'mergesearch[postgresql]'"),
        ("mysql+pymysql://me:s3cret@host/db", "pip install pymysql"),
    ],
)
def test_url_that_cannot_be_used_is_exit_2_and_one_line(
    study, tmp_path, monkeypatch, capsys, url, message
):
    for driver in ("psycopg", "pymysql"):
        monkeypatch.setitem(sys.modules, driver, None)
    assert main(command(study, tmp_path / "run", "--storage", url)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "s3cret" not in error


def test_run_does_not_go_on_in_another_database(study, undisturbed, tmp_path, capsys):
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert main(command(study, undisturbed, "--storage", other)) == 2
    error = capsys.readouterr().err
    assert f"is in sqlite:///{undisturbed / 'study.db'}, and not in {other}" in error
    own = f"sqlite:///{undisturbed / 'study.db'}"
    assert main(command(study, undisturbed, "--storage", own)) == 0


def test_folder_remembers_its_storage_but_no_password(tmp_path):
    url = "postgresql://me:s3cret@host/db?password=s3cret&sslmode=require"
    named = Storage.of(tmp_path, url)
    named.remember(tmp_path)
    assert "s3cret" not in (tmp_path / REMEMBERED).read_text()
    known = Storage.of(tmp_path)
    assert known.study == named.study
    assert known.name == named.name == "postgresql://me@host/db?sslmode=require"
    assert Storage.of(tmp_path, url) == named
    assert Storage.of(tmp_path, new=True) == Storage.file(tmp_path / DATABASE)
