"""What a candidate costs: one JSON line for every method.

    python tests/bench/bench_build.py [--millions 110] [--donors 3] [--methods ties,linear]
        [--experts 8] [--no-oracle] [--no-compile] [--device cuda] [--tier device|pinned|disk]

Random weights of a Llama's shapes, or of a Mixtral's with ``--experts`` a layer: bfloat16 donors,
in the device's memory unless ``--tier`` says otherwise, built in place into a live bfloat16 model.
``copy_fraction`` is the bytes of the donors read and the model written per second, over the bytes
read and written per second by a plain copy of as much, measured before and after each method.
``vs_mergekit`` is the time of mergekit's own kernels on the same tensors in memory, over ours.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from mergekit.merge_methods import merge_tensors
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from in_memory import IN_MEMORY
from merge_engine.building.builder import Builder
from merge_engine.methods import METHODS, Base
from merge_engine.models.model_set import ModelSet
from merge_engine.models.placement import ON_DISK, Budget
from merge_engine.recipe.recipe import Recipe

BUDGETS = {"device": IN_MEMORY, "pinned": Budget(pinned=1 << 62), "disk": ON_DISK}
SETTINGS = {"weight": 0.4, "density": 0.5, "gamma": 0.01, "epsilon": 0.1, "t": 0.5, "scale": 0.9}


WIDTH, ROWS, EXPERT = 768, 16_000, 512  # hidden size, vocabulary, intermediate size of an expert


def layer_shapes(experts: int) -> dict[str, tuple[int, ...]]:
    """A layer's tensors as stored: a Llama's, or a Mixtral's with so many experts."""
    layer = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    layer |= {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    if not experts:
        up = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (4 * WIDTH, WIDTH))
        return layer | up | {"mlp.down_proj": (WIDTH, 4 * WIDTH)}
    layer["block_sparse_moe.gate"] = (experts, WIDTH)
    for number in range(experts):
        own = {"w1": (EXPERT, WIDTH), "w2": (WIDTH, EXPERT), "w3": (EXPERT, WIDTH)}
        layer |= {f"block_sparse_moe.experts.{number}.{name}": own[name] for name in own}
    return layer


def make_models(folder: Path, millions: float, donors: int, experts: int) -> list[str]:
    """A base and donors with so many parameters, in bfloat16."""
    layer = layer_shapes(experts)
    size = sum(torch.Size(shape).numel() for shape in layer.values())
    shapes = {"model.embed_tokens.weight": (ROWS, WIDTH), "model.norm.weight": (WIDTH,)}
    layers = max(1, round((millions * 1e6 - ROWS * WIDTH) / size))
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}.weight": s for name, s in layer.items()}
    config = (MixtralConfig if experts else LlamaConfig)(
        vocab_size=ROWS,
        hidden_size=WIDTH,
        intermediate_size=EXPERT if experts else 4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
        **({"num_local_experts": experts} if experts else {}),
    )
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator) * 0.02 for n, s in shapes.items()}
    for number in range(donors + 1):
        path = folder / f"m{number}"
        path.mkdir()
        config.save_pretrained(path)
        changed = {
            n: (t + torch.randn(t.shape, generator=generator) * 1e-3 if number else t).bfloat16()
            for n, t in base.items()
        }
        save_file(changed, path / "model.safetensors")
    return [str(folder / f"m{number}") for number in range(donors + 1)]


def recipe_for(method: str, models: Sequence[str]) -> Recipe:
    """The method at ordinary settings over as many of the models as it takes."""
    row = METHODS[method]
    base, *donors = models
    most = row.donors[1]
    if row.base is Base.ENDPOINT:
        donors = [base, donors[0]]
    elif most is not None:
        donors = donors[:most]
    named = None if row.base is Base.INPUT else base
    needed = {name: p for name, p in row.params.items() if p.default is None or name in SETTINGS}
    own = {name: SETTINGS[name] for name, p in needed.items() if p.per_donor}
    shared = {name: SETTINGS[name] for name, p in needed.items() if not p.per_donor and name == "t"}
    return Recipe.model_validate(
        {
            "merge_method": method,
            "base_model": named,
            "models": [{"model": m, "parameters": own} for m in donors],
            "parameters": shared,
        }
    )


