"""Fuzz the command line: random changes of valid files and words at every border.

    PYTHONPATH=tests/support python tests/bench/fuzz.py --inputs 100 [--seed S] [--first N]
        [--border B ...] [--out DIR]

Prints one JSON line: ``inputs`` by border, ``exits`` (their exit codes), ``seconds`` (the longest)
and ``findings`` by border. A finding is an input that neither works nor is refused in one sentence
that names it, or leaves a file. It is saved at once in ``DIR/BORDER-SEED-N``: the folder that the
command started in, ``command.json``, and ``said.txt`` with its stderr. To repeat an input:
``--border B --seed S --first N --inputs 1``.

Each number is tried at every border in turn; then the counts so far go to stderr. Ctrl-C or SIGTERM
ends it early: the line then covers what was tried, and ``next`` is the --first to continue with.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from fuzzing import Finding, Fuzzer
from fuzzing_borders import BORDERS
from tiny_models import make_llama


def keep(fuzzer: Fuzzer, finding: Finding, out: Path) -> None:
    """Save the input of a finding, to be looked at and tried again."""
    folder = out / f"{finding.border}-{fuzzer.seed}-{finding.number}"
    shutil.rmtree(folder, ignore_errors=True)
    fuzzer.change(finding.border, finding.number)
    shutil.copytree(fuzzer.place, folder, symlinks=True)
    (folder / "command.json").write_text(json.dumps(["mergesearch", *finding.command]))
    (folder / "said.txt").write_text(f"{finding.kind}\n{finding.said}")
    print(folder, finding.kind, finding.said[-200:], file=sys.stderr, flush=True)


def fuzz(options: argparse.Namespace, top: Path) -> dict[str, object]:
    base = make_llama(top / "zoo" / "base", seed=0)
    for seed, name in enumerate("ab", start=1):
        make_llama(top / "zoo" / name, seed=seed, base=base)
    (top / "work").mkdir()
    with open(os.devnull, "w") as nowhere:
        stdout, sys.stdout = sys.stdout, nowhere
        fuzzer = Fuzzer(top / "work", top / "zoo", options.seed)
        sys.stdout = stdout
    inputs, findings, number = Counter[str](), Counter[str](), options.first
    try:
        for number in range(options.first, options.first + options.inputs):
            for border in options.border or BORDERS:
                if finding := fuzzer.run(border, number):
                    findings[border] += 1
                    keep(fuzzer, finding, options.out)
                inputs[border] += 1
            counted = f"{inputs.total()} inputs, {findings.total()} findings"
            print(f"number {number}: {counted}", file=sys.stderr, flush=True)
        number += 1
    except KeyboardInterrupt:
        pass
    return {
        "next": number,
        "inputs": inputs,
        "exits": fuzzer.exits,
        "seconds": round(fuzzer.longest, 1),
        "findings": findings,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20, help="of each border")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--border", nargs="+", choices=BORDERS, help="default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="for findings")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as made:
        line = fuzz(chosen, Path(made))
    print(json.dumps({"seed": chosen.seed, "first": chosen.first, **line}))
