"""Compare the sizes that a model's config gives with those of its tensors."""

from __future__ import annotations

from typing import Final

from merge_engine.errors import MergeError
from merge_engine.models.alignment import text_config
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.tensor_names import input_embedding, layer_counts

LAYER_COUNTS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # config's keys


def check_layers(checkpoint: Checkpoint) -> None:
    """Refuse a model whose config has more layers than its files.

    transformers would give the others random weights. More layers than the config's are allowed:
    some models store one that predicts further tokens. So is one layer, which a model may repeat.

    Raises:
        MergeError: The model's files have fewer layers, but more than one.
    """
    config = text_config(checkpoint.config)
    stored = max(layer_counts(checkpoint.tensors).values(), default=0)
    for key in LAYER_COUNTS:
        said = config.get(key)
        if isinstance(said, int) and said > stored > 1:
            raise MergeError(
                f"model {checkpoint.model!r}: {checkpoint.folder / 'config.json'} says {key} "
                f"{said}, its weights have {stored} layers; fetch it again, or correct that"
            )


def rows_note(checkpoint: Checkpoint) -> list[str]:
    """Return a note if a model's config has another number of rows than its embedding."""
    said = text_config(checkpoint.config).get("vocab_size")
    name = input_embedding(checkpoint.tensors)
    if not isinstance(said, int) or name is None or checkpoint.tensors[name].shape[0] == said:
        return []
    return [
        f"model {checkpoint.model!r}: its config.json says vocab_size {said}, its {name!r} has "
        f"{checkpoint.tensors[name].shape[0]} rows: nothing will load the result; correct that"
    ]
