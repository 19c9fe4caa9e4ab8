"""What a gradient of a recipe costs in time and memory: one JSON line.

    python tests/bench/bench_gradient.py [--layers 12] [--width 512] [--donors 3] [--recompute]

Random float32 models of a Llama's shapes, in memory. ``peak_ratio`` is the largest resident size
over that before, with live model, donors and the activations of a pass in memory;
``gradients_mb`` is what a full set of gradients would take.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from in_memory import IN_MEMORY
from merge_engine.building.builder import Builder
from merge_engine.building.recipe_gradient import RecipeGradient
from merge_engine.building.units import Units
from merge_engine.models.model_set import ModelSet
from merge_engine.recipe.recipe import Recipe


def make_models(folder: Path, layers: int, width: int, donors: int) -> list[str]:
    """A base and donors with noise."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for number in range(donors + 1):
        with torch.no_grad():
            for each in model.parameters():
                each.add_(torch.randn_like(each), alpha=1e-3 if number else 0)
        model.save_pretrained(folder / f"m{number}")
    return [str(folder / f"m{number}") for number in range(donors + 1)]


def resident_mb(key: str) -> float:
    """The process's resident size, now (VmRSS) or at most so far (VmHWM), in MB."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def seconds_of(work: Callable[[], object]) -> float:
    """Time of a second call."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    layers: int, width: int, donors: int, recompute: bool, folder: str
) -> dict[str, object]:
    """One line."""
    base, *others = make_models(Path(folder), layers, width, donors)
    model_set = ModelSet.open([base, *others])
    model_set.place(torch.device("cpu"), IN_MEMORY)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    builder = Builder(model, model_set)
    sources = [{"model": each, "parameters": {"weight": 0.3}} for each in others]
    mapping = {"merge_method": "task_arithmetic", "base_model": base, "models": sources}
    builder.build(Recipe.model_validate(mapping))
    tokens = torch.randint(4096, (4, 64))

    def loss() -> torch.Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    with torch.no_grad():
        forward = seconds_of(loss)
    held = loss()
    before = resident_mb("VmRSS")
    del held
    Path("/proc/self/clear_refs").write_text("5")  # the largest size is counted anew
    gradient = RecipeGradient(builder, Units.of_tensors(model_set.names), recompute=recompute)
    seconds = seconds_of(lambda: gradient.value_and_grad(loss))
    peak = resident_mb("VmHWM")
    return {
        "layers": layers,
        "donors": donors,
        "recompute": recompute,
        "gradients_mb": round(4 * model_set.parameters / 2**20),
        "before_mb": round(before),
        "peak_mb": round(peak),
        "peak_ratio": round(peak / before, 3),
        "build_seconds": round(seconds_of(lambda: builder.build(builder.loaded, force=True)), 3),
        "forward_seconds": round(forward, 3),
        "gradient_seconds": round(seconds, 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--donors", type=int, default=3)
    parser.add_argument("--recompute", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MERGESEARCH_CACHE"] = folder
        print(json.dumps(measure(**vars(options), folder=folder)))


if __name__ == "__main__":
    main()
