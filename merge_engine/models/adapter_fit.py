"""Fit a LoRA adapter to its base: check its changes against the base's tensors, untie a head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from merge_engine.errors import MergeError
from merge_engine.models.alignment import match_names
from merge_engine.models.lora import Adapter, Change
from merge_engine.models.tensor_names import (
    input_embedding,
    is_head_weight,
    is_vocabulary,
)

Shape = tuple[int, ...]

# Types of models whose modules store their weights as (in, out): transformers' Conv1D.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_MERGE = "merge the adapter with peft (merge_and_unload) and name the result"


@dataclass(frozen=True)
class AdapterBase:
    """The model that an adapter is added to."""

    model: str  # as the user named it
    folder: Path  # its files
    model_type: str | None  # of its config
    shapes: Mapping[str, Shape]  # of its tensors, by name


@dataclass(frozen=True)
class Fitted:
    """An adapter's changes of its base's tensors."""

    changes: Mapping[str, Change]  # by name
    shapes: Mapping[str, Shape]  # of the changed tensors, by name
    # Name of a head that the base ties to its embedding and the adapter unties.
    untied_head: str | None


def fit(adapter: Adapter, base: AdapterBase) -> Fitted:
    """Match an adapter's changes with its base's tensors.

    Raises:
        MergeError: The base lacks a tensor that is changed, or has it in another shape.
    """
    changes, head = _untied(adapter, base)
    stored = dict(base.shapes)
    if head and (embedding := input_embedding(stored)):
        stored[head] = stored[embedding]
    for name, change in changes.items():
        if name not in stored:
            raise MergeError(
                f"adapter {adapter.folder}: {_why_missing(name, change, adapter, base)}"
            )
    conv1d = base.model_type in _CONV1D_MODELS or _looks_like_conv1d(adapter, changes, stored)
    shapes: dict[str, Shape] = {}
    for name, change in changes.items():
        changes[name] = _oriented(change, adapter, stored[name]) if conv1d else change
        shapes[name] = _check_shapes(name, changes[name], adapter, base, stored[name])
    _check_rows(adapter, base, stored | shapes)
    return Fitted(changes, shapes, head)


def _untied(adapter: Adapter, base: AdapterBase) -> tuple[dict[str, Change], str | None]:
    """Return the changes, and the name of a head that they untie from the embedding.

    In training, a tied head is a separate module: a change of one does not change the other,
    unless the same rows are trained or ``ensure_weight_tying`` is set. peft's merge_and_unload adds
    low-rank changes of one to both, and warns that this is a different model.
    """
    changes = _as_stored(adapter.changes, base)
    embedding = input_embedding(base.shapes)
    if embedding is None or any(map(is_head_weight, base.shapes)):
        return changes, None
    default = "embed_out.weight" if "embed_in" in embedding else "lm_head.weight"
    head = next(filter(is_head_weight, changes), default)
    first, last = changes.pop(embedding, Change()), changes.pop(head, Change())
    first, last = (replace(each, base=first.base or last.base) for each in (first, last))
    if first != Change():
        changes[embedding] = first
    rows, its_rows = (each.rows and each.rows[1] for each in (first, last))
    if adapter.config.ensure_weight_tying and first != Change():
        return changes, None
    whole = first.saved or first.low_rank or last.saved or last.low_rank
    if not whole and (its_rows is None or its_rows == rows):
        return changes, None
    changes[head] = replace(last, rows=last.rows or first.rows)
    return changes, head


def _as_stored(changes: Mapping[str, Change], base: AdapterBase) -> dict[str, Change]:
    """Return changes by the base's stored names, which may differ from those in training."""
    others = [name for name in changes if name not in base.shapes and not is_head_weight(name)]
    weights = [name for name in others if name.endswith("weight")]
    found = match_names(base.folder, base.shapes, weights) if weights else {}
    return {found.get(name, name): change for name, change in changes.items()}


def _looks_like_conv1d(
    adapter: Adapter, changes: Mapping[str, Change], stored: Mapping[str, Shape]
) -> bool:
    """Return whether fan_in_fan_out is set, and a product fits the transpose of a weight only."""
    return adapter.config.fan_in_fan_out and any(
        _product(change, adapter) not in (None, stored[name])
        and _product(_oriented(change, adapter, stored[name]), adapter) == stored[name]
        for name, change in changes.items()
    )


