"""Find config differences that change what a model's weights compute.

They matter because the result has only one config.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from merge_engine.errors import MergeError
from merge_engine.models.alignment import is_multimodal, text_config
from merge_engine.models.checkpoint import Checkpoint

# Keys that do not affect the forward pass, or that the merge itself takes care of. Unknown keys
# count: a superfluous note is better than a silently wrong model.
_IGNORED = {
    *("architectures", "name_or_path", "transformers_version", "torch_dtype", "dtype", "auto_map"),
    *("use_cache", "vocab_size", "tie_word_embeddings", "initializer_factor", "pretraining_tp"),
    *("initializer_range", "max_position_embeddings", "model_max_length", "max_sequence_length"),
    *("seq_length", "n_positions", "n_ctx", "id2label", "label2id", "problem_type", "return_dict"),
    *("task_specific_params", "finetuning_task", "quantization_config", "gradient_checkpointing"),
    *("router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef"),
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "is_decoder"),
    *("attn_implementation", "chunk_size_feed_forward"),
}
_IGNORED_ENDS = ("_token_id", "_token_index", "dropout", "pdrop", "drop", "_std")
_IGNORED_STARTS = ("_", "output_", "unsloth", "use_flash", "flash_")
# Keys that change what the same weights compute: positions, heads, norms, windows, kinds of layers,
# activations, scales, experts in use.
_FUNCTION = re.compile(
    r"(rope|rotary|alibi|position_embedding_type|head|_eps|epsilon|norm|window|layer_types?|pattern"
    r"|act|activation|act_fn|softcap|scal|multiplier|scalar|experts_per_tok|top_k|topk|parallel"
    r"|causal)"
)
_SHOWN = 3  # keys that a note has in full


def config_notes(reference: Checkpoint, checkpoints: Iterable[Checkpoint]) -> list[str]:
    """Return a note on each model whose weights mean something else with the reference's config."""
    return [
        f"{said}; the result gets what {reference.model!r} has (in brackets), with which these "
        "weights compute something else: merge models whose configs agree"
        for said, _ in _found(reference, checkpoints)
    ]


def check_functions(reference: Checkpoint, checkpoints: Iterable[Checkpoint]) -> None:
    """Refuse a model that computes something else with the reference's config.

    The live model has the reference's config, so the model's score would not be its own.

    Raises:
        MergeError: There is one, by a key that is known to matter.
    """
    for said, keys in _found(reference, checkpoints):
        if any(_FUNCTION.search(key) for key in keys):
            raise MergeError(
                f"{said}; in a study all are evaluated with what {reference.model!r} has (in "
                "brackets), which would not be that model: leave it out, or correct its "
                "config.json if that is wrong"
            )


def _found(
    reference: Checkpoint, checkpoints: Iterable[Checkpoint]
) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield for each model whose config differs what differs, and the keys."""
    for model in checkpoints:
        pair = reference.config, model.config
        if is_multimodal(pair[0]) != is_multimodal(pair[1]):
            pair = text_config(pair[0]), text_config(pair[1])
        if dict(_flat(pair[0])) == dict(_flat(pair[1])):
            continue
        # Compare normalised configs: files omit defaults and use older key names.
        found = _differences(_completed(pair[0]), _completed(pair[1]))
        if found:
            shown = [f"{key} {theirs!r} ({mine!r})" for key, (mine, theirs) in found.items()]
            more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
            yield (
                f"model {model.model!r} has in its config.json {', '.join(shown[:_SHOWN])}{more}",
                found,
            )


def _differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any]
) -> dict[str, tuple[object, object]]:
    """Return the values of keys that both have, where they differ and count."""
    other = dict(_flat(theirs))
    return {
        key: (value, other[key])
        for key, value in _flat(mine)
        if key in other and value != other[key] and not _of_other_depth(value, other[key])
    }


def _of_other_depth(mine: object, theirs: object) -> bool:
    """Return whether two values are per-layer lists of models of different depth."""
    return isinstance(mine, list) and isinstance(theirs, list) and len(mine) != len(theirs)


def _flat(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the keys that count, those of nested mappings with dots."""
    for key, value in config.items():
        name = str(key)
        if name in _IGNORED or name.endswith(_IGNORED_ENDS) or name.startswith(_IGNORED_STARTS):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config with its defaults and today's keys, where transformers knows the model."""
    from transformers import CONFIG_MAPPING

    try:
        known = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        completed: Mapping[str, Any] = known.to_dict()
    except Exception:  # each config class raises its own; an unknown model is compared as it is
        return config
    return completed
