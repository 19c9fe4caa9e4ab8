"""checksums.txt: the files of a checkpoint and their checksums.

Each line is a checksum and a path, as ``xxh128sum --check`` reads them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from merge_engine.models.fingerprint import checksum

CHECKSUMS: Final = "checksums.txt"
_LINE: Final = re.compile(r"([0-9a-f]{32})  (.+)")


def write_checksums(folder: Path) -> None:
    """Read a checkpoint's files back, and write their checksums beside them."""
    files = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    )
    lines = [f"{checksum(folder / name)}  {name}\n" for name in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def listed_files(folder: Path) -> dict[str, str]:
    """Return the checksum of each file of a checkpoint by its path.

    Empty if there is no list, or if a path in it leads outside the folder, also by a link.
    """
    if not (folder / CHECKSUMS).is_file():
        return {}
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    matches = [match for line in lines if (match := _LINE.fullmatch(line))]
    listed = {match[2]: match[1] for match in matches}
    own = folder.resolve()
    elsewhere = any(
        Path(name).is_absolute() or (folder / name).resolve() != own / name for name in listed
    )
    return {} if elsewhere or len(listed) < len(lines) else listed


def is_whole(folder: Path) -> bool:
    """Return whether all of a checkpoint's files are there and unchanged."""
    listed = listed_files(folder)
    try:
        return bool(listed) and all(
            (folder / name).is_file() and checksum(folder / name) == listed[name] for name in listed
        )
    except OSError:
        return False