def _product(change: Change, adapter: Adapter) -> Shape | None:
    """Return the shape of what is added to a weight; None if there is nothing."""
    if (low := change.low_rank) is None:
        return None
    shape = (adapter.shapes[low.up][0], adapter.shapes[low.down][1])
    return shape[::-1] if low.transposed else shape


def _oriented(change: Change, adapter: Adapter, stored: Shape) -> Change:
    """Return the change of a weight that is stored as (in, out), if its shape allows that."""
    low, product = change.low_rank, _product(change, adapter)
    if low is None or product is None or low.transposed or product[::-1] != stored:
        return change
    return replace(change, low_rank=replace(low, transposed=True))


def _check_shapes(
    name: str, change: Change, adapter: Adapter, base: AdapterBase, stored: Shape
) -> Shape:
    """Return a changed tensor's shape; refuse a change that does not fit."""
    whole = change.saved or change.base
    shape = adapter.shapes[whole] if whole else stored
    product = _product(change, adapter) or shape
    resized = is_vocabulary(name)
    for mine in (shape, product):
        if mine != stored and not (resized and mine[1:] == stored[1:]):
            raise MergeError(
                f"adapter {adapter.folder}: changes {name!r} of shape {list(mine)}, which in "
                f"{base.model!r} has {list(stored)}; {_trained_elsewhere(adapter, base)}"
            )
    last_row = max(change.rows[1], default=-1) if change.rows else -1
    if product != shape or last_row >= shape[0]:
        rows = product[0] if product != shape else last_row + 1
        raise MergeError(
            f"adapter {adapter.folder}: {name!r} had {rows} rows or more in training, which in "
            f"{base.model!r} has {shape[0]}, and the adapter lacks the others; name the "
            "resized base that it was trained on"
        )
    for key, needed in _other_shapes(change, shape):
        if adapter.shapes[key] != needed:
            raise MergeError(
                f"{adapter.weights}: {key!r} has the shape {list(adapter.shapes[key])} instead of "
                f"{list(needed)}; fetch it again"
            )
    return shape


def _other_shapes(change: Change, shape: Shape) -> Iterable[tuple[str, Shape]]:
    """Yield keys of a change's parts other than matrices, with the shapes they must have."""
    if (low := change.low_rank) and low.magnitude:
        yield low.magnitude, (shape[1 if low.transposed else 0],)
    if change.bias:
        yield change.bias[0], shape
    if change.rows:
        yield change.rows[0], (len(change.rows[1]), *shape[1:])


def _check_rows(adapter: Adapter, base: AdapterBase, shapes: Mapping[str, Shape]) -> None:
    """Refuse an adapter that gives the embedding and the head different numbers of rows."""
    before = {base.shapes[name][0] for name in base.shapes if is_vocabulary(name)}
    after = {name: shape[0] for name, shape in shapes.items() if is_vocabulary(name)}
    if len(before) == 1 and len(set(after.values())) > 1:
        raise MergeError(
            f"adapter {adapter.folder}: with it {base.model!r} would have different numbers of "
            f"rows, {', '.join(f'{rows} in {name!r}' for name, rows in after.items())}: it "
            "does not hold all rows that were added in training; name the resized base that it was "
            "trained on"
        )


def _why_missing(name: str, change: Change, adapter: Adapter, base: AdapterBase) -> str:
    """Return why the base has no tensor that the adapter changes, and the way out."""
    weight = f"{name.removesuffix('.bias')}.weight"
    if change.bias and weight in base.shapes:
        return f"lora_bias changes {name!r}, but {weight!r} has no bias in {base.model!r}; {_MERGE}"
    return f"changes {name!r}, which is not in {base.model!r}; {_trained_elsewhere(adapter, base)}"


def _trained_elsewhere(adapter: Adapter, base: AdapterBase) -> str:
    """Return the advice for an adapter that was trained on a model of other tensors."""
    trained_on = adapter.config.base_model_name_or_path
    if trained_on in (None, base.model):
        return f"it was trained on a model of this name with other tensors; {_MERGE}"
    return f"it was trained on {trained_on!r}; name that one before the '+'"
