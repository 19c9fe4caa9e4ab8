"""Memory that is said against memory that is taken: one JSON line for each phase of a study.

    python tests/bench/bench_memory.py [--shape 135m | 1b | STUDY] [--layers 4] [--donors 4]
        [--methods ties,sce] [--dtype float32] [--folder DIR] [--memory 6GB]

Random weights of SmolLM2-135M's or Llama-3.2-1B's shapes in bfloat16, or a study's own models;
``--dtype`` is the live model's. In a fresh process a study is planned and loaded, its donors are
read, with each method the largest tensor is merged and then a recipe built, a job of items is
scored, and a gradient computed. ``peak`` is the most that was resident during a phase, ``held``
what was after it, ``mapped`` how much of that is mapped files, which the system takes back when
memory is short; all in MiB. At the end each component is compared with what it took, and the peak
of all with the plan's. Linux alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig

from bench_build import recipe_for
from merge_engine.building.builder import Builder
from merge_engine.building.merging import merge_into
from merge_engine.methods import METHODS
from merge_engine.models.free_memory import parse_size
from merge_engine.models.memory_plan import RANKS, MemoryPlan
from merge_engine.numerics.heap import trim_heap
from search.preparing.context import load, plan_study
from search.preparing.forward_memory import JOB_ITEMS
from search.preparing.models import Hardware
from search.proposing.tuning import AT_ONCE
from search.running.workers import EvalJob, LossJob, Worker
from search.study.reading import load_study
from tiny_models import tiny_tokenizer
from tiny_tasks import ANSWER, CHOICE, mean_of, write_rows, write_task

TASKS = {
    "choice": CHOICE | {"metric_list": mean_of("acc")},
    "answer": ANSWER
    | {
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
    },
}
LARGEST = " of the largest tensor"
SHAPES = {  # layers, hidden, intermediate, heads, key-value heads, vocabulary
    "135m": (30, 576, 1536, 9, 3, 49_152),
    "1b": (16, 2048, 8192, 32, 8, 128_256),
    "tiny": (2, 64, 128, 4, 2, 512),
}


def make_family(folder: Path, shape: str, most: int | None, donors: int) -> None:
    """Write a base of at most so many layers, and donors that differ from it by noise."""
    layers, hidden, inner, heads, kv, rows = SHAPES[shape]
    layers = min(layers, most or layers)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    narrow = hidden * kv // heads
    layer = {
        f"self_attn.{n}_proj": (w, hidden)
        for n, w in zip("qkv", (hidden, narrow, narrow), strict=True)
    }
    layer |= {"self_attn.o_proj": (hidden, hidden), "mlp.down_proj": (hidden, inner)}
    layer |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (inner, hidden))
    layer |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    shapes = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}.weight": s for name, s in layer.items()}
    base: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for number in range(donors + 1):
        path = folder / ("base" if not number else f"donor{number}")
        path.mkdir(parents=True)
        config.save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
        generator, spread = torch.Generator().manual_seed(number), 1e-3 if number else 0.02
        for name, size in shapes.items():
            drawn = torch.empty(size, dtype=torch.bfloat16).normal_(0, spread, generator=generator)
            weights[name] = drawn if not number else drawn.add_(base[name])
        base = base or dict(weights)
        save_file(weights, path / "model.safetensors", {"format": "pt"})


def make_study(folder: Path, methods: list[str], donors: int, dtype: str | None) -> Path:
    """Write a study of the family: choices behind long questions, and short answers."""
    choices = ["a" * 12, "b" * 12]
    rows = [
        {"question": f"{n} " + "which of these? " * 2, "choices": choices, "gold": n % 2}
        for n in range(400)
    ]
    for name, settings in TASKS.items():
        write_rows(folder / f"{name}.jsonl", rows)
        files = {"test": str(folder / f"{name}.jsonl")}
        write_task(folder, name, **settings | {"dataset_kwargs": {"data_files": files}})
    study = {
        "base_model": str(folder / "base"),
        "models": [str(folder / f"donor{number}") for number in range(1, donors + 1)],
        "dtype": dtype,
        "search": {"methods": methods} if methods else {},
        "objective": {
            "include_path": str(folder),
            "tasks": [{"task": "choice"}, {"task": "answer"}],
            "items": {"search": 100, "select": 100, "test": 200},
        },
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    return file


def resident() -> dict[str, int]:
    """This process's memory in bytes, and the most of it since the last ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    names = {"held": "VmRSS", "peak": "VmHWM", "mapped": "RssFile"}
    return {name: int(found[key].split()[0]) << 10 for name, key in names.items()}


