"""Read BIG-bench's tasks from its sdist and split their items by content."""

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

from .family import EVALUATED, Task

SDIST: Final = "bigbench==1.0.0"  # 360 MB
UNPACKED: Final = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--quiet"]

Example = Mapping[str, Any]  # of BIG-bench: input, and target or target_scores
Item = dict[str, Any]  # prompt and answer; of choices also these, and the label of the answer


class Split(NamedTuple):
    """Disjoint items of a task."""

    trained: list[Item]
    evaluated: list[Item]


def download(folder: Path) -> Path:
    """Return BIG-bench's sdist, downloaded by pip if it is not in ``folder``."""
    if not (found := sorted(folder.glob("bigbench-*.tar.gz"))):
        pip = [sys.executable, "-m", "pip", "download", *UNPACKED, "--dest", str(folder), SDIST]
        subprocess.run(pip, check=True)
        found = sorted(folder.glob("bigbench-*.tar.gz"))
    return found[0]


def read_examples(archive: Path, names: Collection[str]) -> dict[str, list[Example]]:
    """Read the examples of some of BIG-bench's tasks, named by their folders."""
    examples = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("benchmark_tasks/")[2].removesuffix("/task.json")
            if name in names and (file := tar.extractfile(member)):
                examples[name] = json.load(file)["examples"]
    return examples


def split_items(task: Task, examples: Sequence[Example]) -> Split:
    """Split a task's items by a hash of their words.

    Items of the same words in any order count as one: 17 + 25 is not evaluated if 25 + 17 was
    trained on.
    """
    by_content: dict[str, Item] = {}
    for example in examples:
        words = " ".join(sorted(example["input"].lower().split()))
        by_content.setdefault(sha256(words.encode()).hexdigest(), _item(task, example))
    items = [item for _, item in sorted(by_content.items())]
    trained = task.training.items if task.training else 0
    return Split(items[:trained], items[trained:][:EVALUATED])


def write_items(file: Path, items: Sequence[Item]) -> None:
    """Write items as JSON lines."""
    lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    file.write_text("".join(lines), encoding="utf-8")


def _item(task: Task, example: Example) -> Item:
    prompt = task.prompt.format(input=example["input"].strip())
    if task.written:
        return {"prompt": prompt, "answer": example["target"]}
    scores: Mapping[str, float] = example["target_scores"]
    right = max(scores, key=scores.__getitem__)
    label = list(scores).index(right)
    choices = re.findall(task.choices, example["input"]) if task.choices else list(scores)
    return {"prompt": prompt, "answer": choices[label], "choices": choices, "label": label}
