"""What an objective is: numbered items, and an answer per item for a live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn


def printable(text: str) -> str:
    r"""Untrusted text as a terminal may show it: what is not printable is spelled out.

    A model can write escape sequences that move the cursor or retitle the window. Line breaks are
    spelled out as well (``\n``), so that one message stays one line.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


class ObjectiveError(ValueError):
    """Bad input to an objective: the message says where, what was got and what to do.

    It may quote what a model or a data file says, so it is made printable.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True)
class Item:
    """One question of one task. Its number is its place in ``Objective.items``.

    Attributes:
        task: Name of the task it is scored under.
        key: Hex hash of what is asked and what is right; equal keys are the same question, even
            in two tasks or twice in one.
        doc_id: Row of the task's evaluation split, counted from 0.
        written: Whether a model writes its answer, and the length of what it writes counts.
    """

    task: str
    key: str
    doc_id: int
    written: bool = False


@dataclass(frozen=True)
class ItemSnapshot:
    """What decides an item's answer besides the model: it must not change during a study.

    Attributes:
        prompt: All the text a model is shown for it, answers to choose from included.
        gold: What is right, and the row of data it comes from.
        encoding: Hash of the tokens a model is given.
        rules: Hash of how the task asks and judges.
        reads: How many tokens a model reads for it, where that is known.
        writes: How many it may write. Both are to reckon with, and may change.
    """

    prompt: str
    gold: str
    encoding: str = ""
    rules: str = ""
    reads: int = 0
    writes: int = 0


@dataclass(frozen=True)
class ItemResult:
    """What a model's answer to one item is worth.

    Attributes:
        value: In the unit of the task's own metric; higher is better.
        margin: The same on a continuous scale, where the task has one: it shows a small change
            that leaves ``value`` as it is. Log-likelihoods are natural.
        fault: Why the answer could not be judged, as printable text; ``value`` is then 0.
        tokens: How many tokens the model wrote for it, those that ended its texts included.
    """

    value: float
    margin: float | None = None
    fault: str | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Response:
    """What a model says to an item, in words: untrusted text.

    Attributes:
        text: What it wrote, the answer it took, or how likely a given one is to it; None where
            that is not known.
        right: What it should have been; None where nothing is.
        shown: What the model was shown, as ``ItemSnapshot.prompt``; None where that is not known.
    """

    text: str | None = None
    right: str | None = None
    shown: str | None = None


class Objective(Protocol):
    """Scores a live model on some of a benchmark's items; never sees a recipe.

    ``said`` may be left out of a class of one's own.
    """

    @property
    def tasks(self) -> Mapping[str, float]:
        """Task name to its weight in the study's mean; weights are positive, of any scale."""

    @property
    def items(self) -> Sequence[Item]:
        """Every item there is; an item's number is its index here."""

    def shown(self, items: Sequence[int]) -> list[ItemSnapshot]:
        """What a model is shown for the numbered items, to be compared when a study goes on."""

    def score(self, model: nn.Module, items: Sequence[int]) -> list[ItemResult]:
        """Ask ``model`` the numbered items.

        Args:
            model: The live model, in evaluation mode and without gradients.
            items: Item numbers, in any order.

        Returns:
            One answer per item, in the order given; a task's score is the mean of its items'
            values.

        Raises:
            ObjectiveError: The model gave no usable answer to an item.
        """

    def said(self, model: nn.Module, items: Sequence[int]) -> list[Response]:
        """Ask as ``score`` does, for the words: one ``Response`` per item, in the order given."""