def forget_peak() -> None:
    """Count the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


class Account:
    """What each phase took."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, int]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        forget_peak()
        yield
        self.phases[name] = resident()
        print(json.dumps({"phase": name, **{k: v >> 20 for k, v in self.phases[name].items()}}))
        sys.stdout.flush()

    def kept(self, name: str) -> int:
        """Return what was held after a phase and not before it."""
        names = [*self.phases]
        before = self.phases[names[names.index(name) - 1]]
        return max(0, self.phases[name]["held"] - before["held"])

    def passing(self, name: str, after: str = "") -> int:
        """Return the most that a phase took beyond what was held after it, or after another."""
        return max(0, self.phases[name]["peak"] - self.phases[after or name]["held"])


def build(account: Account, builder: Builder, methods: list[str]) -> None:
    """Merge the largest tensor with each method, to see what that takes, then build recipes."""
    models, live = builder.model_set, builder.live.targets
    base, *donors = models.checkpoints
    largest = max(live, key=lambda name: live[name].numel())
    for method in methods:
        with account.phase(method + LARGEST):
            merge_into(live[largest].detach(), recipe_for(method, [base, *donors]), largest, models)
            models.measurements.release()
            trim_heap()
    for method in methods:
        with account.phase(method):
            for first in donors if METHODS[method].donors[1] == 1 else donors[:1]:
                others = [donor for donor in donors if donor != first]
                builder.build(recipe_for(method, [base, first, *others]))


def measure(study: Path, methods: list[str], memory: int | None) -> None:
    """Go through a study's phases in this process."""
    account, said = Account(), []
    with account.phase("plan"):
        plan = plan_study(load_study(study))
    with account.phase("load"):
        context = load(plan, Hardware("cpu", memory), said.append)
    worker, splits = Worker(context), context.splits
    with account.phase("donors"):
        worker.check_finite()
    names = list(context.builder.model_set.checkpoints)
    with account.phase("compile"):
        context.builder.build(recipe_for("task_arithmetic", names))
    build(account, context.builder, methods)
    recipe = context.builder.loaded
    assert recipe is not None
    with account.phase("score"):
        worker.evaluate(EvalJob(recipe, splits.test[:JOB_ITEMS]))
    if context.tuned_units is not None:
        labels = dict(zip(splits.test, worker.labels(splits.test), strict=True))
        items = [item for item in splits.test if labels[item] is not None][:AT_ONCE]
        job = LossJob(
            recipe_for("task_arithmetic", names),
            tuple(items),
            tuple(labels[item] or "" for item in items),
            (1 / AT_ONCE,) * AT_ONCE,
        )
        with account.phase("tune"):
            worker.losses(job)
    report(account, next(line for line in said if isinstance(line, MemoryPlan)), methods)


def report(account: Account, plan: MemoryPlan, methods: list[str]) -> None:
    """Print each component as said and as measured, and the ratio of the peaks."""
    merging = [name for name in account.phases if name == "donors" or name.endswith(LARGEST)]
    taken = {
        "process and live model": account.phases["load"]["held"] + account.kept("compile"),
        "donors": account.kept("donors"),
        "ranks, masks, statistics": sum(map(account.kept, methods)),
        "merging": max(map(account.passing, merging)),
        "scoring": account.passing("score", methods[-1]),
        "tuning": account.passing("tune", methods[-1]) if "tune" in account.phases else 0,
    }
    parts = plan.components()
    said = {
        "process and live model": parts["process"] + parts["live model"],
        "ranks, masks, statistics": parts.get(RANKS, 0) + parts.get("statistics", 0),
        **{name: parts.get(name, 0) for name in ("donors", "merging", "scoring", "tuning")},
    }
    for name, size in taken.items():
        line = {"component": name, "said": said[name] >> 20, "measured": size >> 20}
        print(json.dumps({**line, "ratio": round(size / max(1, said[name]), 2)}))
    peak = max(phase["peak"] for phase in account.phases.values())
    total = plan.peak + plan.placed.disk  # what is mapped counts where there is memory for it
    ratio = round(peak / total, 3)
    print(json.dumps({"said": total >> 20, "measured": peak >> 20, "ratio": ratio}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--donors", type=int, default=4)
    parser.add_argument("--methods", default="")
    parser.add_argument("--dtype")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--memory", type=parse_size)
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    methods = [m for m in options.methods.split(",") if m]
    if options.measured:
        spec = load_study(options.measured)
        measure(options.measured, methods or [*spec.search.methods], options.memory)
        return
    with tempfile.TemporaryDirectory() as temporary:
        study = Path(options.shape)
        if options.shape in SHAPES:
            folder = options.folder or Path(temporary)
            if not (folder / "base").exists():
                make_family(folder, options.shape, options.layers, options.donors)
            study = make_study(folder, methods, options.donors, options.dtype)
        environment = {"MERGESEARCH_CACHE": temporary} | os.environ
        command = [sys.executable, *sys.argv, "--measured", str(study)]
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
