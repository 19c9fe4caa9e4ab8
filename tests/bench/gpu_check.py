"""The twelve checks of a first hour on a GPU, as one table; ``--device cpu`` runs them all small.

    PYTHONPATH=tests/support python tests/bench/gpu_check.py [--device cuda] [--only 3,8]

Each check is a process of its own with a time limit, its output beside the others in ``--out``.
Its row says what was found, and what was expected of one H100: those are reckoned, nothing of them
has been measured. A check that fails says so in its row and stops no other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).parent
PYTHON = sys.executable
Lines = Sequence[dict[str, object]]


@dataclass(frozen=True)
class Check:
    """A command, and what its JSON lines say."""

    name: str
    minutes: float  # at most, on a GPU
    command: Sequence[str]
    small: Sequence[str]  # the same on a CPU
    expected: str
    found: Callable[[Lines], str]
    settings: Sequence[str] = ()  # environment, NAME=value


def bench(options: str) -> list[str]:
    name, *others = options.split()
    return [PYTHON, str(HERE / f"bench_{name}.py"), *others]


def part(options: str) -> list[str]:
    return [PYTHON, __file__, "--part", *options.split()]


def each(*keys: str) -> Callable[[Lines], str]:
    """Describe a key, or several, of every line; the first key names the line."""
    first, *others = keys

    def describe(lines: Lines) -> str:
        return "; ".join(
            f"{line[first]}: " + ", ".join(f"{key} {line[key]}" for key in others if key in line)
            for line in lines
        )

    return describe


BUILD = "build --no-oracle --donors 2"
SMALL = f"{BUILD} --millions 14"
CHECKS = (
    Check(
        "machine",
        1,
        part("machine"),
        part("machine"),
        "compiles; the memory of the card and of the container",
        each("device", "torch", "free_gb", "host_gb", "compiled"),
    ),
    Check(
        "whole path",
        5,
        part("study --trials 12"),
        part("study --trials 3"),
        "a verdict and a checkpoint",
        each("verdict", "seconds", "item_evaluations"),
    ),
    Check(
        "same numbers",
        6,
        part("same"),
        part("same --methods linear,ties,sce"),
        "0 for every method",
        each("method", "differ"),
    ),
    Check(
        "bandwidth",
        6,
        bench(f"{BUILD} --millions 3000 --methods linear,task_arithmetic,ties,dare_linear"),
        bench(f"{SMALL} --no-compile --methods linear,ties"),
        "copy_fraction 0.35 to 0.7, ties 0.17 to 0.5",
        each("method", "copy_fraction", "seconds"),
    ),
    Check(
        "kernels a pack",
        3,
        bench(f"{BUILD} --millions 1000 --donors 5 --methods linear,ties"),
        bench(f"{SMALL} --methods linear"),
        "few kernels (triton_ in its output), no recompiles after the first packs",
        each("method", "seconds"),
        ("TORCH_LOGS=output_code,recompiles",),
    ),
    Check(
        "pinned donors",
        5,
        bench(f"{BUILD} --millions 3000 --donors 3 --tier pinned --methods linear"),
        bench(f"{SMALL} --no-compile --tier disk --methods linear"),
        "24 GB at the rate of the bus: 0.5 s; peak_mb the donors' and a tenth at most",
        each("method", "seconds", "peak_mb", "device_mb"),
    ),
    Check(
        "statistics",
        5,
        bench(f"{BUILD} --millions 1000 --tier pinned --methods ties,dare_linear,della,sce"),
        bench(f"{SMALL} --no-compile --methods ties,della"),
        "first_seconds of seconds, not of minutes",
        each("method", "first_seconds", "peak_mb"),
    ),
    Check(
        "decoding",
        5,
        bench(
            "decode --hidden 4096 --layers 32 --vocabulary 128000 --prompt 512 --tokens 64 "
            "--dtype bfloat16"
        ),
        bench("decode --hidden 128 --layers 2 --vocabulary 96 --prompt 12 --tokens 4 --rows 1,4"),
        "batch 25 to 30 ms a pass, captured 5 to 8",
        each("rows", "batch_ms", "slots_ms", "captured_ms", "captured_differ"),
    ),
    Check(
        "against lm-eval",
        6,
        bench("score --dtype bfloat16"),
        bench("score --tasks generation --items 8 --layers 1"),
        "few items differ in bfloat16",
        each("task", "ratio", "items", "items_differ"),
    ),
    Check(
        "out of memory",
        2,
        part("memory"),
        part("memory"),
        "batches are halved, and scores are as before",
        each("halved_to", "same"),
    ),
    Check(
        "several workers",
        6,
        part("study --trials 6 --workers 2"),
        part("study --trials 2 --workers 2"),
        "a verdict, from two workers on half a card each",
        each("verdict", "seconds", "item_evaluations"),
    ),
    Check(
        "agreement",
        4,
        bench("agreement --models Llama,Qwen3,Gemma3Text --dtypes bfloat16"),
        bench("agreement --models Llama --dtypes float32"),
        "every mode True (captured on a GPU alone); items_differ at most stock_differ",
        each("model", "items", "items_differ", "stock_differ", "modes"),
    ),
)


def run(number: int, check: Check, device: str, out: Path) -> str:
    """Do a check, and return its row."""
    command = [*(check.small if device == "cpu" else check.command), "--device", device]
    log = out / f"{number:02d}-{check.name.replace(' ', '-')}.txt"
    environment = os.environ | dict(each.split("=", 1) for each in check.settings)
    minutes = check.minutes * (3 if device == "cpu" else 1)  # its cores may have other work
    start = time.perf_counter()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command,
                check=False,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=60 * minutes,
                env=environment,
            )
            state = "ran" if done.returncode == 0 else f"FAILED ({done.returncode})"
        except subprocess.TimeoutExpired:
            state = f"FAILED (over {minutes:g} min)"
    texts = log.read_text(errors="replace").splitlines()
    lines = [json.loads(text) for text in texts if text.startswith("{") and text.endswith("}")]
    found = check.found(lines) if lines else f"see {log}"
    seconds = time.perf_counter() - start
    return f"| {number} | {check.name} | {state} | {seconds:.0f} s | {found} | {check.expected} |"


def machine(given: argparse.Namespace) -> None:
    import psutil
    import torch

    from merge_engine.models.free_memory import free_bytes

    name = torch.cuda.get_device_name() if given.device == "cuda" else platform.processor()
    compiled = torch.compile(lambda x: 2 * x + 1)(torch.ones(9, device=given.device))
    line = {
        "device": name or "CPU",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "free_gb": round(free_bytes(given.device, 1.0) / 1e9, 1),
        "host_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "compiled": bool((compiled == 3).all()),
    }
    print(json.dumps(line))


def same(given: argparse.Namespace) -> None:
    """Merge on the device and on the CPU, and count elements that differ."""
    import torch

    from bench_build import live_model, make_models, recipe_for
    from in_memory import IN_MEMORY
    from merge_engine.building.builder import Builder
    from merge_engine.methods import METHODS as ROWS
    from merge_engine.models.model_set import ModelSet

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        models = make_models(Path(folder), 20, 3, 0)
        for method in given.methods.split(",") if given.methods else ROWS:
            weights = []
            for device in ("cpu", given.device):
                os.environ["MERGESEARCH_CACHE"] = f"{folder}/{device}"
                model_set = ModelSet.open(models)
                model_set.place(torch.device(device), IN_MEMORY)
                builder = Builder(live_model(model_set).to(device), model_set)
                builder.build(recipe_for(method, models))
                weights.append([weight.cpu() for weight in builder.model.parameters()])
            differ = sum(int((a != b).sum()) for a, b in zip(*weights, strict=True))
            print(json.dumps({"method": method, "differ": differ}), flush=True)


def memory(given: argparse.Namespace) -> None:
    """Score with batches that do not fit, and with those that do."""
    import torch

    from objectives.entries import TaskEntry
    from objectives.harness.harness import Harness
    from objectives.harness.tasks import load_tasks
    from tiny_models import make_model, make_tokenizer
    from tiny_tasks import ANSWER, write_rows, write_task

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"question": f"{n} and {n + 1}?", "answer": "x"} for n in range(24)]
        write_rows(folder / "answer.jsonl", rows)
        write_task(folder, "answer", **ANSWER)
        os.chdir(folder)
        model = make_model().to(given.device)
        tasks = load_tasks([TaskEntry(task="answer")], [folder])
        harness = Harness(tasks, model=model, tokenizer=make_tokenizer())
        items = range(len(harness.items))
        expected = harness.score(model, items)

        def fill(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            if len(inputs[0]) > 5:
                raise torch.OutOfMemoryError("more than five rows")

        model.model.layers[0].mlp.register_forward_pre_hook(fill)
        found = [one.value for one in harness.score(model, items)]
        line = {"halved_to": harness.language_model.batch_size_per_gpu}
        print(json.dumps(line | {"same": found == [one.value for one in expected]}))


def study(given: argparse.Namespace) -> None:
    """Run a study of tiny models, as the command does."""
    from search.cli import main as mergesearch
    from tiny_models import LETTERS, make_llama
    from tiny_tasks import ANSWER, write_rows, write_task

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MERGESEARCH_CACHE"] = f"{folder}/cache"
        base = make_llama(folder / "base", seed=0)
        for seed, donor in enumerate("abc", start=1):
            make_llama(folder / donor, seed=seed, base=base)
        words = ["".join(pair) for pair in itertools.permutations(LETTERS[:9], 2)]
        rows = [{"question": f"{one}=", "answer": one[0]} for one in words]
        write_rows(folder / "answer.jsonl", rows)
        write_task(folder, "answer", **ANSWER)
        wanted = {
            "base_model": "base",
            "models": [*"abc"],
            "search": {
                "methods": ["task_arithmetic", "ties"],
                "trials": given.trials,
                "tune": False,
            },
            "objective": {
                "tasks": [{"task": "answer"}],
                "include_path": ".",
                "items": {"search": 24, "select": 16, "test": 24},
                "block": 8,
            },
        }
        (folder / "study.yaml").write_text(yaml.safe_dump(wanted))
        command = ["run", str(folder / "study.yaml"), "--out", str(folder / "run")]
        command += ["--device", given.device, "--no-compile"]
        if given.workers > 1:
            command += ["--workers", str(given.workers)]
            command += ["--gpus-per-worker", "0.5"] if given.device == "cuda" else []
        start = time.perf_counter()
        code = mergesearch(command)
        if code:
            sys.exit(code)
        result = json.loads((folder / "run" / "result.json").read_text())
        line = {key: result[key] for key in ("verdict", "item_evaluations")}
        print(json.dumps(line | {"seconds": round(time.perf_counter() - start, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", default="", help="numbers of checks")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    parser.add_argument("--part", choices=["machine", "same", "memory", "study"])
    parser.add_argument("--methods", default="")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    if given.part:
        {"machine": machine, "same": same, "memory": memory, "study": study}[given.part](given)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = {int(one) for one in given.only.split(",") if one} or {*range(1, len(CHECKS) + 1)}
    print("| | check | | took | found | expected |\n|---|---|---|---|---|---|", flush=True)
    for number, check in enumerate(CHECKS, start=1):
        if number in wanted:
            print(run(number, check, given.device, given.out), flush=True)


if __name__ == "__main__":
    main()
