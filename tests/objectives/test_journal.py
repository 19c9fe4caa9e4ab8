"""A job that is stopped at any pass goes on from there, with the same results."""

import json
import stat
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from objectives import journal as module
from objectives.base import ObjectiveError
from objectives.journal import Journal
from tiny_models import make_model
from tiny_tasks import TASKS, everything, prepare


class StoppedError(Exception):
    pass


def scored(harness, file, stop_at=None):
    """Score all items, with a journal or without; return the results and the tokens of passes."""
    passes = []

    def count(_model, args, kwargs):
        tokens = args[0] if args else kwargs["input_ids"]
        passes.append(tokens.numel())
        if len(passes) == stop_at:
            raise StoppedError

    model = harness.language_model.model
    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with (
            Journal.opened(file) as journal,
            pytest.raises(StoppedError) if stop_at else nullcontext(),
        ):
            return harness.score(model, everything(harness), journal), passes
    finally:
        hook.remove()
    return None, passes


def lines(file):
    return [json.loads(line.partition(b" ")[2]) for line in file.read_bytes().splitlines()]


def count(file):
    """Count the log-likelihoods and tokens in a journal."""
    return sum(len(numbers) for line in lines(file) for _, numbers, _ in line)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])  # the latter writes texts without slots
def test_job_goes_on_from_the_pass_at_which_it_was_stopped(folder, tmp_path, name, monkeypatch):
    monkeypatch.setattr(module, "LINE", 1)
    harness = prepare(folder, make_model(name), *TASKS)
    expected, whole = scored(harness, None)
    assert scored(harness, tmp_path / "whole") == (expected, whole)
    prefixes = len(whole) - len(lines(tmp_path / "whole"))
    assert 0 <= prefixes < 3, "passes that answer nothing"
    for number in range(1, len(whole) + 1, 2):
        file = tmp_path / str(number)
        scored(harness, file, number)
        before = lines(file)
        assert 0 <= number - 1 - len(before) <= prefixes, "all but the pass under way"
        assert scored(harness, file)[0] == expected
        assert lines(file)[: len(before)] == before
        assert count(file) == count(tmp_path / "whole"), "nothing twice"
        assert scored(harness, file) == (expected, [])


def test_tokens_that_wait_to_be_written_are_fewer_than_those_of_a_line(
    folder, tmp_path, model, monkeypatch
):
    monkeypatch.setattr(module, "LINE", 50)
    harness = prepare(folder, model, "answer")
    expected, whole = scored(harness, None)
    for number in range(2, len(whole) + 1):
        file = tmp_path / str(number)
        scored(harness, file, number)
        written = count(file)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "LINE", 1)
            scored(harness, tmp_path / f"{number}-all", number)
        assert 0 <= count(tmp_path / f"{number}-all") - written < 50
        assert scored(harness, file)[0] == expected


def test_no_token_of_logits_that_are_nan_is_noted(folder, tmp_path, model):
    harness = prepare(folder, model, "answer")
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    with Journal.opened(tmp_path / "job") as journal, pytest.raises(ObjectiveError, match="NaN"):
        harness.score(model, everything(harness), journal)
    assert lines(tmp_path / "job") == []


ADDED = st.lists(st.dictionaries(st.integers(0, 9), st.integers(0, 50_000), min_size=1), max_size=9)


@given(ADDED, st.data())
def test_what_is_read_is_what_was_noted_up_to_a_line_that_is_not_whole(
    tmp_path_factory, added, data
):
    file = tmp_path_factory.mktemp("job") / "journal"
    with pytest.MonkeyPatch.context() as patch, Journal.opened(file) as journal:
        patch.setattr(module, "LINE", 1)
        states = [(0, {}, {})]
        for tokens in added:
            journal.add_tokens([*tokens], [*tokens.values()])
            journal.add_logliks({n: (-token / 7, n % 2 == 0) for n, token in tokens.items()})
            texts = {n: [*text] for n, text in journal.texts.items()}
            states.append((file.stat().st_size, texts, {**journal.logliks}))
    written = file.read_bytes()
    with Journal.opened(file) as again:
        assert (again.texts, again.logliks) == states[-1][1:]
    cut = data.draw(st.integers(0, len(written)))
    file.write_bytes(written[:cut] + data.draw(st.sampled_from([b"", b"\0", b"7\n"])))
    with Journal.opened(file) as again:
        _, texts, logliks = [state for state in states if state[0] <= cut][-1]
        assert again.logliks == logliks
        for number, text in again.texts.items():
            assert len(text) - len(texts.get(number, [])) in (0, 1), "tokens have a line first"
            assert text[: len(texts.get(number, []))] == texts.get(number, [])
    assert written.startswith(file.read_bytes())


def test_process_that_is_not_dead_yet_writes_no_line_into_the_next_ones_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LINE", 1)
    first = Journal(tmp_path / "job")
    first.add_tokens([0], [5])
    with Journal.opened(tmp_path / "job") as second:
        first.add_tokens([0], [6])
        second.add_tokens([0], [7])
    first.close()
    with Journal.opened(tmp_path / "job") as read:
        assert read.texts == {0: [5, 7]}
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_journal_is_private_and_done_without_where_it_cannot_be_written(tmp_path):
    Journal(tmp_path / "folder" / "job").close()
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "folder" / "job").stat().st_mode) == 0o600
    with Journal.opened(tmp_path / "folder" / "job" / "none") as journal:
        journal.add_tokens([3], [4])
        assert journal.texts == {3: [4]}
    with Journal.opened(None) as none:
        assert none is None
