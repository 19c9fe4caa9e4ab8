"""Token trees, prefixes and batches of token sequences."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from objectives.inference.token_tree import (
    Request,
    batches_by_length,
    build_tree,
    build_trees,
    common_length,
    group_by_prefix,
    join_groups,
)

SEQUENCES = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=6),
        st.lists(st.integers(0, 2), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=6,
)


def make_requests(sequences):
    return [
        Request(number, "question", (*context, *answer)[:-1], tuple(answer))
        for number, (context, answer) in enumerate(sequences)
    ]


@given(SEQUENCES)
def test_a_tree_has_each_sequence_on_the_path_to_its_last_node(sequences):
    requests = make_requests(sequences)
    tree = build_tree(requests)
    prefixes = {r.inputs[:end] for r in requests for end in range(1, len(r.inputs) + 1)}
    assert len(tree) == len(prefixes), "a shared token must be one node"
    for prediction in tree.predictions:
        request = requests[prediction.index]
        above = [k for k in range(len(tree)) if k <= prediction.nodes[-1] < tree.subtree_ends[k]]
        assert tuple(tree.tokens[k] for k in above) == request.inputs
        assert [tree.positions[k] for k in above] == list(range(len(request.inputs)))
        assert prediction.nodes == tuple(above[-len(request.targets) :])
        assert prediction.targets == request.targets
        assert (*request.context, *request.targets[:-1]) == request.inputs
        assert request.inputs[: tree.trunk_length] == tree.trunk
    rest = tree.without_prefix(tree.trunk_length)
    assert len(rest) == len(tree) - tree.trunk_length > 0
    assert build_tree(requests[:1]).is_chain


def test_a_tree_that_would_be_too_long_becomes_one_chain_per_sequence():
    requests = make_requests([([1, 2], [0, 1, 2]), ([1, 2], [2, 1, 0]), ([1, 2], [2, 1, 1])])
    assert [len(tree) for tree in build_trees(requests, 100)] == [6]
    assert [len(tree) for tree in build_trees(requests, 5)] == [4, 4]


@given(st.lists(SEQUENCES, min_size=1, max_size=5), st.integers(8, 40))
def test_questions_joined_in_one_tree_stay_whole_and_need_fewer_tokens(questions, most):
    requests = [
        replace(each, index=10 * number + each.index, group=number)
        for number, sequences in enumerate(questions)
        for each in make_requests(sequences)
    ]
    joined = join_groups(requests, most)
    groups = {each.index: each.group for each in joined}
    assert sorted(groups) == sorted(each.index for each in requests)
    for number in range(len(questions)):
        assert len({groups[each.index] for each in requests if each.group == number}) == 1
    apart, together = build_trees(requests, 1000), build_trees(joined, 1000)
    assert sum(map(len, together)) <= sum(map(len, apart))
    assert len(together) == len(apart) or sum(map(len, together)) < sum(map(len, apart))
    longest = max(map(len, apart))
    assert all(len(tree) <= max(most, longest) for tree in together)


def test_questions_behind_one_beginning_are_one_tree_and_others_apart():
    asked = [[7] * 20 + [number] for number in range(4)] + [[8] * 20]
    requests = [
        replace(make_requests([(context, [1])])[0], index=number, group=number)
        for number, context in enumerate(asked)
    ]
    lengths = [len(tree) for tree in build_trees(join_groups(requests, 100), 100)]
    assert sorted(lengths) == [20, 24]
    assert len(join_groups(requests, 22)) == 5
    assert len(build_trees(join_groups(requests, 22), 100)) == 3


def test_the_prefix_of_most_rows_is_shared_and_each_row_is_in_one_group():
    rows = [build_tree(make_requests([([7] * 20 + [number], [1])])) for number in range(6)]
    others = [build_tree(make_requests([([8, number], [1])])) for number in range(3)]
    groups = list(group_by_prefix([*rows, *others]))
    assert [(prefix, len(rows)) for prefix, rows in groups] == [((7,) * 20, 6), ((), 3)]
    assert common_length([1, 2, 3], [1, 2]) == 2


def test_batches_are_ordered_by_length_and_limited_in_tokens():
    rows = [build_tree(make_requests([(list(range(length)), [1])])) for length in (3, 9, 4, 8, 30)]
    batches = list(batches_by_length(rows, 20, 160))
    assert [[len(row) for row in batch] for batch in batches] == [[30], [9, 8], [4, 3]]
    cached = batches_by_length(rows, 20, 160, cached_tokens=80)
    assert [len(batch) for batch in cached] == [1, 1, 1, 1, 1]
