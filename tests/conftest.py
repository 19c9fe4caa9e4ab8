"""Fixtures: offline libraries, tiny real models and studies on disk, a simulated run."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each, instead of threads that wait for one
    os.environ["OMP_NUM_THREADS"] = "1"

import json
import math
import string
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from hypothesis import settings
from safetensors.torch import load_file

from landscape import demo
from merge_engine.building.export import write_checkpoint
from merge_engine.building.merging import built_tensors
from merge_engine.building.plan import plan_merge
from merge_engine.errors import MergeError
from merge_engine.recipe.recipe_file import parse_recipe
from search.pipeline import finish
from search.proposing.starts import baselines
from search.running.workers import EvalJob
from simulated import SimulatedWorkers, simulated_context, simulated_run
from tiny_models import make_llama

SCRIPT = "<script>alert(1)</script>"  # of prompts

gc.freeze()  # what has been imported is no garbage, and need not be looked through again

pytest_plugins = ["tiny_tasks"]

settings.register_profile("mergesearch", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mergesearch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is none."""
    if not torch.cuda.is_available():
        skipped = pytest.mark.skip(reason="needs a CUDA device, and torch finds none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skipped)


@pytest.fixture(scope="session", autouse=True)
def statistics_cache(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Path]:
    """Keep statistics of donors for this session alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        # lm-eval's index takes ten seconds to build: from one session to the next
        kept = pytestconfig.cache.mkdir("task_index")
        (folder / "task_index").symlink_to(kept.resolve(), target_is_directory=True)
        patch.setenv("MERGESEARCH_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float32 base and three donors of it: base, a, b, c."""
    folder = tmp_path_factory.mktemp("zoo")
    base = make_llama(folder / "base", seed=0)
    for seed, name in enumerate("abc", start=1):
        make_llama(folder / name, seed=seed, base=base)
    return folder


@pytest.fixture(scope="session")
def simulated_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on simulated workers, not to be changed.

    It has a Pareto front, floors, failed trials and prompts that are HTML.
    """
    search = {"trials": 24, "front": True, "stop": False}
    floors = {"constraints": {"demo_rev": 0.5}}
    counts = {"search": 120, "select": 80, "test": 80}
    context = simulated_context(
        demo(0), 0, counts, search=search, objective=floors, prompt=f"{SCRIPT} {{}}".format
    )
    inputs = {recipe.key for recipe in baselines(context.space).values()}

    def failure(job: EvalJob) -> Exception | None:
        fails = job.recipe.key not in inputs and int(job.recipe.key, 16) % 6 == 0
        return MergeError("tensor 'model.norm.weight' has NaN or Inf") if fails else None

    workers = SimulatedWorkers(context.objective, failure=failure)
    run = simulated_run(tmp_path_factory.mktemp("simulated") / "run", context, workers)
    finish(run, math.inf)
    return run.folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """``make_llama``, for tests that need models of their own."""
    return make_llama


def build_recipe(mapping: dict, out: Path) -> dict[str, torch.Tensor]:
    """Build a recipe into ``out`` as the command does; returns its tensors."""
    recipe, _ = parse_recipe(mapping, "r.yaml")
    plan = plan_merge(recipe)
    tensors = built_tensors(plan, torch.device("cpu"))
    write_checkpoint(tensors, out, shapes=plan.shapes(), files=plan.files)
    return load_file(out / "model.safetensors")


def build_with_mergekit(mapping: dict, out: Path, **options: object) -> dict[str, torch.Tensor]:
    """Build as mergekit-yaml does, in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mergekit's own
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(mapping)))
        options = {"random_seed": 0, "quiet": True, "write_model_card": False} | options
        run_merge(config, str(out), options=MergeOptions(**options))
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="session")
def build() -> Callable[..., dict[str, torch.Tensor]]:
    """``build_recipe``."""
    return build_recipe


@pytest.fixture(scope="session")
def mergekits() -> Callable[..., dict[str, torch.Tensor]]:
    """``build_with_mergekit``; it never forgets a path, so models need fresh folders."""
    return build_with_mergekit


@pytest.fixture(scope="session")
def make_study(zoo: Path) -> Callable[..., Path]:
    """Write a study of the zoo with two small real lm-eval tasks; returns its YAML file."""

    def write(folder: Path, **changes: Any) -> Path:
        tasks = folder / "tasks"
        tasks.mkdir(parents=True)
        random = Random(0)
        for name in ("pick", "tell"):
            rows = [
                _row("".join(random.sample(string.ascii_lowercase, 5)), name) for _ in range(60)
            ]
            (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (tasks / f"{name}.yaml").write_text(yaml.safe_dump(_task(name), sort_keys=False))
        study = {
            "base_model": str(zoo / "base"),
            "models": [str(zoo / name) for name in "abc"],
            "search": {
                "methods": ["task_arithmetic", "ties", "dare_linear", "model_stock"],
                "trials": 16,
            },
            "objective": {
                "include_path": "tasks",
                "tasks": [{"task": "pick"}, {"task": "tell", "weight": 2.0}],
                "items": {"search": 24, "select": 16, "test": 24},
                "block": 8,
            },
        }
        for path, value in changes.items():
            part: Any = study
            *parents, last = path.split("__")
            for parent in parents:
                part = part[parent]
            part[last] = value
        if isinstance(study["search"], dict):
            study["search"].setdefault("tune", False)  # which would take most of the time
        file = folder / "study.yaml"
        file.write_text(yaml.safe_dump(study, sort_keys=False))
        return file

    return write


def _row(text: str, task: str) -> dict[str, Any]:
    if task == "pick":
        return {"question": f"{text}=", "choices": [*text[:4]], "label": ord(text[4]) % 4}
    return {"question": f"{text}:", "answer": text[0]}


def _task(name: str) -> dict[str, Any]:
    shared = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "doc_to_text": "question",
        "target_delimiter": "",
    }
    if name == "pick":
        options = {"doc_to_choice": "choices", "doc_to_target": "label"}
        return (
            shared
            | options
            | {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
        )
    generation = {"until": ["\n"], "max_gen_toks": 1, "do_sample": False}
    options = {"doc_to_target": "answer", "generation_kwargs": generation}
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    return shared | options | {"output_type": "generate_until", "metric_list": [metric]}
