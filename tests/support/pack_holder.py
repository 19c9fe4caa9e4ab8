"""A process that reads models' packs as one of two workers, for tests of what they share.

    python pack_holder.py [--limited] MODEL ...   lay the packs or find them, and say which files
    python pack_holder.py --stall CONTENTS        fill half of a pack, and never the rest
    python pack_holder.py --write CONTENTS        lay a pack, and write to it

It says one line and keeps what it has until its input ends. ``--limited``: no file may grow.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_128

from merge_engine.models.model_set import ModelSet
from merge_engine.models.placement import Budget
from merge_engine.models.shared_packs import share

SIZE = 1 << 20  # bytes of a pack without models


@contextmanager
def holder(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """Start such a process, and return it with what it says; end it afterwards."""
    command = [sys.executable, __file__, *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            yield process, json.loads(line) if line else None
        finally:
            process.kill()


def mapped(process: int | str = "self") -> list[int]:
    """Return the inodes of the shared packs that a process has mapped, sorted."""
    maps = Path(f"/proc/{process}/maps").read_text()
    return sorted(int(n) for n in re.findall(r" (\d+) +/memfd:mergesearch-", maps))


def proportional() -> int:
    """Return the bytes of shared memory that are this process's, those of others divided."""
    found = re.search(r"Pss_Shmem: +(\d+)", Path("/proc/self/smaps_rollup").read_text())
    return int(found[1]) << 10 if found else 0


def say(**said: Any) -> None:
    print(json.dumps(said), flush=True)


def stall(out: torch.Tensor) -> None:
    out[: SIZE // 2] = 1
    say(filling=True)
    time.sleep(600)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+")
    parser.add_argument("--limited", action="store_true")
    parser.add_argument("--stall", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.stall:
        share(options.names, SIZE, stall)
    if options.write:
        found = share(options.names, SIZE, lambda out: out.fill_(1))
        say(first=found[0].item())
        sys.stdin.read()
        found[0] = 2
    if options.limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    models = ModelSet.open(options.names)
    models.place(torch.device("cpu"), Budget(device=1 << 62, sharers=2))
    placement, digest = models.placement, xxh3_128()
    packs = [placement.packed(model, pack) for model in options.names for pack in placement.packs]
    for each in packs:
        digest.update(each.numpy().data)
    size = sum(each.nbytes for each in packs)
    say(files=mapped(), digest=digest.hexdigest(), size=size, proportional=proportional())
    sys.stdin.read()
    say(proportional=proportional())


if __name__ == "__main__":
    main()
