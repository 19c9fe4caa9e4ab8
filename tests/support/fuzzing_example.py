"""The valid example that fuzzing changes: a file of each kind that the program reads."""

import contextlib
import json
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from merge_engine.models.cache_folder import default_folder
from mistakes import BUILD, CHECK, INIT, RUN, furnish
from objectives.harness.task_index import registered_tasks
from search.cli import main
from tiny_models import pickled_twin
from tiny_tasks import mean_of

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"
OWN = """
from objectives.base import Item, ItemResult, ItemSnapshot, Response


class Own:
    def __init__(self, model, tokenizer):
        self.tasks = {"own": 1.0}
        self.items = [Item("own", f"own{row}", row) for row in range(12)]

    def snapshots(self, items):
        return [ItemSnapshot(f"item {number}", "") for number in items]

    def score(self, model, items):
        return [ItemResult(number / 12) for number in items]

    def respond(self, model, items):
        return [Response("text") for number in items]
"""
CARD = """---
license: apache-2.0
language: [en, de]
tags: [merge, math]
datasets: [gsm8k]
base_model: org/base
model-index:
- name: a
  results: []
---
# A model
"""
FILES = {
    "README.md": CARD,
    "notes.txt": "".join(f"a line of text, number {n}.\n\n" for n in range(20)),
    "own_class.py": OWN,
    "own.jsonl": "".join(
        json.dumps({"question": f"{n}?", "answer": "1"}) + "\n" for n in range(16)
    ),
}
PICK = {
    "task": "pick",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "tasks/pick.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": mean_of("acc"),
}


def make_example(folder: Path, zoo: Path) -> None:
    """Create a folder in which every command works, and run each, so that forks import nothing."""
    furnish(folder, zoo)
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("base", "a"):
        shutil.copy(folder / "README.md", folder / name)
        (folder / name / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    questions = [
        {"question": f"{n}?", "choices": ["x", "y", "z"], "gold": n % 3} for n in range(20)
    ]
    rows = "".join(json.dumps(row) + "\n" for row in questions)
    (folder / "tasks" / "pick.jsonl").write_text(rows, encoding="utf-8")
    data = {"data_files": {"test": str(folder / "tasks" / "pick.jsonl")}}
    pick = yaml.safe_dump(PICK | {"dataset_kwargs": data})
    (folder / "tasks" / "pick.yaml").write_text(pick, encoding="utf-8")
    pickled_twin(folder / "b", folder / "pickled")
    _save_shards(folder / "b", folder / "shards")
    _save_adapter(folder / "lora")
    registered_tasks(default_folder())
    with contextlib.chdir(folder):
        for command in (CHECK, BUILD, RUN, "score a study.yaml --device cpu", f"{INIT} own.jsonl"):
            assert main(command.split()) == 0, command
        shutil.rmtree("out")
        Path("new.yaml").unlink()


def _save_shards(model: Path, folder: Path) -> None:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[number::2]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _save_adapter(folder: Path) -> None:
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {"q_proj": 2},
        "target_modules": ["q_proj"],
        "modules_to_save": None,
        "layers_to_transform": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    pair = {}
    for layer in range(3):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        pair[f"{key}.lora_A.weight"] = torch.full((2, 32), 0.01)
        pair[f"{key}.lora_B.weight"] = torch.full((32, 2), 0.01)
    save_file(pair, folder / "adapter_model.safetensors", metadata={"format": "pt"})
