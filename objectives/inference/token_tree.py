"""Prefix trees of token sequences, so that a model computes a shared beginning once.

The answers to one question share a prompt. They are laid out as one *token tree*: the prefix tree
of their sequences, its nodes in preorder, read by the model as one row of a batch. A token attends
to itself and its ancestors only, and in preorder that is one comparison: node ``q`` may attend to
``k`` iff ``k <= q < subtree_ends[k]``. Answers of a single token add no node at all, and sequences
that differ early (Winogrande's two contexts) branch early.

A beginning that many trees share, such as few-shot examples, is cut off as a *prefix* whose keys
and values are computed once for all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

# a prefix costs a forward pass of its own: at least so many rows must share it, and it must save
# at least this share of their tokens
_MIN_SHARING_ROWS = 4
_MIN_SAVING = 0.25

# attention in a tree costs with the square of its tokens: no more are joined in one
_MOST_JOINED = 2048

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """A log-likelihood to compute."""

    index: int
    group: Hashable  # requests of one group, the answers to one question, may share a tree
    inputs: Tokens  # what the model reads: context and continuation without its last token
    targets: Tokens  # tokens of the continuation; the last `len(targets)` inputs predict them
    task: Hashable = None  # prefixes are shared within a task only

    @classmethod
    def truncated(
        cls,
        context: Sequence[int],
        continuation: Sequence[int],
        max_length: int,
        *,
        index: int,
        group: Hashable,
        task: Hashable = None,
    ) -> Request:
        """Return a request that loses the beginning of inputs longer than ``max_length``."""
        sequence = (*context, *continuation)[-(max_length + 1) :]
        return cls(index, group, sequence[:-1], tuple(continuation), task)

    @property
    def context(self) -> Tokens:
        """The inputs before the first target."""
        return self.inputs[: len(self.inputs) + 1 - len(self.targets)]


@dataclass(frozen=True)
class Prediction:
    """Nodes of a tree that predict a request's targets: ``nodes[i]`` predicts ``targets[i]``."""

    index: int
    nodes: Tokens
    targets: Tokens


@dataclass(frozen=True)
class TokenTree:
    """The prefix tree of a few sequences; one entry per node, in preorder."""

    tokens: Tokens
    positions: Tokens  # position of each node in its sequence, a cut-off prefix included
    subtree_ends: Tokens  # one past the last descendant of each node
    predictions: tuple[Prediction, ...]
    trunk_length: int  # number of nodes before the first branch and the first prediction

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trunk(self) -> Tokens:
        """Tokens that may be cut off as a prefix."""
        return self.tokens[: self.trunk_length]

    @property
    def is_chain(self) -> bool:
        """Whether the tree has no branches."""
        return all(end == len(self) for end in self.subtree_ends)

    def without_prefix(self, length: int) -> TokenTree:
        """Return the tree without its first ``length`` nodes, at most ``trunk_length``."""
        return TokenTree(
            self.tokens[length:],
            self.positions[length:],
            tuple(end - length for end in self.subtree_ends[length:]),
            tuple(
                replace(prediction, nodes=tuple(node - length for node in prediction.nodes))
                for prediction in self.predictions
            ),
            self.trunk_length - length,
        )


class Row(Protocol):
    """A row of a batch, whose trunk may be cut off as a prefix shared with other rows."""

    @property
    def trunk(self) -> Tokens:
        """Tokens that may be cut off."""

    def __len__(self) -> int: ...


R = TypeVar("R", bound=Row)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    for length, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return length
    return min(len(first), len(second))


def build_tree(requests: Iterable[Request]) -> TokenTree:
    """Build the prefix tree of the requests' inputs."""
    tokens: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    predictions = []
    path: list[int] = []  # nodes of the previous sequence
    previous: Tokens = ()
    ordered = sorted(requests, key=lambda request: request.inputs)
    for request in ordered:
        shared = common_length(previous, request.inputs)
        for node in path[shared:]:
            ends[node] = len(tokens)
        del path[shared:]
        for token in request.inputs[len(path) :]:
            positions.append(len(path))
            path.append(len(tokens))
            tokens.append(token)
            ends.append(0)
        nodes = tuple(path[-len(request.targets) :])
        predictions.append(Prediction(request.index, nodes, request.targets))
        previous = request.inputs
    for node in path:
        ends[node] = len(tokens)
    first = min(prediction.nodes[0] for prediction in predictions)
    branch = common_length(ordered[0].inputs, ordered[-1].inputs)
    trunk = min(first, branch)
    return TokenTree(tuple(tokens), tuple(positions), tuple(ends), tuple(predictions), trunk)


