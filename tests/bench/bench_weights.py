"""What a weight of its own for every tensor and donor costs: one JSON line for every family.

    python tests/bench/bench_weights.py [--donors 8] [--layers 33] [--experts 0] [--hidden 64]
        [--methods task_arithmetic,ties] [--repeats 15]

A family of tiny models with a Llama's tensors, or with ``--experts`` a Mixtral's. Builds with one
weight for each donor and with one for each tensor and donor alternate, each with new weights;
``ratio`` is the median of the pairs' ratios. The other times are those of the recipe alone: from
YAML, from its mapping, its key, and to YAML.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import transformers
from transformers import AutoModelForCausalLM

from in_memory import IN_MEMORY
from merge_engine.building.builder import Builder
from merge_engine.building.units import Units
from merge_engine.models.model_set import ModelSet
from merge_engine.recipe.recipe import Recipe
from merge_engine.recipe.recipe_file import parse_recipe
from merge_engine.schema import load_yaml


def make_models(folder: Path, options: argparse.Namespace) -> list[str]:
    """A base and donors of random weights."""
    kind = transformers.MixtralConfig if options.experts else transformers.LlamaConfig
    config = kind(
        vocab_size=64,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **({"num_local_experts": options.experts} if options.experts else {}),
    )
    for number in range(options.donors + 1):
        torch.manual_seed(number)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / f"m{number}")
    return [str(folder / f"m{number}") for number in range(options.donors + 1)]


def mapping(method: str, models: Sequence[str], filters: Sequence[str]) -> dict[str, Any]:
    """A recipe with random weights; without filters one for each donor."""
    base, *donors = models

    def weight() -> Any:
        rest: list[Any] = [{"value": random.random()}]
        own = [{"filter": name, "value": random.random()} for name in filters]
        return own + rest if filters else random.random()

    settings = {} if method == "task_arithmetic" else {"density": 0.5}
    return {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": m, "parameters": {"weight": weight()} | settings} for m in donors],
    }


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call, in which other programs do not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """Median processor time of a call in milliseconds."""
    return round(1e3 * statistics.median(seconds(work) for _ in range(repeats)), 2)


def measure(method: str, models: Sequence[str], builder: Builder, repeats: int) -> dict[str, Any]:
    """One line."""
    filters = [name for (name,) in Units.of_tensors(builder.model_set.names).filters]
    pairs = []
    for number in range(repeats + 1):
        flat, tuned = (Recipe.model_validate(mapping(method, models, f)) for f in ([], filters))
        order = [flat, tuned] if number % 2 else [tuned, flat]
        times = {id(each): seconds(lambda each=each: builder.build(each)) for each in order}
        pairs.append((times[id(flat)], times[id(tuned)]))
    first, *pairs = pairs
    raw = mapping(method, models, filters)
    recipe = Recipe.model_validate(raw)
    file = Path(models[0], "recipe.yaml")
    file.write_text(recipe.to_yaml())
    few = max(1, repeats // 5)
    return {
        "method": method,
        "tensors": len(builder.model_set.names),
        "donors": len(models) - 1,
        "flat_ms": round(1e3 * statistics.median(flat for flat, _ in pairs), 2),
        "tuned_ms": round(1e3 * statistics.median(tuned for _, tuned in pairs), 2),
        "ratio": round(statistics.median(tuned / flat for flat, tuned in pairs), 2),
        "tuned_first_ms": round(1e3 * first[1], 2),
        "validate_ms": median_ms(lambda: Recipe.model_validate(raw), repeats),
        "key_ms": median_ms(lambda: recipe.model_copy().key, repeats),
        "to_yaml_ms": median_ms(recipe.to_yaml, few),
        "load_yaml_ms": median_ms(lambda: load_yaml(file), few),
        "parse_ms": median_ms(lambda: parse_recipe(raw, "recipe"), few),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--donors", type=int, default=8)
    parser.add_argument("--layers", type=int, default=33)
    parser.add_argument("--experts", type=int, default=0, help="experts a layer")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--methods", default="task_arithmetic,ties")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        os.environ["MERGESEARCH_CACHE"] = folder
        models = make_models(Path(folder), options)
        model_set = ModelSet.open(models, candidates=100)
        model_set.place(torch.device("cpu"), IN_MEMORY)
        builder = Builder(AutoModelForCausalLM.from_pretrained(models[0]), model_set)
        for method in options.methods.split(","):
            print(json.dumps(measure(method, models, builder, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
