"""Read YAML safely, and the pydantic base of all files of this project."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from typing_extensions import override

from merge_engine.errors import MergeError, reading, reason
from merge_engine.plain_files import in_other_form, other_than_file

_YAML_BYTES, _PARTS = 10_000_000, 1_000_000  # of a file, and of a document with its aliases
_DEPTH = 100  # levels of a document
_NAME = 200  # characters of a path in a message
_TAG = "tag:yaml.org,2002:"
_UNWANTED = ("set", "omap", "pairs", "binary")  # types of YAML that no file of ours has

DtypeName = Annotated[
    Literal["float16", "bfloat16", "float32", "float64"],
    BeforeValidator(lambda name: str(name).removeprefix("torch.")),
]


class FrozenModel(BaseModel):
    """An immutable pydantic model that refuses unknown keys.

    A field with a default may be null, as YAML reads a key with nothing behind it: it is then as if
    left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {key: v for key, v in raw.items() if v is not None or key not in optional}

    @override
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the fields without cached properties, which are derived again."""
        copied = super().model_copy(update=update, deep=deep)
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied


# libyaml, which PyYAML's wheels have, is several times as fast: it matters for a recipe that has a
# weight for every tensor.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def dump_yaml(content: object) -> str:
    """Return plain data as YAML, keys in their order, an entry a line."""
    text: str = yaml.dump(content, Dumper=_DUMPER, sort_keys=False, default_flow_style=False)
    return text


def find_folder(name: str, beside: Path | None = None) -> Path | None:
    """Return a name's folder, relative to ``beside``; None if there is none.

    Names that no folder can have (empty, too long, an unknown user's home) count as missing.
    """
    return _find(name, beside, Path.is_dir)


def find_file(name: str, beside: Path | None = None) -> Path | None:
    """Return a name's file, relative to ``beside``; None if there is none."""
    return _find(name, beside, Path.is_file)


def _find(name: str, beside: Path | None, is_there: Callable[[Path], bool]) -> Path | None:
    try:
        path = ((beside or Path()) / name).expanduser()
        if name and not is_there(path):
            path = in_other_form(path) or path
        return path if name and is_there(path) else None
    except (OSError, RuntimeError, ValueError):  # too long, unknown user's home, zero byte
        return None


def _is_piped(path: Path) -> bool:
    """Return whether a path is a shell's process substitution, ``<(command)``."""
    return path.is_relative_to("/dev/fd") or path.is_relative_to("/proc")


def _shown(path: Path) -> str:
    text = str(path)
    return text if len(text) <= _NAME else f"{text[:_NAME]}..."


def _strerror(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _check_depth(data: bytes, path: Path) -> None:
    """Refuse YAML nested so deeply that libyaml would crash the process."""
    depth = 0
    for event in yaml.parse(data, _LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH:
            raise MergeError(f"{path}: nested more than {_DEPTH} levels deep; correct it")


def _check_node(node: yaml.Node | None, path: Path) -> None:
    """Refuse a document with duplicate keys, or that aliases make recursive or huge."""
    sizes: dict[int, int] = {}  # of parts, with what aliases stand for, by identity
    inside: set[int] = set()

    def size(part: yaml.Node | None) -> int:
        if part is not None and part.tag.removeprefix(_TAG) in _UNWANTED:
            line = part.start_mark.line + 1
            raise MergeError(
                f"{path}: line {line}: write a plain list, mapping or text, without "
                f"!!{part.tag.removeprefix(_TAG)}"
            )
        if not isinstance(part, yaml.CollectionNode):
            return 1
        if id(part) in inside:
            raise MergeError(f"{path}: an alias stands for what it is in; write that out")
        if id(part) not in sizes:
            inside.add(id(part))
            if isinstance(part, yaml.MappingNode):
                _check_keys_differ(part, path)
            sizes[id(part)] = 1 + sum(map(size, _parts(part)))
            inside.remove(id(part))
        return sizes[id(part)]

    if size(node) > _PARTS:
        raise MergeError(f"{path}: with its aliases it has {size(node):,} parts; write fewer")


def _parts(node: yaml.CollectionNode) -> Iterator[yaml.Node]:
    for part in node.value:
        yield from part if isinstance(part, tuple) else (part,)


def _check_keys_differ(node: yaml.MappingNode, path: Path) -> None:
    """Refuse a mapping with duplicate keys, of which YAML would take the last."""
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise MergeError(
                    f"{path}: line {key.start_mark.line + 1}: the key {key.value!r} comes twice; "
                    "keep one"
                )
            seen.add(key.value)


def load_yaml(path: Path) -> Mapping[str, Any]:
    """Return the mapping in a YAML file of one document.

    Raises:
        MergeError: The file is missing, is not YAML, or holds something else.
    """
    first, *others = load_documents(path)
    if others:
        raise MergeError(
            f"{path}: {1 + len(others)} documents, separated by '---', where one is expected; "
            "recipes that use one another are built by `mergesearch build`: name the built folder"
        )
    return first


def load_documents(path: Path) -> Sequence[Mapping[str, Any]]:
    """Return the mappings in a YAML file, one for each document that is not empty.

    Raises:
        MergeError: The file is missing, is not YAML, or holds something else.
    """
    try:
        if not _is_piped(path) and (kind := other_than_file(path)):
            raise ValueError(f"is {kind}, not a file")
        with path.open("rb") as opened:
            data = opened.read(_YAML_BYTES + 1)
    except (OSError, ValueError) as error:
        raise MergeError(f"{_shown(path)}: {_strerror(error)}; check the path") from None
    if len(data) > _YAML_BYTES:
        raise MergeError(f"{path}: too large for a recipe or a study; check the path")
    with reading(f"{path}: not YAML", "correct it"):
        try:
            # Bytes: PyYAML then finds UTF-16, which PowerShell writes, by its byte order mark.
            _check_depth(data, path)
            for node in yaml.compose_all(data, _LOADER):
                _check_node(node, path)
            found = list(yaml.load_all(data, _LOADER))
        except yaml.reader.ReaderError as error:
            raise MergeError(f"{path}: not YAML: {reason(error)}; save it as UTF-8 text") from None
    documents = [document for document in found if document is not None]
    if not documents:
        raise MergeError(f"{path} is empty; `mergesearch init` writes a first study")
    if not all(isinstance(document, dict) for document in documents):
        raise MergeError(f"{path}: expected a mapping of keys to values, like 'dtype: float32'")
    return documents
