"""Random changes of valid input at every border: it works, or is refused in one sentence."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

import fuzzing
from fuzzing import Fuzzer
from fuzzing_borders import BORDERS

INPUTS = 2  # of each border; tests/bench/fuzz.py tries thousands


@pytest.fixture(scope="module")
def fuzzer(zoo, tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzz"), zoo)


@pytest.mark.parametrize("border", BORDERS)
def test_changed_input_works_or_is_refused_in_one_sentence(border, fuzzer, monkeypatch):
    for module in ("encoding", "prompts", "task_factory"):
        monkeypatch.setattr(f"objectives.harness.{module}.TEMPLATE_SECONDS", 1.0)
    assert [found for n in range(INPUTS) if (found := fuzzer.run(border, n))] == []


def say(text, status=2):
    print(text, file=sys.stderr)
    return status


WRONG = {
    "traceback": lambda _: 1 // 0,
    "exit 1": lambda _: say("mergesearch: a fault of mergesearch", 1),
    "hangs": lambda _: time.sleep(60),
    "ends by SIGKILL": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "no single line": lambda _: say("mergesearch: study.yaml: wrong\nin two lines"),
    "names nothing": lambda _: say("mergesearch: something is wrong"),
    "prints on stderr": lambda _: say("UserWarning: a library's", 0),
    "leaves half": lambda _: Path("half").touch() or say("mergesearch: study.yaml: wrong"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_fuzzer_finds_each_kind_of_fault(kind, fuzzer, monkeypatch):
    monkeypatch.setattr(fuzzing, "main", WRONG[kind])
    monkeypatch.setattr(fuzzing, "SECONDS", 1)
    assert fuzzer.run("study", 0).kind == kind


def test_unknown_key_that_is_accepted_is_a_finding(fuzzer, monkeypatch):
    monkeypatch.setattr(fuzzing, "main", lambda _: 0)
    bad = next(n for n in range(99) if fuzzer.change("recipe", n)[1])
    assert fuzzer.run("recipe", bad).kind == "accepted"


def test_input_is_the_same_again(fuzzer):
    for border in BORDERS:
        first, again = (
            (fuzzer.change(border, 7), {p: c for p, (_, c) in fuzzing.tree(fuzzer.place).items()})
            for _ in range(2)
        )
        assert first == again, border
