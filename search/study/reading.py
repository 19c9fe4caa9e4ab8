"""study.yaml to ``StudySpec``: paths made absolute, defaults filled in, contradictions refused."""

from __future__ import annotations

import glob
import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from merge_engine.errors import MergeError, check_keys, first_error, reason
from merge_engine.methods import METHODS
from merge_engine.plain_files import is_there, other_than_file
from merge_engine.recipe.recipe import Tokenizer
from merge_engine.recipe.recipe_file import rename_models, tokenizer_entries
from merge_engine.schema import find_file, find_folder, load_yaml
from objectives.base import time_limit
from objectives.entries import ENTRY_KINDS, Entry
from search.study.parameters import (
    DIFFERENCE_METHODS,
    TUNING_SAMPLERS,
    allowed_methods,
    names_all_models,
    searchable,
    tuning_method,
)
from search.study.sampler_table import SAMPLERS, find_sampler
from search.study.spec import (
    ItemCounts,
    ModelDifference,
    ObjectiveSpec,
    SearchSpec,
    StudyError,
    StudySpec,
    as_differences,
)

_TEXTS, _GLOB_SECONDS = 10_000, 10.0  # limits of a pattern of text files


def load_study(path: Path) -> StudySpec:
    """Read a study file; its relative paths count from the file's own folder."""
    try:
        return parse_study(load_yaml(path), path.parent, where=str(path))
    except MergeError as error:
        raise StudyError(str(error)) from None


def parse_study(mapping: Mapping[str, Any], folder: Path, where: str) -> StudySpec:
    """Check a study given as a mapping; ``load_study`` without the file.

    Relative paths count from ``folder``; ``where`` begins every error message.

    Raises:
        StudyError, MergeError: What is wrong, where, and what to do.
    """
    if "merge_method" in mapping:
        raise StudyError(
            f"{where}: 'merge_method' makes it a recipe and no study; `mergesearch build` merges it"
        )
    blocks = {name: _block(mapping, name, where) for name in ("search", "objective")}
    check_keys(where, mapping, {*StudySpec.model_fields, "tokenizer_source"})
    check_keys(f"{where}: objective", blocks["objective"], ObjectiveSpec.model_fields)
    models = mapping.get("models")
    if isinstance(models, list):
        models = [_donor(model, folder, f"{where}: models[{i}]") for i, model in enumerate(models)]
    donors = models if isinstance(models, list) else []
    mapping = _with_tokenizer(mapping, folder, where)
    aligned = mapping.get("tokenizer") is not None
    blocks["search"] = _search(blocks["search"], donors, folder, where, aligned)
    blocks["objective"] = _objective(blocks["objective"], folder, where)
    base = _model(mapping.get("base_model"), folder)
    try:
        spec = StudySpec.model_validate(
            dict(mapping) | blocks | {"base_model": base, "models": models}
        )
    except ValidationError as error:
        message = first_error(error).replace("search.ranges.", "search.")  # as the study has it
        raise StudyError(f"{where}: {message}") from None
    _check(spec, where)
    return spec


# Normalising: from what the user may write to what the models of ``spec`` take.


