"""A common vocabulary for models with different ones: the result's tokenizer and rows.

Tensors with one row per token (embedding, head) are mapped to the result's rows model by model,
before they are merged. A token that a model lacks gets the base's row; if the base lacks it too,
the mean of the rows of the models that have it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_engine.errors import MergeError, reason
from merge_engine.models.alignment import is_multimodal
from merge_engine.models.chat_templates import CHAT_TEMPLATES
from merge_engine.models.checkpoint import Checkpoint, Reader, with_rows
from merge_engine.models.model_folder import read_json
from merge_engine.models.opening import open_model
from merge_engine.models.tensor_names import input_embedding
from merge_engine.recipe.recipe import Recipe, Tokenizer, TokenOfModel, ZeroRow

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SPECIAL_ID = re.compile(r"\w+_token_(id|index)")  # keys of configs: eos_token_id and the like


@dataclass(frozen=True)
class Vocabulary:
    """The result's tokenizer, and the map from each model's rows to the result's."""

    settings: Tokenizer  # the recipe's or study's entry
    tokenizer: Any
    size: int  # number of rows of the result, padding included
    rows: Mapping[str, Tensor]  # by model: its own row of each token id of the result; -1: none
    fixed: Mapping[int, tuple[str, int] | None]  # token id -> row that the recipe gives; None: 0
    forced: frozenset[int]  # token ids that get the given row even in models that have one
    # Token ids of the reference -> those of the result; None: the result lacks the token.
    renumbered: Mapping[int, int | None]

    def align(self, model: str, models: Sequence[str], base: str | None, read: Reader) -> Tensor:
        """Return one model's tensor with the result's rows: (size, *) float32.

        Padding rows are the mean of the others. ``models`` are all that have the tensor, and
        ``read`` reads a model's tensor as stored, one row per token.

        Raises:
            MergeError: The recipe takes a row from a model that lacks the tensor.
        """
        own, rows = read(model).float(), self.rows[model]
        result = own.new_zeros(self.size, *own.shape[1:])
        kept = rows >= 0
        kept[sorted(self.forced)] = False
        result[: len(rows)][kept] = own[rows[kept]]
        given = torch.tensor(sorted(self.fixed), dtype=torch.long)
        lacking = ~kept
        for number in given[lacking[given]].tolist():
            if source := self.fixed[number]:
                if source[0] not in models:
                    raise MergeError(
                        f"tokenizer.tokens: {source[0]!r} has no such rows; name one of {[*models]}"
                    )
                result[number] = read(source[0])[source[1]].float()
        lacking[given] = False
        if lacking.any():
            self._fill(result, lacking, [base] if base in models else [], read)
            self._fill(result, lacking, models, read)
        result[len(rows) :] = result[: len(rows)].mean(0)
        return result

    def _fill(self, result: Tensor, lacking: Tensor, models: Sequence[Any], read: Reader) -> None:
        """Fill lacking rows with the mean over the models that have them, and unmark them."""
        count = torch.zeros(len(lacking))
        for model in models:
            has = lacking & (self.rows[model] >= 0)
            count += has
            if has.any():
                result[: len(has)][has] += read(model).float()[self.rows[model][has]]
        found = count > 0
        divisor = count[found].reshape(-1, *[1] * (result.dim() - 1))
        result[: len(found)][found] /= divisor
        lacking &= ~found

    def renumber(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config, or generation config, with the result's ids of special tokens.

        If the result lacks a token, its tokenizer's token for that purpose is used, or None.
        """

        def change(key: str, number: Any) -> Any:
            if isinstance(number, list):
                found = [change(key, each) for each in number]
                return [each for each in dict.fromkeys(found) if each is not None] or None
            new = self.renumbered.get(number, number) if isinstance(number, int) else number
            return getattr(self.tokenizer, key, None) if new is None else new

        special = {key: old for key, old in config.items() if _SPECIAL_ID.fullmatch(key)}
        ids = {key: change(key, old) for key, old in special.items() if old is not None}
        return {**config, **ids}

    def resize(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config with the result's number of rows and ids of special tokens."""
        changed = self.renumber(config)
        if is_multimodal(config):
            changed["text_config"] = self.renumber(config["text_config"])
        return with_rows(changed, self.size)


def make_vocabulary(
    settings: Tokenizer, checkpoints: Mapping[str, Checkpoint], base: str
) -> Vocabulary:
    """Read the models' tokenizers, and make the result's, in which the base's tokens come first.

    Raises:
        MergeError: A tokenizer is missing or cannot be used, or no model has a token's row.
    """
    first = load_tokenizer(checkpoints[base])
    tokenizers = {
        model: _load(each.tokenizer_folder) or first for model, each in checkpoints.items()
    }
    heights = {model: _height(each) for model, each in checkpoints.items()}
    out = _tokenizer(settings, tokenizers, heights, base)
    out.add_tokens([token for token in settings.tokens if token not in out.get_vocab()])
    tokens = out.get_vocab()
    if lost := [token for token in settings.tokens if token not in tokens]:
        raise MergeError(f"tokenizer.tokens: {lost[0]!r} cannot be a token; leave it out")
    count = max(tokens.values()) + 1
    multiple = settings.pad_to_multiple_of or 1
    numbers = {model: tokenizer.get_vocab() for model, tokenizer in tokenizers.items()}
    own = {number: token for token, number in numbers[base].items()}
    return Vocabulary(
        settings=settings,
        tokenizer=out,
        size=-(-count // multiple) * multiple,
        rows={m: _rows(tokens, count, numbers[m], heights[m]) for m in checkpoints},
        fixed=_fixed(settings, tokens, numbers, heights),
        forced=frozenset(tokens[token] for token, way in settings.tokens.items() if way.force),
        renumbered={number: tokens.get(token) for number, token in own.items()},
    )


def with_chat_template(tokenizer: Any, recipe: Recipe, models: Mapping[str, Checkpoint]) -> Any:
    """Set the recipe's chat template of a tokenizer, and return it.

    Raises:
        MergeError: The template is neither ``auto``, a name in CHAT_TEMPLATES nor Jinja.
    """
    template = recipe.chat_template
    if template == "auto":
        found = [_load(checkpoint.tokenizer_folder) for checkpoint in models.values()]
        texts = [text.strip() for each in found if (text := _main_template(each))]
        template = Counter(texts).most_common(1)[0][0] if texts else None
    elif template and template in CHAT_TEMPLATES:
        template = CHAT_TEMPLATES[template]
    elif template and (len(template) < 20 or "{" not in template):
        raise MergeError(
            f"chat_template: {template!r} is neither 'auto' nor the text of a template, nor one of "
            f"{', '.join(CHAT_TEMPLATES)}; give one of these"
        )
    if template:
        tokenizer.chat_template = template
    return tokenizer


def _main_template(tokenizer: Any) -> str | None:
    """Return a tokenizer's chat template; of several by name, the default one."""
    template = tokenizer.chat_template if tokenizer else None
    return template.get("default") if isinstance(template, dict) else template


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer; raise MergeError if it has none or a damaged one."""
    check_tokenizer(checkpoint)
    return _load(checkpoint.tokenizer_folder, trust_remote_code)


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Raise MergeError if a model has no tokenizer, without loading it."""
    if not _has_tokenizer(checkpoint.tokenizer_folder):
        raise MergeError(
            f"model {checkpoint.model!r}: no tokenizer in {checkpoint.folder}; fetch it again"
        )


def _has_tokenizer(folder: Path) -> bool:
    patterns = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.tiktoken")
    return any(file for pattern in patterns for file in folder.glob(pattern))


def _load(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer in a folder; None if there is none."""
    if not _has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    for name in _SETTINGS:
        if (folder / name).is_file():
            read_json(folder / name)  # refuses what transformers would read, such as a key twice
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each tokenizer class raises its own
        raise MergeError(
            f"{folder}: cannot read its tokenizer: {reason(error)}; fetch its files again"
        ) from None


def _height(checkpoint: Checkpoint) -> int:
    name = input_embedding(checkpoint.tensors)
    if name is None:
        raise MergeError(
            f"model {checkpoint.model!r}: none of its tensors is known as the embedding, so its "
            "rows cannot be mapped to another vocabulary; leave the tokenizer options out"
        )
    return checkpoint.tensors[name].shape[0]


def _tokenizer(
    settings: Tokenizer, tokenizers: Mapping[str, Any], heights: Mapping[str, int], base: str
) -> Any:
    """Return the result's tokenizer, without tokens that the recipe adds."""
    if settings.source not in ("base", "union"):
        folder = open_model(settings.source).tokenizer_folder
        if (named := _load(folder)) is None:
            raise MergeError(
                f"tokenizer source {settings.source!r}: no tokenizer in {folder}; name another"
            )
        return named
    out = deepcopy(tokenizers[base])
    if settings.source == "union":
        plain: dict[str, None] = {}
        special: dict[str, Any] = {}
        for model, tokenizer in tokenizers.items():
            added = tokenizer.added_tokens_decoder
            ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
            used = [(token, number) for token, number in ids if number < heights[model]]
            plain |= dict.fromkeys(token for token, number in used if number not in added)
            special |= {token: added[n] for token, n in used if n in added and token not in special}
        known = out.get_vocab()
        out.add_tokens([token for token in plain if token not in known and token not in special])
        out.add_tokens([token for name, token in special.items() if name not in known])
    return out


def _rows(tokens: Mapping[str, int], count: int, own: Mapping[str, int], height: int) -> Tensor:
    """Return a model's row of each of the result's token ids, (count,) int64; -1: none."""
    rows = torch.full((count,), -1)
    for token, number in tokens.items():
        if own.get(token, height) < height:
            rows[number] = own[token]
    return rows


def _fixed(
    settings: Tokenizer,
    tokens: Mapping[str, int],
    numbers: Mapping[str, Mapping[str, int]],
    heights: Mapping[str, int],
) -> dict[int, tuple[str, int] | None]:
    """Return the rows that the recipe names, by the result's token id: model and row, or None."""
    found: dict[int, tuple[str, int] | None] = {}
    for token, way in settings.tokens.items():
        where = f"tokenizer.tokens.{token}"
        source = way.source
        if source is None:
            continue  # the default rule
        if isinstance(source, ZeroRow):
            found[tokens[token]] = None
            continue
        if isinstance(source, str):
            source = TokenOfModel(kind="model_token", model=source, token=token)
        model, row = source.model, source.token_id
        if model not in numbers:
            raise MergeError(
                f"{where}: {model!r} is not one of the recipe's models; add it to them"
            )
        if row is None:
            row = numbers[model].get(str(source.token))
        if row is None or not 0 <= row < heights[model]:
            raise MergeError(f"{where}: {model!r} has no row for it; name another source")
        found[tokens[token]] = (model, row)
    return found
