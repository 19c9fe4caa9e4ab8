"""What the YAML and JSON files of this project are checked with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict

from merge_engine.errors import MergeError

DtypeName = Annotated[
    Literal["float16", "bfloat16", "float32", "float64"],
    BeforeValidator(lambda name: str(name).removeprefix("torch.")),
]


class FrozenModel(BaseModel):
    """An immutable pydantic model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def load_yaml(path: Path) -> Mapping[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        MergeError: The file is missing, is not YAML, or holds something else.
    """
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MergeError(f"{path}: {error.strerror}; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MergeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if mapping is None:
        raise MergeError(f"{path} is empty; `mergesearch init` writes a study to begin with")
    if not isinstance(mapping, dict):
        raise MergeError(f"{path}: expected a mapping of keys to values, like 'dtype: float32'")
    return mapping
