"""Splits are disjoint by content, exact, stratified, and the same every time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.base import Item, ObjectiveError
from objectives.items import SPLITS, Splits, blocks, split_items


@st.composite
def suites(draw):
    """Items of a few tasks, some questions repeated within and across tasks, weights, counts."""
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True))
    items = []
    for name in names:
        size = draw(st.integers(12, 60))
        items += [Item(name, f"{name}{row}", row) for row in range(size)]
        repeats = draw(st.lists(st.sampled_from(items), max_size=8))
        items += [Item(name, item.key, size + row) for row, item in enumerate(repeats)]
    weights = {name: draw(st.floats(0.5, 2.0)) for name in names}
    counts = {split: draw(st.integers(1, 40)) for split in SPLITS}
    return items, weights, counts


def split_or_none(items, weights, counts, seed=0):
    try:
        return split_items(items, weights, counts, seed)
    except ObjectiveError:
        return None


def keys(items, numbers):
    return [items[number].key for number in numbers]


@given(suites(), st.integers(0, 3))
def test_splits_have_exactly_the_given_sizes_and_share_no_content(suite, seed):
    items, weights, counts = suite
    splits = split_or_none(items, weights, counts, seed)
    if splits is None:
        return
    dealt = [keys(items, getattr(splits, split)) for split in SPLITS]
    assert [len(split) for split in dealt] == [counts[split] for split in SPLITS]
    together = [key for split in dealt for key in split]
    assert len(set(together)) == len(together)


@given(suites())
def test_every_task_is_in_every_split(suite):
    items, weights, counts = suite
    splits = split_or_none(items, weights, counts)
    if splits is None:
        return
    for split in SPLITS:
        assert {items[number].task for number in getattr(splits, split)} == set(weights)


@given(suites(), st.randoms(use_true_random=False))
def test_order_of_rows_in_the_file_does_not_change_the_splits(suite, random):
    items, weights, counts = suite
    unique = list({item.key: item for item in items}.values())
    splits = split_or_none(unique, weights, counts)
    if splits is None:
        return
    moved = random.sample(unique, len(unique))
    again = split_items(moved, weights, counts, 0)
    for split in SPLITS:
        assert keys(unique, getattr(splits, split)) == keys(moved, getattr(again, split))


@given(suites())
def test_every_prefix_is_a_stratified_sample(suite):
    items, weights, counts = suite
    splits = split_or_none(items, weights, counts)
    if splits is None:
        return
    for split in SPLITS:
        order = [items[number].task for number in getattr(splits, split)]
        for task in weights:
            share = order.count(task) / len(order)
            slack = 1.5 + share * len(weights) / 2  # rounding of this task, then of the others
            for length in range(1, len(order) + 1):
                assert abs(order[:length].count(task) - length * share) <= slack


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_splits_follow_the_seed_and_nothing_else(seed):
    items = [Item("a", f"{row}", row) for row in range(60)]
    counts = {"search": 20, "select": 20, "test": 20}
    splits = split_items(items, {"a": 1.0}, counts, seed)
    assert split_items(items, {"a": 1.0}, counts, seed) == splits
    assert split_items(items, {"a": 1.0}, counts, seed + 1) != splits


def tally(items, numbers):
    tasks = [items[number].task for number in numbers]
    return {task: tasks.count(task) for task in sorted(set(tasks))}


def test_shares_follow_the_weights_until_a_task_is_used_up():
    sizes = {"a": 8, "b": 100, "c": 100}
    items = [Item(task, f"{task}{row}", row) for task, size in sizes.items() for row in range(size)]
    counts = {"search": 20, "select": 20, "test": 40}
    splits = split_items(items, {"a": 1.0, "b": 1.0, "c": 2.0}, counts, 0)
    # a has only 8 of its 20; the other 72 are divided 1 : 2
    assert tally(items, splits.search) == {"a": 2, "b": 6, "c": 12}
    assert tally(items, splits.select) == {"a": 2, "b": 6, "c": 12}
    assert tally(items, splits.test) == {"a": 4, "b": 12, "c": 24}


def test_a_question_in_two_tasks_is_used_under_the_first():
    items = [Item(task, f"{row}", row) for task in ("a", "b") for row in range(30)]
    items += [Item("b", f"own{row}", row) for row in range(30)]
    splits = split_items(items, {"a": 1, "b": 1}, {"search": 20, "select": 20, "test": 20}, 0)
    assert Splits(*(tuple(sorted(part)) for part in vars(splits).values())) != splits
    used = sorted(splits.search + splits.select + splits.test)
    assert used == [*range(30), *range(60, 90)]


def test_all_items_of_uneven_tasks_can_be_used():
    sizes = {"a": 7, "b": 31, "c": 62}
    items = [Item(task, f"{task}{row}", row) for task, size in sizes.items() for row in range(size)]
    counts = {"search": 40, "select": 27, "test": 33}
    splits = split_items(items, {"a": 0.3, "b": 0.1, "c": 0.6}, counts, 5)
    assert sorted(splits.search + splits.select + splits.test) == list(range(100))


TEN = [Item("a", f"{row}", row) for row in range(10)]


@pytest.mark.parametrize(
    ("items", "weights", "counts", "message"),
    [
        (TEN, {"a": 1}, {"search": 5, "select": 5, "test": 5}, "are 15 items .* 10 .*a 10"),
        (
            [*TEN, *(Item("b", f"b{row}", row) for row in range(2))],
            {"a": 1, "b": 1},
            {"search": 3, "select": 3, "test": 3},
            r"'b' gets 2 of 9 items \(search 1, select 1, test 0.*would miss from test",
        ),
        (TEN, {"b": 1}, {"search": 1, "select": 1, "test": 1}, "task 'a', which has no weight"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_numbers(items, weights, counts, message):
    with pytest.raises(ObjectiveError, match=message):
        split_items(items, weights, counts, 0)


@given(st.lists(st.integers(0, 99)), st.integers(1, 12))
def test_blocks_cut_an_order_without_changing_it(order, size):
    cut = blocks(order, size)
    assert [number for block in cut for number in block] == order
    assert all(len(block) == size for block in cut[:-1])
    assert all(cut)


def test_an_empty_block_is_refused():
    with pytest.raises(ObjectiveError, match="block size is 0; make it 1 or more"):
        blocks([1, 2], 0)