def live_model(model_set: ModelSet) -> nn.Module:
    """The base as transformers loads it, in bfloat16."""
    folder = model_set.reference.folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Time of a call, whatever it has left on the device included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median time of a call, the first not counted."""
    work()
    return statistics.median(seconds_of(work, device) for _ in range(repeats))


def copy_rate(source: Tensor, target: Tensor) -> float:
    """Bytes read and written per second by a plain copy."""
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), source.device)


def oracle_seconds(recipe: Recipe, model_set: ModelSet, names: Sequence[str]) -> float:
    """mergekit's kernels on tensors in memory, in the dtype they are stored in."""
    order = ([recipe.base] if recipe.origin else []) + [s.model for s in recipe.donors]
    if recipe.method.base is Base.ENDPOINT:
        order = [recipe.base, *(s.model for s in recipe.donors)]
    index = None if recipe.base is None else 0

    def merge() -> None:
        for name in names:
            values = dict(recipe.values(name, 0.0))
            if "lambda_" in values:
                values["lambda"] = values.pop("lambda_")
            parameters = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
            tensors = [model_set.read(model, name) for model in order]
            merge_tensors(tensors, recipe.merge_method, parameters=parameters, base_index=index)

    start = time.perf_counter()
    merge()
    return time.perf_counter() - start


def measure(
    method: str, models: Sequence[str], model_set: ModelSet, oracle: bool
) -> dict[str, object]:
    """One method's line."""
    recipe = recipe_for(method, models)
    names = model_set.names
    device = model_set.placement.device
    builder = Builder(live_model(model_set).to(device), model_set)
    first = seconds_of(lambda: builder.build(recipe), device)
    model_bytes = 2 * model_set.parameters
    read = len({*([recipe.origin] if recipe.origin else []), *(s.model for s in recipe.donors)})
    read += recipe.method.base is Base.ENDPOINT
    # of a GPU's copies less than a GiB would lie in its cache
    copied = max(2 * model_bytes, 1 << 30 if device.type == "cuda" else 0)
    source = torch.empty(copied, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    before = copy_rate(source, target)
    seconds = median_seconds(lambda: builder.build(recipe, force=True), device)
    rate = (before + copy_rate(source, target)) / 2
    moved = (read + 1) * model_bytes
    return {
        "method": method,
        "params_millions": round(model_bytes / 2e6, 1),
        "donors": len(recipe.donors),
        "seconds": round(seconds, 4),
        "first_seconds": round(first, 2),
        "gb_per_s": round(moved / seconds / 1e9, 2),
        "copy_fraction": round(moved / seconds / rate, 3),
        "vs_mergekit": round(oracle_seconds(recipe, model_set, names) / seconds, 1)
        if oracle
        else None,
        "peak_mb": peak_mb(),
        "device_mb": torch.cuda.max_memory_allocated() >> 20 if device.type == "cuda" else None,
        "compiled": model_set.runner.compiled,
    }


def peak_mb() -> int:
    """The process's largest resident size so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=110)
    parser.add_argument("--donors", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--experts", type=int, default=0, help="experts a layer")
    parser.add_argument("--no-oracle", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tier", default="device", choices=BUDGETS, help="of the donors")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        os.environ["MERGESEARCH_CACHE"] = folder  # what is measured once is in first_seconds
        models = make_models(Path(folder), options.millions, options.donors, options.experts)
        model_set = ModelSet.open(models, candidates=1 if options.no_compile else 100)
        model_set.place(torch.device(options.device), BUDGETS[options.tier])
        for method in options.methods.split(","):
            print(json.dumps(measure(method, models, model_set, not options.no_oracle)), flush=True)


if __name__ == "__main__":
    main()
