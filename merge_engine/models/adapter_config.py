"""``adapter_config.json`` of a LoRA adapter: the settings that its weights depend on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import regex
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from merge_engine.errors import MergeError, first_error
from merge_engine.models.model_folder import read_json

# Settings that change the formula in unsupported ways, and what they are. Each is refused unless
# it is empty.
_REFUSED: Mapping[str, str] = {
    "target_parameters": "LoRA on parameters without a module of their own, as of fused experts",
    "layer_replication": "layers that are used several times",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "aLoRA, active from a token on",
    "arrow_config": "Arrow, a router of several adapters",
    "kasa_config": "KaSA",
}
# Initialisations that leave the base's weights unchanged; others take a part out of them.
_KEEP_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_T = TypeVar("_T")
_MATCH_SECONDS = 0.2  # for a pattern and a module's name


def _check_pattern(pattern: str) -> str:
    try:
        regex.compile(_ended(pattern))
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


def _ended(pattern: str) -> str:
    """Return the expression that peft matches with a module's name."""
    return rf"(.*\.)?({pattern})$"


def _check_rows(rows: list[int] | dict[str, list[int]]) -> list[int] | dict[str, list[int]]:
    for numbers in rows.values() if isinstance(rows, dict) else [rows]:
        if numbers and min(numbers) < 0:
            raise ValueError(f"{min(numbers)} is no row's number")
    return rows


def _of_module(module: str, by_pattern: Mapping[str, _T] | None, default: _T) -> _T:
    """Return the value of the first pattern that matches a module's name, else the default."""
    for pattern, own in (by_pattern or {}).items():
        if regex.match(_ended(pattern), module, timeout=_MATCH_SECONDS):
            return own
    return default


_Alpha = Annotated[float, Field(ge=-1e30, le=1e30)]  # of float32, in which it is multiplied
_Rows = Annotated[list[int] | dict[str, list[int]], AfterValidator(_check_rows)]
_Flag = Annotated[bool, BeforeValidator(lambda flag: flag is not None and flag)]  # null: false
_Pattern = Annotated[str, AfterValidator(_check_pattern)]


class AdapterConfig(BaseModel):
    """Settings of a LoRA adapter; peft's others do not matter to the merged weights.

    Types are strict, for peft would take the text "false" as true.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    base_model_name_or_path: str | None = None  # what it was trained on
    lora_alpha: _Alpha = 8  # numerator of the scale; peft refuses null, too
    r: int | None = None  # rank; the tensors' own if it is not said
    # Other alphas and ranks, by a pattern for the end of a module's name.
    alpha_pattern: dict[_Pattern, _Alpha] | None = None
    rank_pattern: dict[_Pattern, int] | None = None
    use_rslora: _Flag = False  # divide by the root of the rank, not the rank
    use_dora: _Flag = False  # a weight's norms are learned as well
    fan_in_fan_out: _Flag = False  # modules store their weights as (in, out), like GPT-2's
    modules_to_save: list[str] | None = None  # ends of names of modules that were trained in full
    # Rows of the input embedding that were trained, or of modules by the end of their names.
    trainable_token_indices: _Rows | None = None
    ensure_weight_tying: _Flag = False  # a tied head was changed with the embedding

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of a module's product of matrices.

        Raises:
            TimeoutError: A pattern takes too long to be matched.
        """
        alpha = _of_module(module, self.alpha_pattern, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank(self, module: str) -> int | None:
        """Return a module's rank, if it is said.

        Raises:
            TimeoutError: A pattern takes too long to be matched.
        """
        return _of_module(module, self.rank_pattern, self.r)

    def saves(self, module: str) -> bool:
        """Return whether a module was trained in full, as a copy of the base's."""
        return module.endswith(tuple(self.modules_to_save or ()))

    def token_rows(self, module: str) -> tuple[int, ...]:
        """Return which rows of a module's weight were trained."""
        rows = self.trainable_token_indices or []
        if isinstance(rows, dict):
            rows = next((of for end, of in rows.items() if module.endswith(end)), [])
        return tuple(rows)


def read_adapter_config(file: Path) -> AdapterConfig:
    """Read ``adapter_config.json``.

    Raises:
        MergeError: It is damaged, or of an adapter that cannot be computed here.
    """
    raw = read_json(file)
    try:
        config = AdapterConfig.model_validate(raw)
    except ValidationError as error:
        raise MergeError(
            f"{file}: damaged: {first_error(error)}; correct it, or fetch it again"
        ) from None
    if found := _unknown_formula(raw):
        raise MergeError(
            f"{file}: {found}, which is not supported; merge the adapter with peft "
            "(merge_and_unload) and name the result"
        )
    return config


def _unknown_formula(raw: Mapping[str, Any]) -> str | None:
    """Return the first setting that makes an adapter unsupported; None if there is none."""
    if (kind := raw.get("peft_type")) != "LORA":
        return f"peft_type is {kind!r}"
    init = raw.get("init_lora_weights")
    if init not in _KEEP_BASE:
        return f"init_lora_weights is {init!r}"
    for key, what in _REFUSED.items():
        if raw.get(key):
            return f"{key} is {raw[key]!r} ({what})"
    return None
