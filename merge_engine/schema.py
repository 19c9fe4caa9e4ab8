"""What the YAML and JSON files of this project are checked with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict
from typing_extensions import override

from merge_engine.errors import MergeError

DtypeName = Annotated[
    Literal["float16", "bfloat16", "float32", "float64"],
    BeforeValidator(lambda name: str(name).removeprefix("torch.")),
]


class FrozenModel(BaseModel):
    """An immutable pydantic model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @override
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the fields alone: what was derived from them once is derived anew."""
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
        # Bytes: PyYAML then finds UTF-16, which PowerShell writes, by its byte order mark.
        found = list(yaml.load_all(path.read_bytes(), _LOADER))
    except OSError as error:
        raise MergeError(f"{path}: {error.strerror}; check the path") from None
    except yaml.reader.ReaderError as error:
        reason = " ".join(str(error.reason).split())
        raise MergeError(f"{path}: not YAML: {reason}; save it as UTF-8 text") from None
    except yaml.YAMLError as error:
        raise MergeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    documents = [document for document in found if document is not None]
    if not documents:
        raise MergeError(f"{path} is empty; `mergesearch init` writes a study to begin with")
    if not all(isinstance(document, dict) for document in documents):
        raise MergeError(f"{path}: expected a mapping of keys to values, like 'dtype: float32'")
    return documents
