"""One vocabulary for models that have different ones: the result's tokenizer, and all rows of it.

The tensors with one row per token (embedding, head) are brought to the result's rows model by model
before they are merged. A token that a model lacks gets the base's row; if the base lacks it too,
the mean of the rows of those that have it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import Checkpoint, locate
from merge_engine.models.tensor_names import input_embedding
from merge_engine.recipe.recipe import Recipe, Tokenizer, TokenOfModel, ZeroRow

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Vocabulary:
    """Which row of each model's embedding goes where.

    Args:
        tokenizer: The result's.
        size: Rows of the result, padding included.
        rows: For each model and each token of the result the model's own row, -1 if it has none.
        fixed: For tokens that the recipe gives a row: the model and row, or None for zeros.
        forced: Tokens whose own rows are replaced by the given one, too.
        renumbered: The result's number of each token of the model that gives the config.
    """

    tokenizer: Any
    size: int
    rows: Mapping[str, Tensor]
    fixed: Mapping[int, tuple[str, int] | None]
    forced: frozenset[int]
    renumbered: Mapping[int, int]

    def align(
        self, model: str, models: Sequence[str], base: str | None, read: Callable[[str], Tensor]
    ) -> Tensor:
        """One model's tensor with the result's rows.

        Args:
            model: Whose.
            models: All that have the tensor.
            base: The base among them, if there is one.
            read: Gives a model's tensor as stored, one row per token.

        Returns:
            Tensor of shape (size, *), float32; padding rows are the mean of the others.
        """
        own, rows = read(model).float(), self.rows[model]
        result = own.new_zeros(self.size, *own.shape[1:])
        kept = rows >= 0
        kept[sorted(self.forced)] = False
        result[: len(rows)][kept] = own[rows[kept]]
        given = torch.tensor(sorted(self.fixed), dtype=torch.long)
        lacking = ~kept
        for number in given[lacking[given]].tolist():
            if place := self.fixed[number]:
                if place[0] not in models:
                    raise MergeError(
                        f"tokenizer.tokens: {place[0]!r} has no such rows; name one of {[*models]}"
                    )
                result[number] = read(place[0])[place[1]].float()
        lacking[given] = False
        if lacking.any():
            self._fill(result, lacking, [base] if base in models else [], read)
            self._fill(result, lacking, models, read)
        result[len(rows) :] = result[: len(rows)].mean(0)
        return result

    def _fill(
        self, result: Tensor, lacking: Tensor, models: Sequence[Any], read: Callable[[str], Tensor]
    ) -> None:
        """Give lacking tokens the mean of the models' rows, where one has it; strike them off."""
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
        """A config, or generation config, with its special tokens' numbers in the result."""

        def change(number: Any) -> Any:
            if isinstance(number, list):
                return [change(each) for each in number]
            return self.renumbered.get(number, number)

        ids = {key: change(config[key]) for key in _SPECIAL_IDS if config.get(key) is not None}
        return {**config, **ids}

    def resize(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the result."""
        inner = config.get("text_config")
        if isinstance(inner, dict) and "vocab_size" in inner:
            return self.renumber(config) | {"text_config": self.resize(inner)}
        return self.renumber(config) | {"vocab_size": self.size}


def make_vocabulary(
    settings: Tokenizer, checkpoints: Mapping[str, Checkpoint], base: str
) -> Vocabulary:
    """Read the models' tokenizers and make the result's.

    Args:
        settings: The recipe's.
        checkpoints: The models, by name.
        base: The one whose tokens come first.

    Raises:
        RecipeError: A tokenizer is missing or cannot be used, or a named token is nowhere.
    """
    first = _load(checkpoints[base].folder)
    if first is None:
        raise MergeError(
            f"model {base!r}: no tokenizer in {checkpoints[base].folder}; fetch it again"
        )
    tokenizers = {model: _load(each.folder) or first for model, each in checkpoints.items()}
    heights = {model: _height(each) for model, each in checkpoints.items()}
    out = _tokenizer(settings, tokenizers, heights, base)
    out.add_tokens([token for token in settings.tokens if token not in out.get_vocab()])
    tokens = out.get_vocab()
    count = max(tokens.values()) + 1
    multiple = settings.pad_to_multiple_of or 1
    numbers = {model: tokenizer.get_vocab() for model, tokenizer in tokenizers.items()}
    own = {number: token for token, number in numbers[base].items()}
    return Vocabulary(
        tokenizer=out,
        size=-(-count // multiple) * multiple,
        rows={m: _rows(tokens, count, numbers[m], heights[m]) for m in checkpoints},
        fixed=_fixed(settings, tokens, numbers, heights),
        forced=frozenset(tokens[token] for token, way in settings.tokens.items() if way.force),
        renumbered={number: tokens[token] for number, token in own.items() if token in tokens},
    )


def with_chat_template(tokenizer: Any, recipe: Recipe, models: Mapping[str, Checkpoint]) -> Any:
    """Give a tokenizer the recipe's chat template.

    Raises:
        RecipeError: The template is neither ``auto``, ``chatml`` nor Jinja.
    """
    template = recipe.chat_template
    if template == "auto":
        found = [_load(checkpoint.folder) for checkpoint in models.values()]
        texts = [t.chat_template.strip() for t in found if t and isinstance(t.chat_template, str)]
        template = Counter(texts).most_common(1)[0][0] if texts else None
    elif template == "chatml":
        template = CHATML
    elif template and (len(template) < 20 or "{" not in template):
        raise MergeError(
            f"chat_template: {template!r} is neither 'auto', 'chatml' nor the text of a template; "
            "give one of these"
        )
    if template:
        tokenizer.chat_template = template
    return tokenizer


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """A model's tokenizer.

    Raises:
        RecipeError: It has none, or a damaged one.
    """
    check_tokenizer(checkpoint)
    return _load(checkpoint.folder, trust_remote_code)


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Make sure that a model has a tokenizer, without reading it.

    Raises:
        RecipeError: It has none.
    """
    if not _has_tokenizer(checkpoint.folder):
        raise MergeError(
            f"model {checkpoint.model!r}: no tokenizer in {checkpoint.folder}; fetch it again"
        )


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or any(folder.glob("vocab.*"))


def _load(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder; None if there is none."""
    if not _has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever its class raises, the folder cannot be used
        reason = " ".join(str(error).split()) or repr(error)
        raise MergeError(
            f"{folder}: cannot read its tokenizer: {reason}; fetch its files again"
        ) from None


def _height(checkpoint: Checkpoint) -> int:
    """Rows of a model's embedding."""
    name = input_embedding(checkpoint.tensors)
    if name is None:
        raise MergeError(
            f"model {checkpoint.model!r}: none of its tensors is known as the embedding, so its "
            "rows cannot be brought to another vocabulary; leave the tokenizer options out"
        )
    return checkpoint.tensors[name].shape[0]


def _tokenizer(
    settings: Tokenizer, tokenizers: Mapping[str, Any], heights: Mapping[str, int], base: str
) -> Any:
    if settings.source not in ("base", "union"):
        folder = locate(settings.source.partition("+")[0])
        if (named := _load(folder)) is None:
            raise MergeError(
                f"tokenizer source {settings.source!r}: no tokenizer in {folder}; name another"
            )
        return named
    out = _without_unused(deepcopy(tokenizers[base]), heights[base], base)
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


def _without_unused(tokenizer: Any, height: int, model: str) -> Any:
    """A tokenizer without tokens beyond its model's embedding, which the model cannot read."""
    unused = {token for token, number in tokenizer.get_vocab().items() if number >= height}
    if not unused:
        return tokenizer
    backend = getattr(tokenizer, "_tokenizer", None)
    contents = json.loads(backend.to_str()) if backend else {"model": {}}
    kind = contents["model"].get("type")
    if kind != "BPE":
        raise MergeError(
            f"model {model!r}: its tokenizer has {len(unused)} tokens beyond the {height} rows of "
            f"its embedding, such as {min(unused)!r}; they can be left out of a BPE tokenizer, "
            f"not of {kind or 'a slow one'}: name another tokenizer source"
        )
    inner = contents["model"]
    contents["added_tokens"] = [t for t in contents["added_tokens"] if t["content"] not in unused]
    inner["vocab"] = {token: n for token, n in inner["vocab"].items() if token not in unused}
    inner["merges"] = [m for m in inner["merges"] if not unused & _pieces(m)]
    from tokenizers import Tokenizer as Backend

    tokenizer._tokenizer = Backend.from_str(json.dumps(contents))
    return tokenizer


def _pieces(merge: str | Sequence[str]) -> set[str]:
    """A BPE merge's two tokens and what they make."""
    pair = merge.split(" ") if isinstance(merge, str) else list(merge)
    return {*pair, "".join(pair)}


def _rows(tokens: Mapping[str, int], count: int, own: Mapping[str, int], height: int) -> Tensor:
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
    """The rows that the recipe names."""
    found: dict[int, tuple[str, int] | None] = {}
    for token, way in settings.tokens.items():
        where = f"tokenizer.tokens.{token}"
        source = way.source
        if source is None:
            continue  # the rule for tokens that nothing is said of
        if isinstance(source, ZeroRow):
            found[tokens[token]] = None
            continue
        model = source.model if isinstance(source, TokenOfModel) else source
        if model not in numbers:
            raise MergeError(f"{where}: {model!r} is none of the recipe's models; add it to them")
        row: int | None
        if isinstance(source, TokenOfModel) and source.token_id is not None:
            row = source.token_id
        else:
            wanted = source.token if isinstance(source, TokenOfModel) else token
            row = numbers[model].get(str(wanted))
        if row is None or not 0 <= row < heights[model]:
            raise MergeError(f"{where}: {model!r} has no row for it; name another source")
        found[tokens[token]] = (model, row)
    return found
