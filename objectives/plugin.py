"""A user's own objective, named ``package.module:Class``, and several objectives as one."""

from __future__ import annotations

import bisect
import importlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from objectives.base import (
    ItemResult,
    ItemSnapshot,
    Objective,
    ObjectiveError,
    Response,
    objective_errors,
)
from objectives.entries import PluginEntry
from objectives.journal import Journal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_T = TypeVar("_T")


class Plugin(Objective):
    """A user's objective with everything it returns checked.

    Raises:
        ObjectiveError: The class cannot be used, or its tasks and items do not fit.
    """

    def __init__(
        self, entry: PluginEntry, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._where = f"objective {entry.objective!r}"
        make = find_class(entry.objective)
        with objective_errors(f"{self._where} could not be made"):
            own = make(model, tokenizer, **entry.options)
        required = ("tasks", "items", "snapshots", "score")
        if missing := [name for name in required if not hasattr(own, name)]:
            raise ObjectiveError(
                f"{self._where} has no {', '.join(missing)}; see objectives.base.Objective"
            )
        self._own = cast("Objective", own)
        # a class that inherits from the protocol has its empty methods
        self._responds, self._has_loss = (
            hasattr(own, name) and getattr(type(own), name, None) is not getattr(Objective, name)
            for name in ("respond", "loss")
        )
        with objective_errors(f"{self._where}: its tasks and items cannot be read"):
            self.tasks = _scaled(self._own.tasks, entry.weight)
            self.items = tuple(self._own.items)
        if unknown := sorted({item.task for item in self.items} - self.tasks.keys()):
            raise ObjectiveError(
                f"{self._where}: tasks {unknown} have items but no weight; add them to its 'tasks'"
            )

    @override
    def snapshots(self, items: Sequence[int]) -> list[ItemSnapshot]:
        with objective_errors(f"{self._where}: snapshots"):
            return list(self._own.snapshots(items))

    @override
    def score(
        self,
        model: nn.Module,
        items: Sequence[int],
        journal: Journal | None = None,
    ) -> list[ItemResult]:
        with objective_errors(f"{self._where}: score"), torch.no_grad():
            results = list(self._own.score(model, items))
        wrong = [repr(result) for result in results if not _is_valid(result)]
        if wrong or len(results) != len(items):
            raise ObjectiveError(
                f"{self._where}: score gave {len(results)} results for {len(items)} items"
                f"{', one of them ' if wrong else ''}{''.join(wrong[:1])}; give one "
                "objectives.base.ItemResult with a finite value, and no tokens below 0, per item"
            )
        return results

    @override
    def respond(self, model: nn.Module, items: Sequence[int]) -> list[Response]:
        if not self._responds:
            return [Response()] * len(items)
        with objective_errors(f"{self._where}: respond"), torch.no_grad():
            return list(self._own.respond(model, items))

    @override
    def targets(self, items: Sequence[int]) -> list[str | None]:
        return ["" if self._has_loss else None] * len(items)

    @override
    def right_answers(self, model: nn.Module, items: Sequence[int]) -> list[str | None]:
        return [None] * len(items)

    @override
    def loss(self, model: nn.Module, items: Sequence[int], targets: Sequence[str]) -> Tensor:
        if not self._has_loss:
            raise ObjectiveError(f"{self._where} has no loss; add one, or tune without gradients")
        with objective_errors(f"{self._where}: loss"):
            found: object = cast("Any", self._own).loss(model, items)
        if wrong := _why_no_loss(found, model, len(items)):
            raise ObjectiveError(
                f"{self._where}: loss gave {wrong}; return a tensor with one finite number per "
                f"item, {len(items)} here, made from the model's outputs with gradients"
            )
        return cast("Tensor", found).float()


class Suite(Objective):
    """Several objectives as one, their items one after another; no task may be in two of them."""

    def __init__(self, parts: Sequence[Objective]) -> None:
        self._parts = parts
        self.tasks = {}
        for part in parts:
            if twice := sorted(self.tasks.keys() & part.tasks.keys()):
                raise ObjectiveError(f"task {twice[0]!r} is listed twice; give each task one entry")
            self.tasks = {**self.tasks, **part.tasks}
        self.items = [item for part in parts for item in part.items]
        self._starts = [0, *itertools.accumulate(len(part.items) for part in parts)]

    @override
    def snapshots(self, items: Sequence[int]) -> list[ItemSnapshot]:
        return self._map(items, lambda part, numbers: part.snapshots(numbers))

    @override
    def score(
        self, model: nn.Module, items: Sequence[int], journal: Journal | None = None
    ) -> list[ItemResult]:
        # one part at most, the harness, writes into it
        return self._map(items, lambda part, numbers: part.score(model, numbers, journal))

    @override
    def respond(self, model: nn.Module, items: Sequence[int]) -> list[Response]:
        return self._map(items, lambda part, numbers: part.respond(model, numbers))

    @override
    def targets(self, items: Sequence[int]) -> list[str | None]:
        return self._map(items, lambda part, numbers: part.targets(numbers))

    @override
    def right_answers(self, model: nn.Module, items: Sequence[int]) -> list[str | None]:
        return self._map(items, lambda part, numbers: part.right_answers(model, numbers))

    @override
    def loss(self, model: nn.Module, items: Sequence[int], targets: Sequence[str]) -> Tensor:
        found: dict[int, Tensor] = {}
        for part, indices in self._by_part(items).items():
            numbers = [items[index] - self._starts[part] for index in indices]
            losses = self._parts[part].loss(model, numbers, [targets[index] for index in indices])
            found |= dict(zip(indices, losses, strict=True))
        return torch.stack([found[index] for index in range(len(items))])

    def _map(
        self, items: Sequence[int], call: Callable[[Objective, Sequence[int]], list[_T]]
    ) -> list[_T]:
        """Call every part with its own item numbers; return the results in the items' order."""
        found: dict[int, _T] = {}
        for part, indices in self._by_part(items).items():
            results = call(self._parts[part], [items[n] - self._starts[part] for n in indices])
            found |= dict(zip(indices, results, strict=True))
        return [found[index] for index in range(len(items))]

    def _by_part(self, items: Sequence[int]) -> dict[int, list[int]]:
        """Return the indices into ``items`` of each part's items, by the part's number."""
        indices: dict[int, list[int]] = defaultdict(list)
        for index, number in enumerate(items):
            indices[bisect.bisect_right(self._starts, number) - 1].append(index)
        return indices


def find_class(path: str) -> Callable[..., object]:
    """Import the class named ``package.module:Class``."""
    where = f"objective {path!r}"
    module, _, name = path.partition(":")
    if not (module and name):
        raise ObjectiveError(f"{where}: write it as package.module:Class")
    with objective_errors(where):  # the user's module may raise anything
        try:
            found = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            fix = "install it, or put its folder on PYTHONPATH"
            raise ObjectiveError(f"{where}: {error}; {fix}") from error
        except AttributeError as error:
            fix = "check the name behind the colon"
            raise ObjectiveError(f"{where}: {module} has no {name}; {fix}") from error
    if not callable(found):
        raise ObjectiveError(f"{where}: {name} is a {type(found).__name__}, not a class")
    return cast("Callable[..., object]", found)


def _is_valid(result: object) -> bool:
    return isinstance(result, ItemResult) and math.isfinite(result.value) and result.tokens >= 0


def _why_no_loss(found: object, model: nn.Module, count: int) -> str | None:
    """Return what is wrong with the losses of ``count`` items; None if nothing is."""
    if not isinstance(found, Tensor) or not found.is_floating_point():
        return repr(found)
    if found.shape != (count,):
        return f"a tensor of shape {tuple(found.shape)}"
    if not found.isfinite().all():
        return f"{found.tolist()}"
    trained = torch.is_grad_enabled() and any(each.requires_grad for each in model.parameters())
    return "losses without gradients" if trained and not found.requires_grad else None


def _scaled(tasks: Mapping[str, float], weight: float) -> Mapping[str, float]:
    if not tasks or not all(0 < own < math.inf for own in tasks.values()):
        raise ObjectiveError(f"tasks are {dict(tasks)}; give at least one, each a positive weight")
    total = sum(tasks.values())
    return {task: weight * own / total for task, own in tasks.items()}