def _block(mapping: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    block = mapping.get(name)
    if not isinstance(block, dict | None):
        raise StudyError(f"{where}: {name!r} has to be a mapping, got {block!r}")
    return dict(block or {})


def _model(model: object, folder: Path) -> object:
    """Return a model's absolute folder, or its hub id; BASE+ADAPTER is resolved part by part."""
    if isinstance(model, str) and (found := find_folder(model, folder)):
        return str(found.resolve())
    if isinstance(model, str) and "+" in model:
        return "+".join(str(_model(part, folder)) for part in model.split("+"))
    return model


def _donor(donor: object, folder: Path, where: str) -> object:
    if isinstance(donor, str):
        return _model(donor, folder)
    if not isinstance(donor, dict):
        raise StudyError(f"{where} has to be a model or {{model, minus}}, got {donor!r}")
    check_keys(where, donor, ModelDifference.model_fields)
    try:
        return ModelDifference.model_validate(
            {key: _model(name, folder) for key, name in donor.items()}
        )
    except ValidationError as error:
        raise StudyError(f"{where}: {first_error(error)}") from None


def _with_tokenizer(mapping: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Return the study with ``tokenizer`` checked, in place of the short ``tokenizer_source``."""
    for path, entry, kind in tokenizer_entries(mapping, where):
        check_keys(path, entry, kind.model_fields)
    study = dict(mapping)
    source = study.pop("tokenizer_source", None)
    if (raw := study.get("tokenizer") if source is None else {"source": source}) is None:
        return study
    try:
        tokenizer = Tokenizer.model_validate(raw)
    except ValidationError as error:
        raise StudyError(f"{where}: tokenizer.{first_error(error)}") from None
    return study | {"tokenizer": rename_models(tokenizer, lambda name: str(_model(name, folder)))}


def _search(
    raw: dict[str, Any], donors: Sequence[object], folder: Path, where: str, aligned: bool
) -> dict[str, Any]:
    """Return the search block with parameters gathered under ``ranges`` and methods filled in."""
    at_most = raw.get("at_most")
    most = at_most if isinstance(at_most, int) and at_most > 0 else None  # else refused later
    allowed = allowed_methods(donors, most, aligned=aligned)
    methods = raw.get("methods")
    if methods is None:
        # Not passthrough: the unmerged donors are evaluated anyway, as baselines.
        methods = [name for name in allowed if name != "passthrough"]
    if not isinstance(methods, list | tuple):
        raise StudyError(f"{where}: search.methods has to be a list, got {methods!r}")
    check_keys(f"{where}: search.methods", methods, METHODS, "method")
    own = set(SearchSpec.model_fields) - {"ranges"}
    check_keys(f"{where}: search", raw, {*own, *searchable(methods)})
    ranges = {name: value for name, value in raw.items() if name not in own}
    kept = {name: value for name, value in raw.items() if name in own}
    return kept | {
        "methods": methods,
        "ranges": ranges,
        "start": _paths(raw.get("start"), folder, f"{where}: search.start"),
    }


def _objective(raw: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    entries = raw.get("tasks", [])
    if not isinstance(entries, list | tuple):
        raise StudyError(f"{where}: objective.tasks has to be a list, got {entries!r}")
    raw["tasks"] = [
        _entry(entry, folder, f"{where}: objective.tasks[{index}]")
        for index, entry in enumerate(entries)
    ]
    if isinstance(items := raw.get("items"), dict):
        check_keys(f"{where}: objective.items", items, ItemCounts.model_fields)
    raw["include_path"] = _paths(
        raw.get("include_path"), folder, f"{where}: objective.include_path"
    )
    return raw


def _paths(raw: Any, folder: Path, where: str) -> list[Path]:
    """Return the absolute paths of one that is given alone, or of a list."""
    paths = [raw] if isinstance(raw, str) else [] if raw is None else raw
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str) for path in paths):
        raise StudyError(f"{where} has to be a path or a list of paths, got {raw!r}")
    try:
        return [(folder / path).resolve() for path in paths]
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a zero byte
        raise StudyError(f"{where}: {reason(error)}; correct it") from None


def _entry(raw: object, folder: Path, where: str) -> Entry:
    """Return an entry of the task list; its first key among ``ENTRY_KINDS`` says of which kind."""
    entry = {"task": raw} if isinstance(raw, str) else raw
    if not isinstance(entry, dict):
        raise StudyError(f"{where} has to be a name or a mapping, got {raw!r}")
    kind = next((kind for kind in ENTRY_KINDS if kind in entry), "task")
    check_keys(where, entry, ENTRY_KINDS[kind].model_fields)
    if kind == "text":
        entry = {"name": _text_name(entry["text"]), **entry}
        entry["text"] = _text_files(entry["text"], folder, where)
    try:
        return ENTRY_KINDS[kind].model_validate(entry)
    except ValidationError as error:
        raise StudyError(f"{where}: {first_error(error)}") from None


def _text_files(raw: object, folder: Path, where: str) -> list[Path]:
    """Return the files of paths and patterns, in the order given, each pattern's sorted."""
    patterns = [raw] if isinstance(raw, str) else raw
    if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
        raise StudyError(f"{where}: text has to be a path or a list of paths, got {raw!r}")
    files = []
    for pattern in patterns:
        wanted = str(folder / pattern)
        with time_limit(_GLOB_SECONDS, f"{where}: looking for {wanted}"):
            paths = [*itertools.islice(glob.iglob(wanted, recursive=True), _TEXTS + 1)]
            found = [name for name in sorted(paths) if find_file(name)]
        if len(paths) > _TEXTS:
            raise StudyError(f"{where}: {wanted} are more than {_TEXTS:,} files; name fewer")
        if not found:
            odd = [kind for name in paths if (kind := other_than_file(Path(name)))]
            fault = f"{wanted} is {odd[0]}, not a file" if odd else f"no file {wanted}"
            raise StudyError(f"{where}: {fault}; correct the path")
        for name in found:
            is_there(Path(name))  # or it may not be read
        files += [Path(name).resolve() for name in found]
    return files


def _text_name(raw: object) -> str:
    """Return ``books`` for both ``books/*.txt`` and ``books.txt``."""
    path = Path(str(raw[0] if isinstance(raw, list) and raw else raw))
    return path.parent.name if "*" in path.name else path.stem


# Checks across keys, which no single model of ``spec`` can make.


def _check(spec: StudySpec, where: str) -> None:
    _check_donors(spec, where)
    _check_methods(spec, where)
    _check_sampler(spec, where)
    _check_tuning(spec, where)
    for path in spec.search.start:
        if not (find_file(str(path)) or find_file("recipe.yaml", path)):
            raise StudyError(
                f"{where}: search.start: {path} is neither a recipe nor a run with a winner"
            )
    if spec.search.scale is not None:
        _check_range(where, "scale", spec.search.scale, (0.0, 100.0))
    known = searchable(spec.search.methods)
    for name, bounds in spec.search.ranges.items():
        _check_range(where, name, bounds, (0, 1) if known[name].kind is bool else known[name].valid)
    for path in spec.objective.include_path:
        if not find_folder(str(path)):
            raise StudyError(f"{where}: objective.include_path: no folder {path}")


def _check_donors(spec: StudySpec, where: str) -> None:
    """Check that donors differ, and that there are at least ``at_most`` of them."""
    differences = as_differences(spec.base_model, spec.models)
    for donor, one in zip(spec.models, differences, strict=True):
        if one.model == one.minus or differences.count(one) > 1:
            raise StudyError(f"{where}: models: {str(donor)!r} is named twice; name it once")
    used = spec.search.at_most or len(spec.models)
    if used > len(spec.models):
        raise StudyError(
            f"{where}: search.at_most: {used} is more than the {len(spec.models)} models; leave it "
            "out or name a smaller number"
        )


def _check_methods(spec: StudySpec, where: str) -> None:
    """Check that the methods can merge the donors, or as many of them as a recipe may use."""
    differ = any(isinstance(donor, ModelDifference) for donor in spec.models)
    used = spec.search.at_most or len(spec.models)
    for method in spec.search.methods:
        if differ and method not in DIFFERENCE_METHODS:
            raise StudyError(
                f"{where}: search.methods: {method} works on each model's own task vector and "
                f"cannot add a difference (minus) of two; use {', '.join(DIFFERENCE_METHODS)}"
            )
        if spec.tokenizer and not names_all_models(method, len(spec.models), used):
            raise StudyError(
                f"{where}: search.methods: the recipes of {method} do not name the base and all "
                "models, of which the study's tokenizer is made; leave it out"
            )
        if method not in allowed_methods(spec.models, used):
            few, remedy = f"got {used}", "add models"
            if used < len(spec.models):
                few, remedy = f"search.at_most is {used}", "raise that"
            raise StudyError(
                f"{where}: search.methods: {method} needs {METHODS[method].donors[0]} models or "
                f"more, {few}; leave it out or {remedy}"
            )
    if differ and "normalize" in spec.search.ranges:
        raise StudyError(
            f"{where}: search.normalize: the weights of a difference (minus) sum to zero and "
            "cannot be normalized; leave it out"
        )


def _check_sampler(spec: StudySpec, where: str) -> None:
    """Check that the sampler is known, installed, and fits what is searched."""
    search, name = spec.search, spec.search.sampler
    if (entry := find_sampler(name)) is None:
        check_keys(f"{where}: search.sampler", [name], SAMPLERS, "sampler")
        return
    if entry.needs and not importlib.util.find_spec(entry.needs):
        raise StudyError(
            f"{where}: search.sampler: {name} needs the package {entry.needs}; "
            f"pip install 'mergesearch[{entry.needs}]'"
        )
    if name == "grid" and search.scale and len(set(search.scale)) == 1:
        raise StudyError(f"{where}: search.sampler: a grid needs a range of scale, like [0, 1]")
    if name == "grid" and (search.at_most or len(spec.models)) < len(spec.models):
        raise StudyError(
            f"{where}: search.sampler: a grid merges all models evenly, which search.at_most "
            "forbids; leave one of the two out"
        )
    if search.front and not entry.many_objectives:
        able = [other for other, row in SAMPLERS.items() if row.many_objectives]
        raise StudyError(
            f"{where}: search.front: the sampler {name!r} has one objective, the mean; "
            f"use one of {', '.join(able)}"
        )
    if spec.objective.has_constraints and not entry.constraints:
        raise StudyError(
            f"{where}: objective.constraints: the sampler {name!r} ignores constraints; use 'auto'"
        )


def _check_tuning(spec: StudySpec, where: str) -> None:
    """Check that a study with ``tune: true`` can be tuned."""
    if spec.search.tune is True and spec.objective.items.tune == 0:
        raise StudyError(
            f"{where}: search.tune is true but objective.items.tune is 0; leave one of them out"
        )
    if spec.search.tune is not True or tuning_method(spec):
        return
    if spec.search.sampler not in TUNING_SAMPLERS:
        raise StudyError(
            f"{where}: search.tune: the sampler {spec.search.sampler!r} does not model tuned "
            "weights; use auto, or leave tune out"
        )
    able = [name for name, row in METHODS.items() if row.differentiable]
    raise StudyError(
        f"{where}: search.tune: {', '.join(spec.search.methods)} has no gradient; add one of "
        f"{', '.join(able)} to search.methods, or leave tune out"
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
