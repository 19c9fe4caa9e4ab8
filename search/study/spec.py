"""study.yaml: what the user wants, checked once, with every path absolute."""

from __future__ import annotations

import glob
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from merge_engine.errors import MergeError, check_keys, first_error
from merge_engine.methods import METHODS, Base, Param
from merge_engine.recipe.recipe import DtypeName, load_yaml

# These add up task vectors as they are; the others trim or compare each model's own.
OF_DIFFERENCES: Final = ("task_arithmetic",)

CMA_SAMPLERS: Final = ("cmaes", "catcma")  # these need the package cmaes
FRONT_SAMPLERS: Final = ("auto", "gp", "sobol", "random")  # these do not follow one goal
SAMPLERS: Final = (*FRONT_SAMPLERS, *CMA_SAMPLERS, "tpe", "nsga2", "nsga3", "grid")


class StudyError(ValueError):
    """A study, option or run folder that cannot be used; the message says what to do."""


def _as_range(raw: object) -> object:
    return raw if isinstance(raw, list | tuple) else (raw, raw)


# A number fixes a parameter; [low, high] searches it.
Range = Annotated[tuple[float, float], BeforeValidator(_as_range)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BelowBase(_Frozen):
    """A floor: what the base model scores on the same items, less ``margin``."""

    margin: NonNegativeFloat


def _as_floor(raw: object) -> object:
    """A floor as the user writes it: a number, or ``base - 0.02``."""
    if not isinstance(raw, str):
        return raw
    if match := re.fullmatch(r"base(?:\s*-\s*(\d*\.?\d+))?", raw.strip()):
        return BelowBase(margin=float(match[1] or 0))
    raise ValueError("a floor is a number, or one like 'base - 0.02'")


Floor = Annotated[float | BelowBase, BeforeValidator(_as_floor)]


class Task(_Frozen):
    """A benchmark task: an lm-eval name, the metric to use and its weight in the mean."""

    task: str
    metric: str | None = None
    weight: PositiveFloat = 1.0
    num_fewshot: NonNegativeInt | None = None


class Text(_Frozen):
    """Plain text to be predicted: files, or patterns like ``books/*.txt``, and what an item is."""

    text: tuple[Path, ...] = Field(min_length=1)
    name: str = Field(min_length=1)
    unit: Literal["document", "paragraph", "line"] = "paragraph"
    weight: PositiveFloat = 1.0


class OwnObjective(_Frozen):
    """The user's own class, as ``package.module:Class``, and its options."""

    objective: str
    options: dict[str, Any] = Field(default_factory=dict)
    weight: PositiveFloat = 1.0


ENTRIES: dict[str, type[Task | Text | OwnObjective]] = {
    "task": Task,
    "text": Text,
    "objective": OwnObjective,
}


class ItemCounts(_Frozen):
    """How many items, over all tasks, to search on, to choose the winner on and to test on."""

    search: PositiveInt = 200
    select: PositiveInt = 200
    test: PositiveInt = 400


class Objective(_Frozen):
    """What is scored: ``constraints`` are floors on tasks' means, ``block`` items per step.

    ``max_mean_tokens`` is a limit like them: on what a model writes for an item, in the mean.
    Chat template and system instruction are the same for every task and every candidate.
    ``unsafe_code`` lets tasks through that run code a model wrote, unprotected, on this machine.
    """

    tasks: tuple[Task | Text | OwnObjective, ...] = Field(min_length=1)
    include_path: tuple[Path, ...] = ()
    items: ItemCounts = ItemCounts()
    constraints: dict[str, Floor] = Field(default_factory=dict)
    max_mean_tokens: PositiveFloat | None = None

    @property
    def is_limited(self) -> bool:
        """Whether a recipe can miss something."""
        return bool(self.constraints) or self.max_mean_tokens is not None

    apply_chat_template: bool = False
    system_instruction: str | None = None
    unsafe_code: bool = False
    batch_size: PositiveInt = 64
    block: PositiveInt = 20


class TaskVector(_Frozen):
    """A donor that is the difference of two models: what ``model`` has learned beyond ``minus``."""

    model: str
    minus: str

    def __str__(self) -> str:
        return f"{self.model} - {self.minus}"


class Search(_Frozen):
    """What is searched: ``scale`` is the donors' mean weight, ``ranges`` by parameter name.

    ``start`` are recipes, or folders of runs that found them, to be tried first. With ``front``
    the recipes that none beats on every task are looked for, besides the best mean; with ``cost``
    to write little is one more of the tasks. With ``stop`` the search ends before its trials do
    when nothing that could be told is left to gain.
    """

    methods: tuple[str, ...] = Field(min_length=1)
    scale: Range = (0.0, 1.5)
    ranges: dict[str, Range] = Field(default_factory=dict)
    layer_groups: PositiveInt = 1
    split: tuple[str, ...] = ()
    trials: PositiveInt = 100
    finalists: PositiveInt = 8
    sampler: str = "auto"
    start: tuple[Path, ...] = ()
    front: bool = False
    cost: bool = False
    stop: bool = True
    seed: NonNegativeInt = 0


class StudySpec(_Frozen):
    """A whole study. ``base_model`` and ``models`` are absolute folders or hub ids.

    ``models`` are the donors: a model whose task vector starts from the base, or a difference.
    ``trust_remote_code`` runs Python files that come with the base model.
    """

    base_model: str
    models: tuple[str | TaskVector, ...] = Field(min_length=1)
    dtype: DtypeName | None = None
    trust_remote_code: bool = False
    search: Search
    objective: Objective

    @property
    def beside_base(self) -> tuple[str, ...]:
        """Every model but the base, those that are subtracted, too."""
        return beside_base(self.base_model, self.models)


def task_vectors(base: str, donors: Iterable[str | TaskVector]) -> list[TaskVector]:
    """Each donor as a difference: that of a model is to the base."""
    return [
        donor if isinstance(donor, TaskVector) else TaskVector(model=donor, minus=base)
        for donor in donors
    ]


def beside_base(base: str, donors: Iterable[str | TaskVector]) -> tuple[str, ...]:
    """Every model that the donors are made of but the base, each once."""
    vectors = task_vectors(base, donors)
    names = dict.fromkeys(name for one in vectors for name in (one.model, one.minus))
    return tuple(name for name in names if name != base)


def load_study(path: Path) -> StudySpec:
    """Read a study file; its relative paths count from the file's own folder.

    Raises:
        StudyError: What is wrong, where, and what to do.
    """
    try:
        return parse_study(load_yaml(path), path.parent, where=str(path))
    except MergeError as error:
        raise StudyError(str(error)) from None


def parse_study(mapping: Mapping[str, Any], folder: Path, where: str) -> StudySpec:
    """Check a study's mapping; ``load_study`` without the file."""
    if "merge_method" in mapping:
        raise StudyError(
            f"{where}: 'merge_method' makes it a recipe and no study; `mergesearch build` merges it"
        )
    parts = {name: _mapping(mapping, name, where) for name in ("search", "objective")}
    check_keys(where, mapping, StudySpec.model_fields)
    check_keys(f"{where}: objective", parts["objective"], Objective.model_fields)
    models = mapping.get("models")
    if isinstance(models, list):
        models = [_donor(model, folder, f"{where}: models[{i}]") for i, model in enumerate(models)]
    parts["search"] = _search(parts["search"], models if isinstance(models, list) else [], where)
    parts["search"]["start"] = _paths(parts["search"].get("start"), folder)
    parts["objective"] = _objective(parts["objective"], folder, where)
    try:
        spec = StudySpec.model_validate(
            dict(mapping)
            | parts
            | {"base_model": _model(mapping.get("base_model"), folder), "models": models}
        )
    except ValidationError as error:
        raise StudyError(f"{where}: {first_error(error)}") from None
    _check(spec, where)
    return spec


def _mapping(mapping: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    part = mapping.get(name) or {}
    if not isinstance(part, dict):
        raise StudyError(f"{where}: {name!r} has to be a mapping, got {part!r}")
    return dict(part)


def _model(model: object, folder: Path) -> object:
    if isinstance(model, str) and (folder / model).expanduser().is_dir():
        return str((folder / model).expanduser().resolve())
    if isinstance(model, str) and "+" in model:  # a base and its adapter
        return "+".join(str(_model(part, folder)) for part in model.split("+"))
    return model


def _donor(donor: object, folder: Path, where: str) -> object:
    """An entry of the models: a name, or a mapping of two."""
    if not isinstance(donor, dict):
        return _model(donor, folder)
    check_keys(where, donor, TaskVector.model_fields)
    try:
        return TaskVector.model_validate({key: _model(name, folder) for key, name in donor.items()})
    except ValidationError as error:
        raise StudyError(f"{where}: {first_error(error)}") from None


def _search(raw: dict[str, Any], donors: Sequence[object], where: str) -> dict[str, Any]:
    """The search block with parameters gathered under ``ranges`` and methods filled in."""
    # A donor as it is needs no method: it is scored anyway, to compare with.
    raw.setdefault("methods", [name for name in allowed_methods(donors) if name != "passthrough"])
    methods = raw["methods"]
    if not isinstance(methods, list | tuple):
        raise StudyError(f"{where}: search.methods has to be a list, got {methods!r}")
    check_keys(f"{where}: search.methods", methods, METHODS, "method")
    own = set(Search.model_fields) - {"ranges"}
    check_keys(f"{where}: search", raw, {*own, *searchable(methods)})
    ranges = {name: value for name, value in raw.items() if name not in own}
    return {name: value for name, value in raw.items() if name in own} | {"ranges": ranges}


def allowed_methods(donors: Sequence[object]) -> tuple[str, ...]:
    """Every method that a study with these donors can use."""
    known = OF_DIFFERENCES if any(isinstance(one, TaskVector) for one in donors) else METHODS
    return tuple(
        name
        for name in known
        if METHODS[name].donors[0] <= len(donors)
        and (METHODS[name].donors[1] != 2 or len(donors) >= 2)
    )


def searchable(methods: Iterable[str]) -> dict[str, Param]:
    """Parameters of these methods that a study can fix or search by name.

    ``weight``, ``lambda`` and slerp's ``t`` are not among them: they follow from scale and mixture.
    ``scale`` is the study's own word, not passthrough's.
    """
    found: dict[str, Param] = {}
    for method in methods:
        row = METHODS[method]
        derived = {"weight", "lambda", "scale"} | ({"t"} if row.base is Base.ENDPOINT else set())
        for name, param in row.params.items():
            new = name not in found or found[name].search is None
            if param.effect and name not in derived and new:
                found[name] = param
    return found


def followers(name: str, methods: Iterable[str]) -> tuple[str, ...]:
    """The methods whose parameter follows the study's ``name``.

    Some methods mean different things by one name (``epsilon`` of della and of ram). It is then
    theirs for whom the table has a range to search; the others keep their default.
    """
    having = tuple(method for method in methods if name in searchable((method,)))
    searched = tuple(m for m in having if METHODS[m].params[name].search is not None)
    return searched or having


def _objective(raw: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    entries = raw.get("tasks") or []
    if not isinstance(entries, list | tuple):
        raise StudyError(f"{where}: objective.tasks has to be a list, got {entries!r}")
    raw["tasks"] = [
        _entry(entry, folder, f"{where}: objective.tasks[{index}]")
        for index, entry in enumerate(entries)
    ]
    if isinstance(items := raw.get("items"), dict):
        check_keys(f"{where}: objective.items", items, ItemCounts.model_fields)
    raw["include_path"] = _paths(raw.get("include_path"), folder)
    return raw


def _paths(raw: Any, folder: Path) -> list[Path]:
    """One path or several, made absolute."""
    return [(folder / path).resolve() for path in ([raw] if isinstance(raw, str) else raw or [])]


def _entry(raw: object, folder: Path, where: str) -> Task | Text | OwnObjective:
    """One entry of the task list; which kind it is, its first key of ``ENTRIES`` says."""
    entry = {"task": raw} if isinstance(raw, str) else raw
    if not isinstance(entry, dict):
        raise StudyError(f"{where} has to be a name or a mapping, got {raw!r}")
    kind = next((kind for kind in ENTRIES if kind in entry), "task")
    check_keys(where, entry, ENTRIES[kind].model_fields)
    if kind == "text":
        entry = {"name": _text_name(entry["text"]), **entry}
        entry["text"] = _text_files(entry["text"], folder, where)
    try:
        return ENTRIES[kind].model_validate(entry)
    except ValidationError as error:
        raise StudyError(f"{where}: {first_error(error)}") from None


def _text_files(raw: object, folder: Path, where: str) -> list[Path]:
    """The files of paths and patterns, in the order given, each pattern's sorted."""
    files = []
    for pattern in [raw] if isinstance(raw, str) else raw if isinstance(raw, list) else []:
        found = sorted(glob.glob(str(folder / str(pattern)), recursive=True))
        if not (found := [name for name in found if Path(name).is_file()]):
            raise StudyError(f"{where}: no file {folder / str(pattern)}")
        files += [Path(name).resolve() for name in found]
    return files


def _text_name(raw: object) -> str:
    """``books/*.txt`` and ``books.txt`` are both called books."""
    path = Path(str(raw[0] if isinstance(raw, list) and raw else raw))
    return path.parent.name if "*" in path.name else path.stem


def _check(spec: StudySpec, where: str) -> None:
    _check_donors(spec, where)
    _check_ways(spec.search, where)
    _check_goals(spec, where)
    _check_range(where, "scale", spec.search.scale, (0.0, 100.0))
    known = searchable(spec.search.methods)
    for name, bounds in spec.search.ranges.items():
        _check_range(where, name, bounds, (0, 1) if known[name].kind is bool else known[name].valid)
    for path in spec.objective.include_path:
        if not path.is_dir():
            raise StudyError(f"{where}: objective.include_path: no folder {path}")


def _check_donors(spec: StudySpec, where: str) -> None:
    """Check the models, and whether the methods can use them."""
    vectors = task_vectors(spec.base_model, spec.models)
    for donor, vector in zip(spec.models, vectors, strict=True):
        if vector.model == vector.minus or vectors.count(vector) > 1:
            raise StudyError(f"{where}: models: {str(donor)!r} is named twice; name it once")
    differ = any(isinstance(donor, TaskVector) for donor in spec.models)
    for method in spec.search.methods:
        if differ and method not in OF_DIFFERENCES:
            raise StudyError(
                f"{where}: search.methods: {method} works on each model's own task vector and "
                f"cannot add a difference (minus) of two; use {', '.join(OF_DIFFERENCES)}"
            )
        if method not in allowed_methods(spec.models):
            raise StudyError(
                f"{where}: search.methods: {method} needs {METHODS[method].donors[0]} models or "
                f"more, got {len(spec.models)}; leave it out or add models"
            )
    if differ and "normalize" in spec.search.ranges:
        raise StudyError(
            f"{where}: search.normalize: the weights of a difference (minus) sum to zero and "
            "cannot be normalized; leave it out"
        )


def _check_ways(search: Search, where: str) -> None:
    """Check how the study is searched."""
    check_keys(f"{where}: search.sampler", [search.sampler], SAMPLERS, "sampler")
    if search.sampler in CMA_SAMPLERS and not importlib.util.find_spec("cmaes"):
        raise StudyError(
            f"{where}: search.sampler: {search.sampler} needs the package cmaes; "
            "pip install 'mergesearch[cmaes]'"
        )
    if search.sampler == "grid" and len(set(search.scale)) == 1:
        raise StudyError(f"{where}: search.sampler: a grid needs a range of scale, like [0, 1]")
    for path in search.start:
        if not (path / "recipe.yaml" if path.is_dir() else path).is_file():
            raise StudyError(f"{where}: search.start: {path} is no recipe, and no run that has one")


def _check_goals(spec: StudySpec, where: str) -> None:
    """Check what is searched for."""
    search = spec.search
    if search.front and search.sampler not in FRONT_SAMPLERS:
        raise StudyError(
            f"{where}: search.front: the sampler {search.sampler!r} looks for one goal alone; "
            f"use one of {', '.join(FRONT_SAMPLERS)}"
        )
    if search.cost and not search.front:
        raise StudyError(
            f"{where}: search.cost is a goal beside others; set search.front: true, or limit it "
            "with objective.max_mean_tokens"
        )
    if search.sampler == "cmaes" and spec.objective.is_limited:
        raise StudyError(
            f"{where}: objective.constraints: the sampler 'cmaes' knows no floors; use 'catcma'"
        )


def _check_range(
    where: str, name: str, bounds: tuple[float, float], valid: tuple[float, float]
) -> None:
    low, high = bounds
    if not valid[0] <= low <= high <= valid[1]:
        raise StudyError(
            f"{where}: search.{name}: [{low:g}, {high:g}] is not a range within "
            f"[{valid[0]:g}, {valid[1]:g}]"
        )


Split = Literal["search", "select", "test"]
