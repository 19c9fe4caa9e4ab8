"""Entries of a study's task list: one frozen type per kind, its field names the keys of study.yaml.

Light on purpose: reading a study imports neither lm-eval nor torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

# A task's weight in the study's mean, of any scale; limited so that sums and ratios stay finite.
Weight = Annotated[float, Field(ge=1e-9, le=1e9)]

Engine = Literal["vllm"]  # what may generate text instead of the live model
ENGINE_MEMORY: Final = 0.4  # its share of the device's memory, its copy of the model included


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskEntry(_Entry):
    """A task, group or tag of lm-eval.

    Attributes:
        task: Its name in lm-eval, or in a YAML file of an ``include_path``.
        metric: The metric, or ``"metric,filter"``. None takes the task's only usable metric, or
            of several ``acc``, else ``exact_match``, else the first the task lists. Without a
            filter, the task's first filter is meant.
        weight: Divided equally over the tasks of a group or tag.
        num_fewshot: Examples in the prompt; None keeps the task's own number.
    """

    task: str
    metric: str | None = None
    weight: Weight = 1.0
    num_fewshot: NonNegativeInt | None = None


class TextEntry(_Entry):
    """Plain text to be predicted.

    An item's value is its probability per byte, ``exp(log-likelihood / bytes)``: one over its
    byte perplexity. Texts longer than the model's context are scored in windows, as lm-eval does.

    Attributes:
        text: Files of plain UTF-8 text; blank items are left out.
        unit: What one item is: a whole file, a paragraph (blank lines between them) or a line.
    """

    text: tuple[Path, ...] = Field(min_length=1)
    name: str = Field(min_length=1)
    unit: Literal["document", "paragraph", "line"] = "paragraph"
    weight: Weight = 1.0


class PluginEntry(_Entry):
    """An objective of the user's own.

    Attributes:
        objective: ``package.module:Class``. The class is called with the live model, its tokenizer
            and ``options`` as keyword arguments; it implements ``objectives.base.Objective``.
        options: Keyword arguments of the class.
        weight: Divided over the objective's tasks in proportion to their own weights.
    """

    objective: str
    options: dict[str, Any] = Field(default_factory=dict)
    weight: Weight = 1.0


class PromptEntry(_Entry):
    """Prompts to be continued greedily by up to ``max_tokens``; for samples, not for scores."""

    prompts: tuple[str, ...] = Field(min_length=1)
    max_tokens: PositiveInt


Entry = TaskEntry | TextEntry | PluginEntry

# The first of these keys that an entry of study.yaml has decides its kind.
ENTRY_KINDS: Final[dict[str, type[Entry]]] = {
    "task": TaskEntry,
    "text": TextEntry,
    "objective": PluginEntry,
}
