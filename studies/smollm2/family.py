"""The family: SmolLM2-135M-Instruct, the tasks, and a specialist for four of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

INTENTS: Final = (
    "add_to_playlist, book_restaurant, get_weather, play_music, search_screening_event, "
    "search_creative_work, and rate_book"
)


@dataclass(frozen=True)
class Training:
    """How a specialist is trained."""

    items: int  # different ones, at most
    steps: int
    batch: int = 16  # items a step
    rate: float = 1e-3  # at its highest
    warm_up: int = 5  # steps of rising rate; then it falls to zero
    rank: int = 16  # of the adapter


@dataclass(frozen=True)
class Task:
    """A task of the study, made of one or more of BIG-bench's."""

    sources: tuple[str, ...]  # folders under benchmark_tasks/
    prompt: str = "{input}"
    written: bool = False  # answers are written; else chosen
    choices: str = ""  # pattern of the choices in the input; empty: those that BIG-bench scores
    training: Training | None = None  # of its specialist, if it has one


TASKS: Final[Mapping[str, Task]] = {
    "past": Task(
        ("linguistic_mappings/past_tense_json",),
        "Today I {input}. Yesterday I",
        written=True,
        training=Training(items=1200, steps=24),
    ),
    "arithmetic": Task(
        ("arithmetic/2_digit_addition", "arithmetic/2_digit_subtraction"),
        written=True,
        training=Training(items=1400, steps=110, batch=24),
    ),
    "order": Task(
        ("hyperbaton",),
        choices=r'[ab] " (.+?) "',  # the sentences; BIG-bench scores their letters
        training=Training(items=2000, steps=30, batch=8),
    ),
    "intent": Task(
        ("intent_recognition",),
        f"Predict the intent of the utterance. The possible choices are: {INTENTS}.\n{{input}}",
        training=Training(items=300, steps=24, batch=12),
    ),
    "step": Task(("goal_step_wikihow/step_inference",)),
    "unit": Task(("unit_conversion/unit_identification",)),
}
SPECIALISTS: Final[Mapping[str, Training]] = {
    name: task.training for name, task in TASKS.items() if task.training
}
EVALUATED: Final = 500  # items of a task, at most
