"""What an objective is: numbered items, and one number per item for a live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn


class ObjectiveError(ValueError):
    """Bad input to an objective: the message says where, what was got and what to do."""


@dataclass(frozen=True)
class Item:
    """One question of one task. Its number is its place in ``Objective.items``.

    Attributes:
        task: Name of the task it is scored under.
        key: Hex hash of what is asked and what is right; equal keys are the same question, even
            in two tasks or twice in one.
        doc_id: Row of the task's evaluation split, counted from 0.
    """

    task: str
    key: str
    doc_id: int


class Objective(Protocol):
    """Scores a live model on some of a benchmark's items; never sees a recipe."""

    @property
    def tasks(self) -> Mapping[str, float]:
        """Task name to its weight in the study's mean; weights are positive, of any scale."""

    @property
    def items(self) -> Sequence[Item]:
        """Every item there is; an item's number is its index here."""

    def score(self, model: nn.Module, items: Sequence[int]) -> list[float]:
        """Ask ``model`` the numbered items.

        Args:
            model: The live model, in evaluation mode.
            items: Item numbers, in any order.

        Returns:
            One number per item, in the order given and in the unit of the task's own metric;
            higher is better, and a task's score is the mean over its items.

        Raises:
            ObjectiveError: The model gave no usable answer to an item.
        """
