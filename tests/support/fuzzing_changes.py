"""Random changes of bytes, texts and trees of lists and mappings."""

import copy
import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

UNKNOWN = "zzz"  # a key that nobody knows
STRANGE: Sequence[Any] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1.5, 1e308, -1e308, 5e-324, math.nan, math.inf),
    *(-math.inf, 10**6, 10**12, 2**31, 2**63, 2**64 - 1, -(2**63), 10**400),
    *("", " ", "x", "0", "1", "-1", "1e5", "nan", "true", "null", "yes", "a", "b", "base", "auto"),
    *("é", "日本", "\u202e", "\x1b[31m", "\0", "\n", "a\nb", "\ufeff", "[/b]", "%s", "{}", "{x}"),
    *("../x", "/", "/etc/passwd", "/dev/zero", "~", "~nosuchuser/x", "$HOME", ".", "..", "a/b"),
    *("org/name", "org/name@main", "a+b", "base+lora", "x" * 5000, "x/" * 2000, "{{ 1 // 0 }}"),
    *("{% for", "__import__", "module:Class", "os:system", "(a", "(a+)+$", "*", "**/*", "a" * 300),
    *([], {}, [[]], [None], {"": ""}, {"x": None}, [0, 1], [1, 0], [0.1, 0.2, 0.3], ["a", "a"]),
    *([1, "x"], {"a": 1}, [{}], [{"x": 1}], [[1, 2], [3]], list(range(100))),
)


def change_tree(tree: Any, draw: Random, times: int | None = None) -> Any:
    """Return a copy of a tree with one to three random changes."""
    tree = copy.deepcopy(tree)
    for _ in range(times or draw.choice((1, 1, 1, 2, 3))):
        tree = _change_once(tree, draw)
    return tree


def add_unknown(tree: Any, draw: Random) -> Any:
    """Return a copy of a tree with an unknown key in its top mapping."""
    return copy.deepcopy(tree) | {UNKNOWN: draw.choice(STRANGE)}


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every mapping or list with each of its keys or indices."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def _change_once(tree: Any, draw: Random) -> Any:
    places = list(_places(tree))
    if not places or draw.random() < 0.02:
        return draw.choice(STRANGE)
    # Parts of lists and mappings that have many are one place together.
    within = draw.choice(list({id(part): part for part, _ in places}.values()))
    part, key = draw.choice([place for place in places if place[0] is within])
    value, others = part[key], [other[k] for other, k in places]
    choice = draw.randrange(8)
    if choice == 0:
        del part[key]
    elif choice == 1 and isinstance(part, dict):
        part[draw.choice((misspelt(str(key), draw), "", "x" * 300, "\x1b[31m"))] = part.pop(key)
    elif choice == 2 and isinstance(part, list):
        part.insert(key, copy.deepcopy(draw.choice(STRANGE)))
    else:
        part[key] = copy.deepcopy(_other_value(value, others, draw))
    return tree


def _other_value(value: Any, others: Sequence[Any], draw: Random) -> Any:
    match draw.randrange(6):
        case 0:
            return draw.choice(([value], {"x": value}, str(value)))
        case 1:
            return draw.choice(others)
        case 2:
            return _deep(value, draw.choice((5, 90, 101)))
        case 3:
            return _other_number(value, draw)
        case _:
            return draw.choice(STRANGE)


def _deep(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def _other_number(value: Any, draw: Random) -> Any:
    if isinstance(value, int | float):
        return draw.choice((-value, value + 0.5, value * 1000, value + 1, value - 1, str(value)))
    if isinstance(value, list):
        return value * draw.choice((2, 50))
    return misspelt(value, draw) if isinstance(value, str) else value


def misspelt(word: str, draw: Random) -> str:
    """Return a word with a letter left out, doubled or changed, or in capitals."""
    if not word:
        return "x"
    at = draw.randrange(len(word))
    return draw.choice(
        (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + "z" + word[at + 1 :],
            word.upper(),
            f" {word}",
        )
    )


def change_bytes(data: bytes, draw: Random) -> bytes:
    """Return data with one to three random changes."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        at, length = draw.randrange(len(data) + 1), draw.choice((1, 2, 8, 64))
        match draw.randrange(8):
            case 0 | 1 if at < len(data):
                data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
            case 2:
                data = data[:at]
            case 3:
                data = data[:at] + draw.randbytes(length) + data[at:]
            case 4:
                data = data[:at] + data[at + length :]
            case 5:
                data = data[:at] + data[at : at + length] * 2 + data[at + length :]
            case 6:
                data = data[:at] + bytes(length) + data[at + length :]
            case _:
                data = draw.choice((b"", b"\xef\xbb\xbf" + data, b"\n" + data, data + b"\0"))
    return data


def change_text(text: str, pieces: Sequence[str], draw: Random) -> bytes:
    """Return a text with random insertions, lines moved, dropped or repeated, or bytes changed."""
    if draw.random() < 0.15:
        return change_bytes(text.encode(), draw)
    lines = text.splitlines(keepends=True) or [""]
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(lines))
        line, column = lines[at], draw.randrange(len(lines[at]) + 1)
        match draw.randrange(6):
            case 0 | 1:
                lines[at] = line[:column] + draw.choice(pieces) + line[column:]
            case 2:
                lines.insert(at, draw.choice(pieces) + "\n")
            case 3:
                lines.insert(draw.randrange(len(lines)), line)
            case 4:
                lines[at] = line[:column]
            case _:
                head, mark, _rest = line.partition(":")
                lines[at] = f"{head}{mark} {draw.choice(pieces)}\n"
    if draw.random() < 0.1:
        return "".join(lines).encode(draw.choice(("utf-16", "latin-1", "utf-32")), "replace")
    return "".join(lines).encode("utf-8", "surrogatepass")