def build_trees(requests: Iterable[Request], max_tokens: float) -> list[TokenTree]:
    """Build one tree per group, or per sequence for trees with branches above ``max_tokens``."""
    trees: list[TokenTree] = []
    for group in _by_group(requests):
        tree = build_tree(group)
        if tree.is_chain or len(tree) <= max_tokens:
            trees.append(tree)
            continue
        by_sequence: dict[Tokens, list[Request]] = defaultdict(list)
        for request in group:
            by_sequence[request.inputs].append(request)
        trees += map(build_tree, by_sequence.values())
    return trees


def _by_group(requests: Iterable[Request]) -> list[list[Request]]:
    by_group: dict[Hashable, list[Request]] = defaultdict(list)
    for request in requests:
        by_group[request.group].append(request)
    return [*by_group.values()]


def join_groups(requests: Iterable[Request], max_tokens: int) -> list[Request]:
    """Join groups of requests whose shared beginning saves enough tokens.

    Unlike a cut-off prefix, the beginning of a joint tree has gradients.

    Args:
        requests: Requests of any groups.
        max_tokens: Maximum tokens of a joint tree.
    """
    groups = sorted(_by_group(requests), key=lambda group: min(each.inputs for each in group))
    joined: list[list[Request]] = []
    length = 0  # tokens of the last joint tree
    for group in groups:
        alone = len(build_tree(group))
        together = len(build_tree(joined[-1] + group)) if joined else alone
        fits = together <= min(max_tokens, _MOST_JOINED)
        if joined and fits and length + alone - together >= _MIN_SAVING * alone:
            joined[-1] = joined[-1] + group
            length = together
        else:
            joined.append(group)
            length = alone
    return [replace(each, group=number) for number, group in enumerate(joined) for each in group]


def group_by_prefix(rows: Iterable[R]) -> Iterator[tuple[Tokens, Sequence[R]]]:
    """Group rows by a common prefix worth a pass of its own; only the last group may have none.

    In sorted order the rows that share a prefix are neighbours, so a prefix that most of them
    share is one of the middle row.
    """
    rest = sorted(rows, key=lambda row: row.trunk)
    while len(rest) >= _MIN_SHARING_ROWS:
        middle = rest[len(rest) // 2].trunk
        lengths = [common_length(middle, row.trunk) for row in rest]
        best = max(set(lengths), key=lambda n: n * (sum(each >= n for each in lengths) - 1))
        sharing = [row for row, length in zip(rest, lengths, strict=True) if length >= best]
        saved = best * (len(sharing) - 1)
        if len(sharing) < _MIN_SHARING_ROWS or saved < _MIN_SAVING * sum(map(len, sharing)):
            break
        yield middle[:best], sharing
        rest = [row for row, length in zip(rest, lengths, strict=True) if length < best]
    if rest:
        yield (), rest


def batches_by_length(
    rows: Iterable[R], tokens_per_batch: int, held_tokens: int, cached_tokens: int = 0
) -> Iterator[list[R]]:
    """Cut rows into batches, longest first, so that a batch too large for memory fails at once.

    Args:
        rows: Rows of a forward pass, without their prefix.
        tokens_per_batch: Maximum tokens of a batch, padding included.
        held_tokens: Maximum number of tokens whose keys and values are cached at once.
        cached_tokens: Tokens of each row whose keys and values are cached besides its own: the
            prefix, and what will be generated.
    """
    rest = sorted(rows, key=len, reverse=True)
    while rest:
        longest = len(rest[0])
        fitting = held_tokens // (cached_tokens + longest)
        size = max(1, min(tokens_per_batch // longest, fitting))
        yield rest[:size]
        rest = rest[size:]
