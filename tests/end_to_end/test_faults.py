"""Faults of the machine: full and read-only disks, broken files, no network."""

import os
import sqlite3
import subprocess
import threading

import pytest

from search.cli import main
from search.running.workers import LocalWorker
from search.storing.address import CONNECT_OPTIONS
from search.storing.folder import DATABASE
from search.storing.store import Store
from search.storing.trials import TrialLog

AGAIN = "repeat the command to continue"


@pytest.fixture(scope="module")
def study(make_study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return make_study(folder, search__trials=6, search__methods=["task_arithmetic"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk, leave):
    """Take all of a disk's room but so many bytes."""
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - leave))


def command(study, run, *options):
    return ["run", str(study), "--out", str(run), "--device", "cpu", *options]


def told(run):
    trials = TrialLog(Store(run / DATABASE).study()).complete()
    return [(trial.point, trial.value) for trial in trials]


def test_full_disk_stops_search_and_export_and_loses_nothing(study, small_disk, tmp_path, capsys):
    run = small_disk / "run"
    fill(small_disk, 300_000)
    assert main(command(study, run)) == 1  # the checkpoint takes more
    error = capsys.readouterr().err
    assert f"{run / 'checkpoint'}: No space left on device" in error
    assert AGAIN in error
    assert error.count("mergesearch:") == 1
    assert not list(run.glob("checkpoint*"))
    before = told(run)
    assert len(before) == 6
    (small_disk / "filler").unlink()
    fill(small_disk, 4096)
    assert main(command(study, run, "--trials", "60")) == 1
    error = capsys.readouterr().err
    assert f"{run / DATABASE}: database or disk is full" in error
    assert AGAIN in error
    (small_disk / "filler").unlink()
    assert main(command(study, run, "--trials", "8")) == 0
    assert told(run)[:6] == before
    assert (run / "checkpoint" / "model.safetensors").is_file()


@pytest.mark.parametrize("pages", [1, 3, 4, 8, 16, 40])
def test_run_that_ends_on_a_disk_with_a_few_pages_goes_on_when_there_is_room(
    study, small_disk, pages, capsys
):
    fill(small_disk, 4096 * pages)
    run = small_disk / "run"
    assert main(command(study, run, "--trials", "2")) == 1
    error = capsys.readouterr().err
    assert error.startswith("mergesearch: ")
    assert error.count("\n") == 1
    assert AGAIN in error
    (small_disk / "filler").unlink()
    assert main(command(study, run, "--trials", "2")) == 0
    assert len(told(run)) == 2
    assert not [path for path in run.rglob("*") if "partial" in path.name]


def test_full_disk_of_the_cache_is_done_without_and_of_the_output_leaves_nothing(
    zoo, small_disk, tmp_path, monkeypatch, capsys
):
    recipe = tmp_path / "recipe.yaml"
    models = f"base_model: {zoo / 'base'}\nmodels: [{{model: {zoo / 'a'}}}]\n"
    recipe.write_text(f"merge_method: ties\nparameters: {{weight: 1.0, density: 0.5}}\n{models}")
    monkeypatch.setattr("merge_engine.models.measurements.CACHED_FROM", 0)
    monkeypatch.setenv("MERGESEARCH_CACHE", str(small_disk / "cache"))
    fill(small_disk, 8192)
    assert main(["build", str(recipe), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["build", str(recipe), str(small_disk / "out")]) == 1
    assert f"{small_disk / 'out'}: No space left on device" in capsys.readouterr().err
    assert not list(small_disk.glob("out*"))


def test_disk_without_room_for_a_folder_is_exit_1_and_one_line(
    study, zoo, small_disk, tmp_path, capsys
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {zoo / 'a'}}}]\n")
    full = ["mount", "-o", "remount,nr_inodes=1", small_disk]
    subprocess.run(full, check=True)
    build = ["build", str(recipe), str(small_disk / "merged")]
    for arguments in (command(study, small_disk / "run"), build):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert "No space left on device" in error
        assert error.count("\n") == 1
    assert not list(small_disk.iterdir())


def test_locked_database_is_waited_for_and_then_the_run_stops(study, tmp_path, monkeypatch, capsys):
    run, ask, asked = tmp_path / "run", LocalWorker.next, []

    def next_of(worker):
        asked.append(0)
        if len(asked) in (4, 8):
            lock = sqlite3.connect(run / DATABASE, check_same_thread=False, isolation_level=None)
            lock.execute("begin exclusive")
            seconds = 0.5 if len(asked) == 4 else 4.0  # the run waits for two
            threading.Timer(seconds, lock.close).start()
        return ask(worker)

    monkeypatch.setitem(CONNECT_OPTIONS, "sqlite", {"timeout": 2})
    monkeypatch.setattr(LocalWorker, "next", next_of)
    assert main(command(study, run)) == 1
    assert len(asked) == 8
    error = capsys.readouterr().err
    assert f"{run / DATABASE}: database is locked" in error
    assert AGAIN in error
    assert error.count("mergesearch:") == 1
    monkeypatch.setattr(LocalWorker, "next", ask)
    monkeypatch.setitem(CONNECT_OPTIONS, "sqlite", {"timeout": 60})
    assert main(command(study, run)) == 0
    assert len(told(run)) == 6


def test_read_only_folder_is_exit_2_and_one_line(study, small_disk, capsys):
    remount = ["mount", "-o", "remount,ro", small_disk]
    subprocess.run(remount, check=True)
    assert_refused(study, small_disk / "run", "Read-only file system; choose another", capsys)


def test_folder_that_is_a_file_is_exit_2_and_one_line(study, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert_refused(study, tmp_path / "run", "File exists; choose another folder", capsys)


def test_broken_database_is_exit_2_and_one_line(study, tmp_path, capsys):
    (tmp_path / DATABASE).write_bytes(b"nothing that SQLite knows" * 100)
    assert_refused(study, tmp_path, "file is not a database; choose another folder", capsys)


def test_model_that_the_hub_cannot_give_is_exit_2_and_one_line(make_study, tmp_path, capsys):
    study = make_study(tmp_path, base_model="nobody/nothing")
    assert_refused(study, tmp_path / "run", "model 'nobody/nothing': no such folder", capsys)


def assert_refused(study, run, message, capsys):
    assert main(command(study, run)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
