"""What a model has responded so far, in a file: a kill loses little of a long job.

A job notes each response as it comes: a log-likelihood, or a token of a text that is being written.
The same job, given to another process, goes on from there.
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

LINE: Final = 160  # tokens of a line at least: those of a block of 20 short texts


class Journal:
    """Responses to a job's requests, numbered by type in the order in which they are made.

    Lines have digests, and one that was cut short ends what is read. The file is private, and a new
    one takes its place when it is opened again: a process that is not dead yet cannot write into
    it. Where none can be written, on a full disk, a job is done without.

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
        """Open a file to be read and added to, and close it; None where there is none."""
        if file is None:
            yield None
            return
        journal = cls(file)
        try:
            yield journal
        finally:
            journal.close()

    def add_logliks(self, found: Mapping[int, tuple[float, bool]]) -> None:
        """Write log-likelihoods by request."""
        numbers, values = [*found], [*found.values()]
        self._take("logliks", numbers, values)
        self._write([("logliks", numbers, values)])

    def add_tokens(self, numbers: Sequence[int], tokens: Sequence[int]) -> None:
        """Note the next token of the texts of some requests; write them when there are ``LINE``."""
        self._take("tokens", numbers, tokens)
        self._waiting.append((numbers, tokens))
        if sum(len(tokens) for _, tokens in self._waiting) >= LINE:
            self._write([("tokens", *waiting) for waiting in self._waiting])
            self._waiting = []

    def close(self) -> None:
        """Write no more."""
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
    """Create a file with a content, in place of an earlier one, and return it open."""
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
    """Read a journal's lines up to one that is not as it was written."""
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
