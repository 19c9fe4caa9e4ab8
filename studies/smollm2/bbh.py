"""Write items of BIG-bench as BIG-bench Hard asks them, for lm-eval's own leaderboard tasks.

lm-eval's task files stay as they are, with their few-shot examples and their metric; only where
they read their documents from is another.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Final

import lm_eval.tasks
import yaml

from .family import EVALUATED
from .items import Example, Item, write_items

LEADERBOARD: Final = Path(lm_eval.tasks.__file__).parent / "leaderboard" / "bbh_mc"


def _best(example: Example) -> str:
    scores: Mapping[str, float] = example["target_scores"]
    return max(scores, key=scores.__getitem__)


def _lettered(question: str, options: Sequence[str], right: str) -> Item:
    letters = [f"({letter})" for letter in ascii_uppercase[: len(options)]]
    listed = "\n".join(" ".join(pair) for pair in zip(letters, options, strict=True))
    return {
        "input": f"{question}\nOptions:\n{listed}",
        "target": letters[options.index(right)],
    }


def _date(example: Example) -> Item:
    return _lettered(example["input"], sorted(example["target_scores"]), _best(example))


def _snarks(example: Example) -> Item:
    question, *statements = re.split(r" \([ab]\) ", example["input"])
    statements = [statement.removesuffix(".") for statement in statements]
    return _lettered(question, statements, statements[_best(example) == "(b)"])


def _navigate(example: Example) -> Item:
    question = "If you follow these instructions, do you return to the starting point?"
    options = "Options:\n- Yes\n- No"
    return {
        "input": f"{question} {example['input']}\n{options}",
        "target": "Yes" if _best(example) == "True" else "No",
    }


def _counting(example: Example) -> Item:
    return {"input": example["input"], "target": example["target"][-1]}


def _sports(example: Example) -> Item:
    return {
        "input": f'Is the following sentence plausible? "{example["input"]}."',
        "target": "yes" if _best(example) == "plausible" else "no",
    }


# How an example of BIG-bench's task of the same name is asked.
ASKED: Final[Mapping[str, Callable[[Example], Item]]] = {
    "date_understanding": _date,
    "navigate": _navigate,
    "object_counting": _counting,
    "snarks": _snarks,
    "sports_understanding": _sports,
}


def bbh_items(name: str, examples: Sequence[Example]) -> Iterator[Item]:
    """Yield a task's items that lm-eval's file has a choice for and no few-shot example of."""
    config = yaml.safe_load((LEADERBOARD / f"{name}.yaml").read_text(encoding="utf-8"))
    shown = {sample["input"] for sample in config["fewshot_config"]["samples"]}
    for example in examples:
        item = ASKED[name](example)
        if item["target"] in config["doc_to_choice"] and item["input"] not in shown:
            yield item


def write_task(folder: Path, name: str, examples: Sequence[Example]) -> None:
    """Write a task's documents, and a file that has lm-eval's own task read them."""
    items = {item["input"]: item for item in bbh_items(name, examples)}
    write_items(folder / f"{name}.jsonl", list(items.values())[:EVALUATED])
    task = {
        "task": f"leaderboard_bbh_{name}",
        "include": str(LEADERBOARD / f"{name}.yaml"),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
