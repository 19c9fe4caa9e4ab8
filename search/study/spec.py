"""The blocks of study.yaml as frozen models; ``reading`` makes them, with every path absolute."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from merge_engine.recipe.recipe import Tokenizer
from merge_engine.schema import DtypeName, FrozenModel
from objectives.entries import Engine, Entry


class StudyError(ValueError):
    """A study, option or run folder that cannot be used; the message says what to do."""


DEFAULT_SCALE: Final = (0.0, 1.5)

# Limits for numbers that loops or memory depend on.
Count = Annotated[PositiveInt, Field(le=1_000_000_000)]
Seed = Annotated[NonNegativeInt, Field(le=2**63 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _parse_range(raw: object) -> object:
    if isinstance(raw, int | float | str):
        return raw, raw
    if isinstance(raw, list | tuple) and len(raw) == 2:
        return raw
    raise ValueError("a range is a number, or [low, high]")


# A number fixes a parameter; [low, high] searches it.
Range = Annotated[tuple[float, float], BeforeValidator(_parse_range)]


class BelowBase(FrozenModel):
    """A lower bound on a task's mean: the base model's on the same items, less ``margin``."""

    margin: NonNegativeFloat


def _parse_floor(raw: object) -> object:
    if isinstance(raw, int | float | BelowBase | dict):
        return raw
    if isinstance(raw, str) and (
        match := re.fullmatch(r"base(?:\s*-\s*(\d*\.?\d+))?", raw.strip())
    ):
        return BelowBase(margin=float(match[1] or 0))
    raise ValueError("a floor is a number, or one like 'base - 0.02'")


# The minimum mean of a task: a number, or ``base - 0.02``.
Floor = Annotated[Finite | BelowBase, BeforeValidator(_parse_floor)]


class ItemCounts(FrozenModel):
    """Number of items of each split, over all tasks: to search, to select the winner, to test."""

    search: Count = 200
    select: Count = 200
    test: Count = 400
    # Items used for gradients, if weights are tuned; None: those that the others leave.
    tune: Annotated[NonNegativeInt, Field(le=1_000_000_000)] | None = None


class ObjectiveSpec(FrozenModel):
    """What is evaluated, and how."""

    tasks: tuple[Entry, ...] = Field(min_length=1)  # their weighted mean is maximised
    include_path: tuple[Path, ...] = ()  # folders of task files, besides lm-eval's own tasks
    items: ItemCounts = ItemCounts()  # number of items of each split
    # Minimum mean of a task, by its name.
    constraints: dict[str, Floor] = Field(default_factory=dict)
    # Maximum of the mean number of tokens generated per item.
    max_mean_tokens: Annotated[PositiveFloat, Field(allow_inf_nan=False)] | None = None
    # Prompt through the base model's chat template, in every task.
    apply_chat_template: bool = False
    system_instruction: str | None = None  # the same for every task and every candidate
    # Allow tasks that run code written by a model, unprotected, on this machine.
    unsafe_code: bool = False
    trust_task_code: bool = False  # run Python that comes with task files outside lm-eval
    batch_size: Count | None = None  # of the forward passes; None: found by trying
    engine: Engine | None = None  # generates text; None: the live model itself
    block: Count = 20  # items that are evaluated between two decisions of a race

    @property
    def has_constraints(self) -> bool:
        """True where a recipe can be infeasible."""
        return bool(self.constraints) or self.max_mean_tokens is not None


class ModelDifference(FrozenModel):
    """A donor that is the difference of two models: what ``model`` has learned beyond ``minus``."""

    model: str
    minus: str

    def __str__(self) -> str:
        return f"{self.model} - {self.minus}"


# A tensor, the experts of a layer as one; a layer; or one of ``layer_groups`` and ``split``.
TunedUnit = Literal["tensor", "layer", "group"]


class SearchSpec(FrozenModel):
    """What is searched, and how."""

    methods: tuple[str, ...] = Field(min_length=1)  # merge methods to choose among
    # The donors' mean weight; None: DEFAULT_SCALE, which is widened if the best is at its edge.
    scale: Range | None = None
    # Of the methods' other parameters, by name.
    ranges: dict[str, Range] = Field(default_factory=dict)
    at_most: Count | None = None  # donors that a recipe uses at most; None: all
    layer_groups: Count = 1  # groups of consecutive layers with weights of their own
    # Parts of tensor names; tensors whose name has one get weights of their own.
    split: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    # Whether weights are tuned by gradient; auto: where a method and the tasks have gradients.
    tune: Literal["auto"] | bool = "auto"
    tune_by: TunedUnit = "tensor"  # what has a tuned weight of its own
    trials: Count = 100  # recipes to evaluate at most
    finalists: Count = 8  # recipes compared on the select split
    sampler: str = "auto"  # a key of `SAMPLERS`, or `package.module:Class`
    # Recipes, or folders of runs that found them, to be evaluated first.
    start: tuple[Path, ...] = ()
    front: bool = False  # look for the Pareto front of the tasks, besides the best mean
    # End early when the expected improvement is below what the select split resolves.
    stop: bool = True
    seed: Seed = 0  # the same seed evaluates the same recipes


class StudySpec(FrozenModel):
    """A whole study."""

    base_model: str  # absolute folder or hub id, like each of the models
    # The donors: a model whose task vector starts from the base, or a difference.
    models: tuple[str | ModelDifference, ...] = Field(min_length=1)
    dtype: DtypeName | None = None  # of the exported checkpoint; None: the base model's
    # Vocabulary of every candidate, as in recipes; None: the base's, which all models then share.
    tokenizer: Tokenizer | None = None
    trust_remote_code: bool = False  # run Python files that come with the base model
    search: SearchSpec  # what is searched, and how
    objective: ObjectiveSpec  # what is evaluated, and how

    @property
    def models_read(self) -> tuple[str, ...]:
        """The base, and every other model that is read."""
        return (self.base_model, *self.models_but_base)

    @property
    def models_but_base(self) -> tuple[str, ...]:
        """Every model that is read besides the base, subtracted ones included, each once."""
        return models_but_base(self.base_model, self.models)


def as_differences(base: str, donors: Iterable[str | ModelDifference]) -> list[ModelDifference]:
    """Return each donor as a difference; a model stands for its difference to the base."""
    return [
        donor if isinstance(donor, ModelDifference) else ModelDifference(model=donor, minus=base)
        for donor in donors
    ]


def models_but_base(base: str, donors: Iterable[str | ModelDifference]) -> tuple[str, ...]:
    """Return the models that the donors are made of, without the base, each once."""
    differences = as_differences(base, donors)
    names = dict.fromkeys(name for one in differences for name in (one.model, one.minus))
    return tuple(name for name in names if name != base)
