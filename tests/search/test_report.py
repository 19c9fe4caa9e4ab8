"""report.html: it stands alone, states the result and escapes untrusted text."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest

from landscape import planted
from search.cli import main
from search.pipeline import finish
from search.running.search_loop import search
from search.showing.report import make_report
from search.storing.folder import locked
from search.storing.result import read_result
from search.storing.samples import read_samples
from search.wording import printable_lines
from simulated import simulated_context, simulated_run

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


@pytest.fixture
def finished(simulated_folder, tmp_path):
    return shutil.copytree(simulated_folder, tmp_path / "finished")


def test_report_stands_alone_and_states_the_result(finished):
    page = drawn(finished)
    result = read_result(finished)
    assert result.verdict_text in page.text
    assert result.floors_text in page.text
    for name in ("base", "sort", "rev", "know", "uniform", "winner", "demo_inc"):
        assert name in page.words
    for difference in (
        result.base.difference,
        *(donor.difference for donor in result.donors.values()),
    ):
        assert f"{100 * difference.mean:+.1f} [{100 * difference.ci95[0]:+.1f}" in page.text
    assert result.front
    assert all(f"trial {one.trial}" in page.text for one in result.front)
    assert (finished / "checkpoint" / "mergekit_config.yml").read_text().strip() in "".join(
        page.words
    )


def test_text_of_tasks_is_escaped(finished):
    assert SCRIPT in drawn(finished).text
    assert SCRIPT not in (finished / "report.html").read_text()


def test_items_gained_less_those_lost_are_the_lead_over_the_best_donor(finished):
    words = drawn(finished).text.partition("gained lost equal")[2]
    result = read_result(finished)
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


def test_failed_trials_are_drawn_with_their_errors(finished):
    page = drawn(finished)
    failed = json.loads((finished / "result.json").read_text())["failed_trials"]
    assert failed
    assert f"{failed} failed" in page.text
    assert (finished / "report.html").read_text().count('<circle class="failed"') == failed
    assert "has NaN or Inf" in page.text


@pytest.mark.parametrize("trials", [1, 7])
def test_interrupted_run_has_a_page_without_a_result(tmp_path, trials):
    counts = {"search": 60, "select": 40, "test": 40}
    context = simulated_context(planted(0), 0, counts, search={"trials": 16})

    def interrupt(run):
        if len(run.log.finished()) == trials:
            raise KeyboardInterrupt

    run = simulated_run(tmp_path / "run", context)
    with pytest.raises(KeyboardInterrupt):
        search(run, after_trial=[interrupt])
    words = drawn(run.folder).text
    assert f"The search has stopped: {trials} of at most 16 trials" in words
    with locked(run.folder):
        assert f"The search is running: {trials} of at most 16 trials" in drawn(run.folder).text
    by_the_run_itself = make_report(run.folder, run.store)
    assert f"The search so far: {trials} of" in by_the_run_itself
    assert "On the test items" not in words
    assert ("with a posterior mean of" in words) == (trials > 2)
    assert ("On the search items so far" in words) == (trials > 2)
    if trials > 2:
        table = words.partition("On the search items so far")[2].partition("not a result")
        for name in ("base", "a", "b", "c", "uniform", "best so far"):
            items, score = re.search(rf" {name} (\d+) items (\d+\.\d) ± \d+", table[0]).groups()
            assert int(items) % 20 == 0
            assert 0 <= float(score) <= 100
        assert table[1]


def test_run_of_one_trial_has_a_page_with_its_result(tmp_path):
    counts = {"search": 60, "select": 40, "test": 40}
    context = simulated_context(planted(0), 0, counts, search={"trials": 1})
    run = simulated_run(tmp_path / "run", context)
    finish(run, math.inf)
    assert "The winner is" in drawn(run.folder).text


def test_run_that_goes_on_after_its_result_has_both_on_its_page(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"trials": 3, "failed_trials": 0}))
    words = drawn(run).text
    assert "The search has stopped: 24 of at most 24 trials" in words
    assert "On the test items" in words


def test_report_of_no_run_or_of_another_version_is_exit_2(finished, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "result.json").write_text("{}")
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert "result.json is not valid in this version" in error
    assert error.count("\n") == 1
