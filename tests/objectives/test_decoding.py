"""Texts written in slots are those that are written alone, whatever shares the loop with them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_reference import fast, prompts, stock, texts
from objectives.inference.decoding import capture_for, captures
from objectives.inference.decoding_plan import Continuation, StopCriteria
from objectives.inference.nan_watch import NanError
from tiny_models import make_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ours():
    return fast(make_model())


def mixed():
    """Requests of three tasks: other stop strings, other limits, none."""
    return [
        *prompts(8),
        *prompts(8, until=["e", " d"], max_gen_toks=25),
        *prompts(8, until=[], max_gen_toks=3),
    ]


def test_texts_of_tasks_with_other_settings_are_written_in_one_loop_as_lm_eval_writes_them(ours):
    passes = []
    hook = ours.model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = ours.generate_counted(mixed())
    together = len(passes)
    apart = [one for task in range(3) for one in ours.generate_counted(mixed()[8 * task :][:8])]
    hook.remove()
    assert found == apart
    assert together < 0.9 * (len(passes) - together)
    assert [text for text, _ in found] == texts(stock(ours.model), mixed())
    assert len({count for _, count in found}) == 5


@pytest.mark.parametrize("captured", [False, True])
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 7), limits=st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_rows_refilled_as_texts_end_give_the_texts_of_prompts_alone(ours, captured, rows, limits):
    lengths = [3 + 5 * number % 17 for number in range(len(limits))]
    wanted = [
        Continuation(tuple(range(5, 5 + length)), StopCriteria(limit, ("c",), 3))
        for length, limit in zip(lengths, limits, strict=True)
    ]
    ours.use_modes(replace(ours.modes, captured=captured))
    decoder = ours.decoder
    alone = [decoder.decode(decoder.plan([one]))[0] for one in wanted]
    decoder.most_rows = rows
    plan = decoder.plan(wanted)
    decoder.most_rows = None
    assert all(pool.rows <= rows for pool in plan.pools)
    assert decoder.decode(plan) == alone


def test_short_texts_do_not_wait_for_the_slots_of_long_ones(ours):
    short, long = StopCriteria(4), StopCriteria(200)
    few = [Continuation((5, 6, 7), long)] * 2 + [Continuation((5, 6, 7), short)] * 3
    many = [Continuation((5, 6, 7), long)] * 40 + [Continuation((5, 6, 7), short)] * 40
    ours.runner.held_bytes = 2030 * ours.runner.bytes_per_token  # ten long texts
    try:
        assert [pool.rows for pool in ours.decoder.plan(few).pools] == [5]
        assert [pool.rows for pool in ours.decoder.plan(many).pools] == [10, 40]
    finally:
        ours.runner.held_bytes = None


def test_batches_hold_as_many_texts_as_bytes_allow(ours):
    wanted = [Continuation((5, 6, 7), StopCriteria(97))] * 30
    one = ours.runner.bytes_per_token
    assert one == 2 * 2 * 2 * 8 * 4, "layers, keys and values, heads, numbers, bytes"
    for texts_at_once in (1, 4, 30):
        ours.runner.held_bytes = 100 * one * texts_at_once
        (pool,) = ours.decoder.plan(wanted).pools
        assert pool.rows == texts_at_once
        assert sum(len(batch.prompts) for batch in pool.batches) == 30
        assert all(len(batch.prompts) <= pool.rows for batch in pool.batches)
    ours.runner.held_bytes = None


def test_storage_of_captured_passes_is_kept_and_cleared_between_candidates():
    ours = fast(make_model())
    expected = texts(ours, mixed())
    ours.use_modes(replace(ours.modes, captured=True))
    assert texts(ours, mixed()) == expected
    kept = ours.decoder.kept
    own = {name: weight.clone() for name, weight in ours.model.state_dict().items()}
    with torch.no_grad():
        for weight in ours.model.parameters():
            weight.fill_(float("nan"))
    with pytest.raises(NanError):
        texts(ours, mixed())
    ours.model.load_state_dict(own)
    assert texts(ours, mixed()) == expected
    assert ours.decoder.kept is kept
    ours.decoder.release()
    assert ours.decoder.kept is None


def test_a_window_that_slides_is_written_without_slots():
    model = make_model("Mistral")  # its window is 48
    ours = fast(model)
    wanted = [Continuation((5,) * 30, StopCriteria(limit)) for limit in (10, 30)]
    plan = ours.decoder.plan(wanted)
    assert [len(pool.batches) for pool in plan.pools] == [1]
    assert len(plan.batches) == 1
    assert texts(ours, prompts(8, max_gen_toks=40)) == texts(
        stock(model), prompts(8, max_gen_toks=40)
    )


def test_passes_are_captured_on_one_gpu_alone(ours):
    assert not captures(ours.runner)
    assert capture_for(CPU)(abs) is abs
    runner = fast(make_model()).runner
    runner.device = torch.device("cuda")
    assert captures(runner)
    runner.spans_devices = True
    assert not captures(runner)
