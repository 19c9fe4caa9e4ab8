"""A file with a job's responses so far, so that a kill loses little of a long job.

A log-likelihood, or a token of a generated text, is recorded as soon as it is computed. Another
process that is given the same job continues from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Final

LINE: Final = 160  # least tokens per line, as in a block of 20 short texts


class Journal:
    """Responses to a job's requests, numbered by type in the order in which they are made.

    Every line has a digest; reading stops at the first damaged line. The file is private. Opening
    it again replaces it, so that a process that is still alive cannot write to it. If it cannot be
    written, on a full disk say, the job runs without a journal.

    Attributes:
        logliks: Log-likelihoods in nats, and whether greedy decoding gives the text, by request.
        texts: Tokens generated so far, by request.
    """

    def __init__(self, file: Path) -> None:
        self.logliks: dict[int, tuple[float, bool]] = {}
        self.texts: dict[int, list[int]] = {}
        self._file: FileIO | None = None
        self._waiting: list[tuple[Sequence[int], Sequence[int]]] = []  # tokens to be written
        lines = [*_whole_lines(file)]
        for line in lines:
            for kind, numbers, values in json.loads(line.partition(b" ")[2]):
                self._take(kind, numbers, values)
        with contextlib.suppress(OSError):
            self._file = _replaced(file, b"".join(lines))

    @classmethod
    @contextlib.contextmanager
    def opened(cls, file: Path | None) -> Iterator[Journal | None]:
        """Open a journal for reading and appending, and close it on exit; None without a file."""
        if file is None:
            yield None
            return
        journal = cls(file)
        try:
            yield journal
        finally:
            journal.close()

    def add_logliks(self, found: Mapping[int, tuple[float, bool]]) -> None:
        """Record log-likelihoods by request."""
        numbers, values = [*found], [*found.values()]
        self._take("logliks", numbers, values)
        self._write([("logliks", numbers, values)])

    def add_tokens(self, numbers: Sequence[int], tokens: Sequence[int]) -> None:
        """Record the next token of some requests' texts, at least ``LINE`` tokens per write."""
        self._take("tokens", numbers, tokens)
        self._waiting.append((numbers, tokens))
        if sum(len(tokens) for _, tokens in self._waiting) >= LINE:
            self._write([("tokens", *waiting) for waiting in self._waiting])
            self._waiting = []

    def close(self) -> None:
        """Close the file; nothing is written from then on."""
        if self._file:
            self._file.close()
        self._file = None

    def _take(self, kind: str, numbers: Sequence[int], values: Sequence[Any]) -> None:
        if kind == "logliks":
            self.logliks |= zip(numbers, map(tuple, values), strict=True)
            return
        for number, token in zip(numbers, values, strict=True):
            self.texts.setdefault(number, []).append(token)

    def _write(self, entries: Sequence[tuple[str, Sequence[int], Sequence[Any]]]) -> None:
        content = json.dumps(entries).encode() + b"\n"
        try:
            if self._file:
                self._file.write(_digest(content) + b" " + content)
        except OSError:
            self.close()


def _replaced(file: Path, content: bytes) -> FileIO:
    """Create a file with this content, replacing an earlier one, and return it open."""
    name, flags = str(file), os.O_WRONLY | os.O_CREAT | os.O_EXCL
    file.parent.mkdir(mode=0o700, exist_ok=True)
    if not os.path.lexists(name):
        return FileIO(os.open(name, flags, 0o600), "w")
    new = str(file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial"))
    opened = FileIO(os.open(new, flags, 0o600), "w")
    opened.write(content)
    os.replace(new, name)
    return opened


def _whole_lines(file: Path) -> Iterator[bytes]:
    """Yield a journal's lines up to the first damaged one."""
    try:
        written = file.read_bytes() if file.is_file() else b""
    except OSError:
        return
    for line in written.splitlines(keepends=True):
        digest, _, content = line.partition(b" ")
        if digest != _digest(content):
            return
        yield line


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).hexdigest().encode()
