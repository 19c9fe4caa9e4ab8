"""Token sequences that begin alike, laid out so that what they share is read once.

The answers to one question continue one prompt. Read as one *row*, the prompt stands there once
and the answers are branches behind it: a row is the prefix tree of its sequences, its nodes in
preorder. A token may look at the tokens above it in the tree alone, and because the order is
preorder that is one comparison: ``q`` is below ``k`` where ``k <= q < end[k]``. Answers of one
letter need no branch at all, and sequences that differ early (Winogrande's two contexts) simply
branch early.

What many rows begin with, examples shown before each question for instance, is taken off them as
a *prefix*, read once for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

# a prefix is worth a pass of its own if it is read for several rows and a good part of them
_SHARERS = 4
_SAVING = 0.25

# keys and values of earlier tokens take less room than the tokens now read
_HELD_PER_READ = 8

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """A log-likelihood that is asked for.

    Attributes:
        number: Its place in the caller's list.
        origin: Requests of one origin, the answers to one question, may share a row.
        tokens: What the model reads: prompt and answer without the last token.
        answer: The tokens to be predicted, the last one behind the last of ``tokens``.
    """

    number: int
    origin: Hashable
    tokens: Tokens
    answer: Tokens


@dataclass(frozen=True)
class Prediction:
    """Where in a row a request's tokens are predicted: node ``nodes[i]`` predicts ``tokens[i]``."""

    number: int
    nodes: Tokens
    tokens: Tokens


@dataclass(frozen=True)
class TokenTree:
    """The prefix tree of a few sequences, one entry per node, in preorder.

    Attributes:
        tokens: The tokens.
        depths: How many tokens are above each, those of a prefix taken off included.
        ends: The node behind the last one below it.
        answers: What is predicted where.
        trunk: How many tokens come before the first branch and the first prediction.
    """

    tokens: Tokens
    depths: Tokens
    ends: Tokens
    answers: tuple[Prediction, ...]
    trunk: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def head(self) -> Tokens:
        """The tokens that may be taken off as a prefix."""
        return self.tokens[: self.trunk]

    @property
    def depth(self) -> int:
        """Tokens in the longest sequence."""
        return max(self.depths) + 1

    @property
    def is_chain(self) -> bool:
        """Whether it has no branches."""
        return all(end == len(self) for end in self.ends)

    def behind(self, prefix: int) -> TokenTree:
        """The row without its first ``prefix`` tokens, at most ``trunk``."""
        return TokenTree(
            self.tokens[prefix:],
            self.depths[prefix:],
            tuple(end - prefix for end in self.ends[prefix:]),
            tuple(
                replace(answer, nodes=tuple(node - prefix for node in answer.nodes))
                for answer in self.answers
            ),
            self.trunk - prefix,
        )


class Headed(Protocol):
    """Something that may begin like others."""

    @property
    def head(self) -> Tokens:
        """The tokens that may be taken off as a prefix."""
        ...

    def __len__(self) -> int: ...


R = TypeVar("R", bound=Headed)


@dataclass(frozen=True)
class Shared(Generic[R]):
    """Rows that begin with ``prefix``, which is still on them."""

    prefix: Tokens
    rows: tuple[R, ...]


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    for length, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return length
    return min(len(first), len(second))


def make_row(requests: Iterable[Request]) -> TokenTree:
    """Lay requests out in one row."""
    tokens: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    answers = []
    path: list[int] = []  # the nodes of the sequence before
    before: Tokens | None = None
    trunk: int | None = None
    for request in sorted(requests, key=lambda request: request.tokens):
        if before is not None:
            shared = common_length(before, request.tokens)
            trunk = shared if trunk is None else min(trunk, shared)
            for node in path[shared:]:
                ends[node] = len(tokens)
            del path[shared:]
        for token in request.tokens[len(path) :]:
            depths.append(len(path))
            path.append(len(tokens))
            tokens.append(token)
            ends.append(0)
        nodes = tuple(path[-len(request.answer) :])
        answers.append(Prediction(request.number, nodes, request.answer))
        before = request.tokens
    for node in path:
        ends[node] = len(tokens)
    first = min(answer.nodes[0] for answer in answers)
    trunk = first if trunk is None else min(first, trunk)
    return TokenTree(tuple(tokens), tuple(depths), tuple(ends), tuple(answers), trunk)


def make_rows(requests: Iterable[Request], tree_tokens: float) -> list[TokenTree]:
    """One row per origin, or one per sequence where the tree or a sequence would be too long.

    Args:
        requests: In any order.
        tree_tokens: The most tokens of a row with branches; 0 for none at all.
    """
    by_origin: dict[Hashable, list[Request]] = defaultdict(list)
    for request in requests:
        by_origin[request.origin].append(request)
    rows: list[TokenTree] = []
    for of_origin in by_origin.values():
        row = make_row(of_origin)
        rows += [row] if row.is_chain or len(row) <= tree_tokens else _chains(of_origin)
    return rows


def _chains(requests: Iterable[Request]) -> Iterator[TokenTree]:
    by_sequence: dict[Tokens, list[Request]] = defaultdict(list)
    for request in requests:
        by_sequence[request.tokens].append(request)
    return map(make_row, by_sequence.values())


def share_prefixes(rows: Iterable[R]) -> Iterator[Shared[R]]:
    """Group rows by a beginning that is worth reading once; the last group may have none.

    In sorted order the rows that share a beginning are neighbours, so what most of them share is
    on the middle one.
    """
    rest = sorted(rows, key=lambda row: row.head)
    while len(rest) >= _SHARERS:
        middle = rest[len(rest) // 2].head
        lengths = [common_length(middle, row.head) for row in rest]
        best = max(set(lengths), key=lambda length: length * (_at_least(length, lengths) - 1))
        sharers = [row for row, length in zip(rest, lengths, strict=True) if length >= best]
        saved = best * (len(sharers) - 1)
        if len(sharers) < _SHARERS or saved < _SAVING * sum(map(len, sharers)):
            break
        yield Shared(middle[:best], tuple(sharers))
        rest = [row for row, length in zip(rest, lengths, strict=True) if length < best]
    if rest:
        yield Shared((), tuple(rest))


def _at_least(length: int, lengths: Iterable[int]) -> int:
    return sum(other >= length for other in lengths)


def in_batches(rows: Iterable[R], read: int, held: int = 0) -> Iterator[list[R]]:
    """Cut rows into batches, longest first, so that too large a batch fails at once.

    Args:
        rows: What a forward pass reads, without any prefix.
        read: Tokens a pass may read, padding included.
        held: Tokens of each row whose keys and values are held besides those read: a prefix,
            and what will be generated.
    """
    rest = sorted(rows, key=len, reverse=True)
    while rest:
        longest = len(rest[0])
        size = max(1, min(read // longest, _HELD_PER_READ * read // (held + longest)))
        yield rest[:size]
        rest = rest[size:]
