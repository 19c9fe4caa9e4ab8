"""Slots: rows of their own lengths in one storage."""

import gc
import weakref

import torch
from transformers import DynamicCache

from lm_eval_reference import fast
from objectives.inference.slots import DecodingStep, SlotCache, run_again
from tiny_models import make_model

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1]


def read(model, prompts):
    """Read prompts padded on the right, as they are read before they are written."""
    cache = DynamicCache(config=model.config)
    longest = max(map(len, prompts))
    with torch.no_grad():
        model(
            torch.tensor([[*one, *[0] * (longest - len(one))] for one in prompts]),
            past_key_values=cache,
        )
    return cache


def agree(step, model, texts):
    logits = step([text[-1] for text in texts], [len(text) - 1 for text in texts])
    for row, text in zip(logits, texts, strict=True):
        assert torch.allclose(row, logits_of(model, text), atol=1e-4)


def test_rows_of_other_lengths_grow_move_and_are_taken_by_others():
    model = make_model()
    runner = fast(model).runner
    for capture in (None, run_again):
        step = DecodingStep(runner, SlotCache(rows=3, columns=40), capture)
        with torch.no_grad():
            step.cache.take(read(model, PROMPTS), [2, 0], first=0)
            texts = [[*PROMPTS[2], 20], [*PROMPTS[0], 21]]
            agree(step, model, texts)
            step.cache.take(read(model, PROMPTS), [1], first=2)
            texts = [[*text, 22] for text in texts] + [[*PROMPTS[1], 23]]
            agree(step, model, texts)
            step.cache.move({0: 2})  # the first text has ended
            texts = [[*texts[2], 24], [*texts[1], 25]]
            agree(step, model, texts)
            for token in range(26, 50):  # beyond what was read together
                texts = [[*text, token] for text in texts]
                agree(step, model, texts)


def test_what_a_slot_held_before_is_not_read():
    model = make_model()
    step = DecodingStep(fast(model).runner, SlotCache(rows=1, columns=20), run_again)
    with torch.no_grad():
        step.cache.take(read(model, [PROMPTS[0]]), [0], first=0)
        for layer in step.cache.layers:
            layer.keys.fill_(float("nan"))
            layer.values.fill_(float("nan"))
        step.cache.take(read(model, [PROMPTS[1]]), [0], first=0)
        agree(step, model, [[*PROMPTS[1], 20]])


def test_captured_passes_are_recorded_for_few_sizes():
    model, recorded = make_model(), []

    def capture(work):
        recorded.append(1)
        return work

    step = DecodingStep(fast(model).runner, SlotCache(rows=6, columns=30), capture)
    with torch.no_grad():
        step.cache.take(read(model, PROMPTS * 2), [*range(6)], first=0)
        for count in (6, 5, 4, 3, 2, 1):
            texts = [[*text, 20] for text in (PROMPTS * 2)[:count]]
            agree(step, model, texts)
    assert len(recorded) == 4  # of 8 rows, but there are 6; of 4, 2, 1


def test_storage_is_freed_with_its_cache_not_when_cycles_are_collected():
    model = make_model()
    cache = SlotCache(rows=1, columns=20)
    cache.take(read(model, [PROMPTS[0]]), [0], first=0)
    keys = weakref.ref(cache.layers[0].keys)
    gc.disable()
    try:
        del cache
        assert keys() is None
    finally:
        gc.enable()
