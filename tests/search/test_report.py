"""The page of a run: that it stands alone, says what was found and lets nothing through."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import load_file, save_file

import search.session
from search.cli import main
from search.running.workers import LocalWorker
from search.showing.report import make_report
from search.storing.folder import DATABASE, locked
from search.storing.result import Result, read_result
from search.storing.samples import read_samples
from search.storing.store import Store
from search.wording import printable_lines

VOID = {"br", "hr", "img", "input", "link", "meta"}
SCRIPT = "<script>alert(1)</script>"


class ReportPage(HTMLParser):
    """What is on a page, and whether its elements are closed in the order they were opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.words, self.outside = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.outside += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def drawn(run):
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    page = ReportPage(text)
    assert not page.outside
    assert "url(" not in text
    assert "@import" not in text
    assert page.seen.count("script") == 1  # our own
    return page


@pytest.fixture(scope="module")
def finished(make_study, zoo, tmp_path_factory):
    """A run for the front, under a floor, with failed trials and prompts that are HTML."""
    folder = tmp_path_factory.mktemp("finished")
    large = shutil.copytree(zoo / "c", folder / "large")
    tensors = load_file(large / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1000.0)
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    study = make_study(
        folder,
        models=[str(zoo / "a"), str(large)],
        dtype="float16",  # in which 100 times the large one is infinite
        search__scale=[0, 100],
        search__trials=20,
        search__front=True,
        objective__constraints={"tell": 0.01},
    )
    for rows in (folder / "tasks").glob("*.jsonl"):
        text = rows.read_text().replace('"question": "', f'"question": "{SCRIPT}')
        rows.write_text(text)
    assert main(["run", str(study), "--out", str(folder / "run"), "--device", "cpu"]) == 0
    return folder / "run"


def test_page_is_there_while_a_run_goes_on_and_its_failure_stops_nothing(
    make_study, tmp_path, monkeypatch, capsys
):
    study, run = make_study(tmp_path, search__trials=3), tmp_path / "run"
    seen, draw = [], search.session.make_report

    def drawing(folder, store):
        seen.append((folder / "report.html").is_file())
        if len(seen) == 2:
            raise KeyError("no such thing")
        return draw(folder, store)

    monkeypatch.setattr(search.session, "make_report", drawing)
    monkeypatch.setattr(search.session, "REPORT_EVERY", 0.0)
    monkeypatch.setattr(search.session, "SHOWING_SHARE", 1e9)
    assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 0
    assert seen == [False, True, True, True]
    out = capsys.readouterr().out
    assert "there is no report.html: 'no such thing'" in out
    assert "report.html, checkpoint/" in out
    assert "The winner is" in (run / "report.html").read_text()


def test_report_stands_alone_and_says_what_was_found(finished):
    page = drawn(finished)
    result = Result.model_validate_json((finished / "result.json").read_text())
    assert result.verdict_text in page.text
    for name in ("base", "a", "large", "uniform", "winner", "pick", "tell"):
        assert name in page.words
    for difference in (
        result.base.difference,
        *(donor.difference for donor in result.donors.values()),
    ):
        assert f"{100 * difference.mean:+.1f} [{100 * difference.ci95[0]:+.1f}" in page.text
    assert result.front
    assert all(f"trial {one.trial}" in page.text for one in result.front)
    assert (finished / "recipe.yaml").read_text().strip() in "".join(page.words)


def test_text_of_tasks_is_escaped(finished):
    assert SCRIPT in drawn(finished).text
    assert SCRIPT not in (finished / "report.html").read_text()


def test_items_gained_less_those_lost_are_the_lead_over_the_best_donor(finished):
    words = drawn(finished).text.partition("gained lost equal")[2]
    result = Result.model_validate_json((finished / "result.json").read_text())
    best = result.donors[result.difference_to_best_donor.donor]
    for task, mean in result.winner.test.tasks.items():
        gained, lost, equal = map(int, re.search(rf"{task} (\d+) (\d+) (\d+)", words).groups())
        lead = mean - best.test.tasks[task]
        assert gained - lost == pytest.approx(lead * (gained + lost + equal))


def test_responses_of_the_models_are_on_the_page(finished):
    samples = read_samples(finished, read_result(finished))
    page = drawn(finished)
    assert page.text.count("Responses") == bool(samples)
    for sample in samples:
        assert sample.title in page.words
        for one in sample.responses:
            assert one.title in page.words
            assert printable_lines(one.text) in page.words or not one.text


def test_failed_trials_are_drawn_and_say_why(finished):
    page = drawn(finished)
    failed = json.loads((finished / "result.json").read_text())["failed_trials"]
    assert failed
    assert f"{failed} failed" in page.text
    assert (finished / "report.html").read_text().count('<circle class="failed"') == failed
    assert "has NaN or Inf" in page.text


def test_interrupted_run_and_one_of_one_trial_have_a_page(make_study, tmp_path, monkeypatch):
    study, run, left, ask = make_study(tmp_path), tmp_path / "run", [], LocalWorker.next

    def interrupted(self):
        left.append(left.pop() - 1)
        if not left[0]:
            raise KeyboardInterrupt
        return ask(self)

    monkeypatch.setattr(LocalWorker, "next", interrupted)
    command = ["run", str(study), "--out", str(run), "--device", "cpu"]
    for blocks in (3, 16):
        left[:] = [blocks]
        assert main(command) == 130
        done = [
            trial for trial in Store(run / DATABASE).study().trials if trial.state.is_finished()
        ]
        words = drawn(run).text
        assert f"The search has stopped: {len(done)} of at most 16 trials" in words
        with locked(run):
            assert f"The search goes on: {len(done)} of at most 16 trials" in drawn(run).text
        by_the_run_itself = make_report(run, Store(run / DATABASE))
        assert f"The search so far: {len(done)} of" in by_the_run_itself
        assert ("with a posterior mean of" in words) == (len(done) > 2)
        assert ("On the search items so far" in words) == (len(done) > 2)
        if len(done) > 2:
            table = words.partition("On the search items so far")[2].partition("this is no result")
            for name in ("base", "a", "b", "c", "uniform", "best so far"):
                items, score = re.search(rf" {name} (\d+) items (\d+\.\d) ± \d+", table[0]).groups()
                assert int(items) % 8 == 0
                assert 0 <= float(score) <= 100
            assert table[1]
        assert "On the test items" not in words
    left[:] = [-1]
    command[3] = str(tmp_path / "one")
    assert main([*command, "--timeout", "0.001s"]) == 0
    assert "The winner is" in drawn(tmp_path / "one").text


def test_run_that_goes_on_after_its_result_shows_both(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"trials": 3, "failed_trials": 0}))
    words = drawn(run).text
    assert "The search has stopped: 20 of at most 20 trials" in words
    assert "On the test items" in words


def test_report_of_no_run_or_of_another_version_is_exit_2(finished, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "result.json").write_text("{}")
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert "result.json is none of this version" in error
    assert error.count("\n") == 1
