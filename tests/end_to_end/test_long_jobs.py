"""A kill in the middle of a job of many blocks: what it loses, and that the same results come."""

import json
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress

import pytest
import yaml

from objectives.journal import Journal
from ray_actors import ray_workers
from search.cli import main
from search.storing.folder import DATABASE, JOURNALS

KINDS = {"choices": b'[["logliks"', "texts": b'[["tokens"'}  # beginning of lines


@pytest.fixture(scope="module")
def study(make_study, tmp_path_factory):
    """Jobs of 72 items, answered in small batches: choices, and texts of up to 40 tokens."""
    file = make_study(
        tmp_path_factory.mktemp("study"),
        search__trials=3,
        objective__tasks=[{"task": "pick", "weight": 2.0}, {"task": "tell"}],
        objective__items={"search": 9, "select": 3, "test": 72},
        objective__block=4,
        objective__batch_size=1,
    )
    written = file.parent / "tasks" / "tell.yaml"
    task = yaml.safe_load(written.read_text())
    task["generation_kwargs"] |= {"max_gen_toks": 40, "until": ["xyz"]}
    written.write_text(yaml.safe_dump(task))
    return file


def command(study, run):
    return ["run", str(study), "--out", str(run), "--device", "cpu"]


def finish(study, run):
    """Run a study to its end; count the log-likelihoods and tokens that are computed, by job."""
    counts = Counter()
    made, take = Journal.__init__, Journal._take

    def init(self, file):
        self.job = file.name
        made(self, file)
        counts[self.job] = 0  # what was read was not computed

    def count(self, kind, numbers, values):
        counts[self.job] += len(numbers)
        take(self, kind, numbers, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "__init__", init)
        patch.setattr(Journal, "_take", count)
        assert main(command(study, run)) == 0
    assert not (run / JOURNALS).exists()
    return counts


def answers_in(run):
    with sqlite3.connect(f"file:{run / DATABASE}?mode=ro", uri=True) as database:
        rows = "select recipe, split, block, answers, tokens, faults from mergesearch_answers"
        return sorted(database.execute(rows))


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    """Answers and counts of an undisturbed run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    counts = finish(study, run)
    return answers_in(run), counts


def in_the_middle(run, kind, process, besides=None):
    """Wait until some answers of a kind are in a job's journal; return the journal."""
    while process.poll() is None:
        for journal in {*(run / JOURNALS).glob("[!.]*")} - {besides}:
            with suppress(FileNotFoundError):  # its job has just ended
                if journal.read_bytes().count(KINDS[kind]) >= 2:
                    return journal
        time.sleep(0.0003)
    raise AssertionError("it has ended")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_before_a_kill_in_the_middle_of_a_job_are_not_asked_again(
    study, whole, tmp_path, kind
):
    answers, counts = whole
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-m", "search.cli", *command(study, run)]) as process:
        job = in_the_middle(run, kind, process)
        process.kill()
    assert process.returncode == -9
    lines = [json.loads(line.partition(b" ")[2]) for line in job.read_bytes().splitlines()]
    before = sum(len(numbers) for line in lines for _, numbers, _ in line)
    assert 0 < finish(study, run)[job.name] == counts[job.name] - before
    assert answers_in(run) == answers


def test_worker_in_place_of_a_killed_one_goes_on_in_the_middle_of_its_job(study, whole, tmp_path):
    run, job = tmp_path / "run", None
    words = [sys.executable, "-m", "search.cli", *command(study, run), "--workers", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        for kind in KINDS:
            job = in_the_middle(run, kind, process, besides=job)
            (worker,) = ray_workers(process)
            worker.kill()
            worker.wait()
            left, file = job.read_bytes(), job.stat().st_ino
            while process.poll() is None and job.stat().st_ino == file:
                time.sleep(0.0003)
            assert job.read_bytes().startswith(left)
        process.communicate()
    assert process.returncode == 0
    assert answers_in(run) == whole[0]
