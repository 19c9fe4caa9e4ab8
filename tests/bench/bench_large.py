"""Rehearse a study of Llama-3-8B's shapes with a few of its layers: one JSON line.

    PYTHONPATH=tests/support python tests/bench/bench_large.py --out DIR [--layers 2] [--donors 3]
        [--methods linear,task_arithmetic,ties,dare_ties] [--items 20]

Base and donors are random, in bfloat16, with all 128,256 rows of the vocabulary (1.05 GB a layer of
embeddings, and as much for the head); what DIR has is not made again. ``build`` are the seconds of
a second candidate of each method, ``gb_per_second`` the bytes of donors and live model that it
moved in them; ``score`` those of a block of lines of text, ``export`` those of building, scoring
and saving it once more. ``peak_gb`` is the most memory that the process has held, donors that are
mapped from disk left out. ``said`` is the memory that the plan says.

``whole`` is arithmetic, not measured: the bytes of all 32 layers, and the seconds of a candidate
whose donors are on the device, at ``--bandwidth`` GB/s, or in pinned memory at ``--host`` GB/s.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from merge_engine.methods import METHODS
from merge_engine.methods.contract import Base
from search.preparing.context import LiveContext, load, plan_study
from search.preparing.models import Hardware
from search.proposing.recipes import to_recipe
from search.running.workers import EvalJob, Worker
from search.study.reading import load_study
from tiny_models import make_tokenizer

LAYERS = 32  # of the whole model
SHAPES = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NOISE = 1e-3  # standard deviation of task vectors
DTYPE = torch.bfloat16


def make_model(folder: Path, config: LlamaConfig, seed: int | None) -> None:
    """Write a base of random weights, or with a seed a donor near it."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: each.shape for name, each in LlamaForCausalLM(config).state_dict().items()}
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed or 0)
    tensors = {}
    for name, shape in shapes.items():
        drawn = torch.empty(shape, dtype=DTYPE).normal_(0, 0.02, generator=base)
        if seed is not None:
            drawn += torch.empty(shape, dtype=DTYPE).normal_(0, NOISE, generator=own)
        tensors[name] = drawn + 1 if name.endswith("norm.weight") else drawn
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_study(out: Path, layers: int, donors: int, methods: list[str], items: int) -> Path:
    """Write models, items and study, as far as they are not there; return the study's file."""
    config = LlamaConfig(
        **SHAPES,
        num_hidden_layers=layers,
        dtype="bfloat16",
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    names = ["base", *(f"donor{number}" for number in range(1, donors + 1))]
    for number, name in enumerate(names):
        if not (out / name / "model.safetensors").exists():
            make_model(out / name, config, number or None)
    lines = (f"Between {n} and {n + 2} lies {n + 1}, and nothing else." for n in range(3 * items))
    (out / "items.txt").write_text("\n".join(lines))
    study = {
        "base_model": "./base",
        "models": [f"./{name}" for name in names[1:]],
        "search": {"methods": methods, "trials": 100, "tune": False},  # of so many, kernels compile
        "objective": {
            "tasks": [{"text": "items.txt", "name": "numbers", "unit": "line"}],
            "block": items,
            "items": {"search": items, "select": items, "test": items},
        },
    }
    file = out / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    return file


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def peak() -> int:
    """Return the most bytes of its own that this process has held; mapped files are none."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    kilobytes = int(fields["VmHWM"].split()[0]) - int(fields["RssFile"].split()[0])
    return kilobytes << 10


def measure(context: LiveContext, out: Path, model: int) -> dict[str, object]:
    """Build, score and export; ``model`` are the bytes of one."""
    space, worker = context.space, Worker(context)
    seconds: dict[str, float] = {}
    k = len(space.donors)
    for method in space.methods:
        for first in (0.3, 0.5):  # the first recipe reads the donors, and compiles
            weights = (first, *(0.4,) * (k - 1))
            recipe = to_recipe(space, space.point(method, weights, density=0.5))
            with timed(seconds, method):
                context.builder.build(recipe)
    with timed(seconds, "score"):
        reply = worker.evaluate(EvalJob(recipe, context.splits.test))
    evaluated = [(EvalJob(recipe, context.splits.test), reply.results)]
    with timed(seconds, "export"):
        worker.export(recipe, evaluated, out / "checkpoint", "")
    build = {method: round(seconds[method], 2) for method in space.methods}
    moved = {method: (k + 1 + (METHODS[method].base is Base.ORIGIN)) * model for method in build}
    return {
        "model_gb": round(model / 1e9, 2),
        "build": build,
        "gb_per_second": {name: round(moved[name] / 1e9 / seconds[name], 1) for name in build},
        "score": round(seconds["score"], 2),
        "export": round(seconds["export"], 2),
        "peak_gb": round(peak() / 1e9, 2),
    }


def whole_model(layers: int, model: int, donors: int, bandwidth: float, host: float) -> object:
    """Return bytes and seconds of the whole model, by those of a few layers."""
    rows = 2 * SHAPES["vocab_size"] * SHAPES["hidden_size"] * DTYPE.itemsize
    layer = (model - rows) / layers
    size = (rows + LAYERS * layer) / 1e9
    return {
        "layer_gb": round(layer / 1e9, 3),
        "model_gb": round(size, 2),
        "models_gb": round((donors + 2) * size, 1),  # base, donors and the live model
        "seconds_on_device": round((donors + 2) * size / bandwidth, 3),
        "seconds_from_host": round((donors + 1) * size / host, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--donors", type=int, default=3)
    parser.add_argument("--methods", default="linear,task_arithmetic,ties,dare_ties")
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--bandwidth", type=float, default=2800, help="of the device, GB/s")
    parser.add_argument("--host", type=float, default=50, help="from host to device, GB/s")
    given = parser.parse_args()
    methods = given.methods.split(",")
    study = make_study(given.out, given.layers, given.donors, methods, given.items)
    plan = plan_study(load_study(study))
    said = str(plan.place_donors(Hardware("cpu")))
    context = load(plan, Hardware("cpu"))
    model = sum(tensor.numel() for tensor in context.builder.model.parameters()) * DTYPE.itemsize
    whole = whole_model(given.layers, model, given.donors, given.bandwidth, given.host)
    print(json.dumps({**measure(context, given.out, model), "said": said, "whole": whole}))


if __name__ == "__main__":
    main()
