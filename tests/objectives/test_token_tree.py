"""Token trees, prefixes and batches of token sequences."""

from hypothesis import given
from hypothesis import strategies as st

from objectives.inference.token_tree import (
    Request,
    batches_by_length,
    build_tree,
    build_trees,
    common_length,
    group_by_prefix,
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


def test_the_prefix_of_most_rows_is_shared_and_each_row_is_in_one_group():
    rows = [build_tree(make_requests([([7] * 20 + [number], [1])])) for number in range(6)]
    others = [build_tree(make_requests([([8, number], [1])])) for number in range(3)]
    groups = list(group_by_prefix([*rows, *others]))
    assert [(prefix, len(rows)) for prefix, rows in groups] == [((7,) * 20, 6), ((), 3)]
    assert common_length([1, 2, 3], [1, 2]) == 2


def test_batches_are_ordered_by_length_and_limited_in_tokens():
    rows = [build_tree(make_requests([(list(range(length)), [1])])) for length in (3, 9, 4, 8, 30)]
    batches = list(batches_by_length(rows, 20))
    assert [[len(row) for row in batch] for batch in batches] == [[30], [9, 8], [4, 3]]
    cached = batches_by_length(rows, 20, cached_tokens=80)
    assert [len(batch) for batch in cached] == [1, 1, 1, 1, 1]
