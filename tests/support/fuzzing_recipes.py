"""Valid studies and recipes of the example, which together use most keys."""

from collections.abc import Mapping, Sequence
from typing import Any

from mistakes import RECIPE, STUDY

_MODELS = [{"model": "a"}, {"model": "b"}]
_OBJECTIVE = STUDY["objective"]
_ALL_KEYS = {
    "dtype": "float32",
    "tokenizer": {"source": "base", "pad_to_multiple_of": 8},
    "trust_remote_code": False,
    "search": {
        "methods": ["task_arithmetic", "ties", "linear"],
        "scale": [0.0, 1.5],
        "density": [0.2, 1.0],
        "at_most": 2,
        "layer_groups": 2,
        "split": ["self_attn", "mlp"],
        "tune": False,
        "trials": 2,
        "finalists": 2,
        "sampler": "tpe",
        "front": False,
        "stop": True,
        "seed": 1,
    },
    "objective": _OBJECTIVE
    | {
        "tasks": [{"task": "tell", "metric": "exact_match", "weight": 2.0, "num_fewshot": 0}],
        "constraints": {"tell": "base - 0.5"},
        "max_mean_tokens": 100,
        "system_instruction": "Be brief.",
        "apply_chat_template": True,
        "unsafe_code": False,
        "trust_task_code": False,
        "batch_size": 4,
    },
}


def _study(**objective: Any) -> dict[str, Any]:
    return {**STUDY, "objective": _OBJECTIVE | objective}


STUDIES: Sequence[Mapping[str, Any]] = (
    dict(STUDY),
    _study(apply_chat_template=True),
    _study(tasks=["tell", {"task": "pick", "metric": "acc"}]),
    _study(tasks=[{"text": "notes.txt", "unit": "paragraph"}]),
    _study(tasks=[{"objective": "own_class:Own"}]),
    {**STUDY, **_ALL_KEYS},
)
RECIPES: Sequence[dict[str, Any]] = (
    dict(RECIPE),
    {
        **RECIPE,
        "merge_method": "linear",
        "tokenizer": {"source": "union", "tokens": {"a": {"source": "b"}}},
    },
    {
        "merge_method": "slerp",
        "base_model": "a",
        "models": _MODELS,
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 1]},
                {"filter": "mlp", "value": 0.3},
                {"value": 0.5},
            ]
        },
        "dtype": "bfloat16",
        "out_dtype": "float16",
    },
    {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 3], "parameters": {"scale": 0.9}}]},
        ],
        "chat_template": "chatml",
    },
    {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": [0.1, 0.9], "density": 0.5}},
            {"model": "b", "parameters": {"weight": 0.5, "density": 0.3}},
        ],
        "parameters": {"normalize": True, "rescale": True, "lambda": 0.8},
        "tokenizer_source": "base",
        "random_seed": 3,
        "name": "mine",
    },
)
