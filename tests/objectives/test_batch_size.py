import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives.inference.batch_size import (
    ON_ACCELERATOR,
    ON_CPU,
    BatchSizes,
    find_batch_size,
    fits_in,
)
from tiny_models import make_model
from tiny_tasks import everything, prepare, values_of

CPU = torch.device("cpu")
MANY = 1 << 40  # tokens, or bytes
SIZES = BatchSizes(first=2, last=16, tokens=32)


@given(st.integers(1, 600), st.integers(0, 300_000))
def test_size_found_is_the_largest_of_its_doublings_or_halvings_that_fits(room, tokens):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= room

    size = find_batch_size(ON_ACCELERATOR, tokens, fits)
    assert size <= room
    assert size <= ON_ACCELERATOR.last
    assert size in tried
    larger_helps = ON_ACCELERATOR.first <= size and size * ON_ACCELERATOR.tokens < tokens
    if size < ON_ACCELERATOR.last and (larger_helps or size < ON_ACCELERATOR.first):
        assert 2 * size > room
    if size > ON_ACCELERATOR.first:
        assert (size // 2) * ON_ACCELERATOR.tokens < tokens, "a smaller batch holds all"
    assert len(tried) == len(set(tried)), "a size was tried twice"


def test_given_size_and_the_only_one_of_a_cpu_are_taken_without_a_trial():
    def fits(size):
        raise AssertionError(f"{size} was tried")

    assert find_batch_size(BatchSizes.of(CPU), MANY, fits) == 32
    assert find_batch_size(BatchSizes.of(torch.device("cuda"), 48), MANY, fits) == 48
    assert BatchSizes.of(CPU) == ON_CPU
    assert ON_CPU.first * ON_CPU.tokens == 1024


def test_work_that_runs_out_of_memory_does_not_fit():
    def fill():
        raise torch.OutOfMemoryError("full")

    assert not fits_in(fill, CPU, MANY)
    assert fits_in(lambda: None, CPU, MANY)


def limited(model, most):
    """Make a model run out of memory above so many tokens; return the tokens of its passes."""
    read = []

    def fill(module, given):
        tokens = given[0].shape[0] * given[0].shape[1]
        if tokens > most:
            raise torch.OutOfMemoryError("full")
        read.append(tokens)

    model.model.layers[0].register_forward_pre_hook(fill)
    return read


@pytest.mark.parametrize(("most", "size"), [(600, 16), (150, 4), (40, 1)])
def test_batches_of_a_real_model_are_as_large_as_memory_allows(folder, most, size):
    model = make_model()
    harness, again = (prepare(folder, model, "choice", "answer") for _ in range(2))
    expected = values_of(harness, model)
    read = limited(model, most)
    for each in (harness, again):
        each.language_model.sizes = SIZES
        assert each.find_batch_size(MANY, len(each.items)) == 32 * size
        assert each.language_model.batch_size_per_gpu == size
    read.clear()
    assert values_of(harness, model) == expected
    assert max(read) <= most
    assert harness.language_model.batch_size_per_gpu == size, "it was halved after all"
    numbers = everything(harness)
    assert again.score(model, numbers) == harness.score(model, numbers), "other bits"


def test_batches_that_hold_a_whole_block_are_not_enlarged(folder):
    model = make_model()
    harness = prepare(folder, model, "choice")
    harness.language_model.sizes = SIZES
    harness.find_batch_size(MANY, 1)
    assert harness.language_model.batch_size_per_gpu == SIZES.first


def test_keys_and_values_may_take_a_quarter_of_memory_in_powers_of_two(folder):
    harness = prepare(folder, make_model(), "answer")
    runner = harness.language_model.runner
    by_tokens = runner.held_tokens
    harness.responder.hold(1 << 20)
    assert runner.held_bytes == 1 << 18
    assert runner.held_tokens == (1 << 18) // runner.bytes_per_token != by_tokens
    harness.responder.hold((1 << 20) + 999)
    assert runner.held_bytes == 1 << 18
    harness.responder.hold(0)
    assert runner.held_tokens == 1
