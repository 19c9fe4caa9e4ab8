"""The ``Objective`` protocol: numbered items, and a result per item for a live model."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from objectives.journal import Journal


_REASON = 300  # characters of a library's or a user's own message


def printable(text: str) -> str:
    r"""Return untrusted text with every unprintable character escaped, for terminals and logs.

    A model can write escape sequences that move the cursor or retitle the window. Line breaks are
    escaped as well (``\n``), so that one message stays one line.
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


class ObjectiveError(ValueError):
    """Bad input to an objective; the message says where, what was found and what to do.

    It may quote a model's response or a data file, so it is made printable.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def reason(error: BaseException) -> str:
    """Return the first words of an error's message."""
    text = str(error)
    return text if len(text) <= _REASON else f"{text[:_REASON]}..."


@contextlib.contextmanager
def objective_errors(where: str) -> Iterator[None]:
    """Turn any error inside into an ``ObjectiveError`` that begins with ``where``."""
    try:
        yield
    except (ObjectiveError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a user's code may exit, and Rust's panic
        raise ObjectiveError(f"{where}: {type(error).__name__}: {reason(error)}") from error


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise an ``ObjectiveError`` if Python code in the main thread takes longer.

    Other threads, and C code that ignores signals, are not interrupted.
    """

    def stop(_number: int, _frame: object) -> None:
        raise ObjectiveError(f"{what} takes longer than {seconds:g} s; make it simpler")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, outer)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Item:
    """One document of the named task. Its number is its index in ``Objective.items``."""

    task: str
    # Hex hash of question and target; items with equal keys are the same question, even in two
    # tasks or twice in one.
    key: str
    doc_id: int  # row of the task's evaluation split, counted from 0
    # Whether the model generates the answer, so that its length in tokens counts.
    generated: bool = False


@dataclass(frozen=True)
class ItemSnapshot:
    """Model-independent inputs of an item, stored with a run.

    A resumed run refuses items whose ``full_prompt``, ``gold``, ``encoding`` or ``rules`` differ.
    """

    prompt: str  # text of the prompt, with the choices where there are some
    gold: str  # target, and the row of data it comes from
    encoding: str = ""  # hash of the token ids
    rules: str = ""  # hash of how the task builds prompts and scores responses
    settings: str = ""  # generation settings as JSON; "" where nothing is generated
    input_tokens: int = 0  # tokens of the prompts, a shared beginning counted once; 0 if unknown
    max_new_tokens: int = 0  # limit of a response in tokens; 0 where nothing is generated

    @property
    def full_prompt(self) -> str:
        """The prompt and, on a last line, the generation settings: what a run stores."""
        return f"{self.prompt}\n{self.settings}" if self.settings else self.prompt


def without_settings(full_prompt: str) -> str:
    """Return the prompt of a stored ``ItemSnapshot.full_prompt``."""
    prompt, _, last = full_prompt.rpartition("\n")
    with contextlib.suppress(ValueError):
        return prompt if isinstance(json.loads(last), dict) else full_prompt
    return full_prompt


@dataclass(frozen=True)
class ItemResult:
    """Score of a model's answer to one item."""

    value: float  # in the unit of the task's own metric; higher is better
    # A continuous score, such as a log-likelihood in nats, where the task has one: it shows changes
    # too small for `value`.
    margin: float | None = None
    # Why the answer could not be scored, as printable text; `value` is then 0.
    fault: str | None = None
    tokens: int = 0  # tokens generated, end-of-text included


@dataclass(frozen=True)
class Response:
    """Text of a model's answer to an item; untrusted."""

    # Generated text, the chosen answer, or the log-likelihood of a given one.
    text: str | None = None
    target: str | None = None  # correct answer; None where there is none
    prompt: str | None = None  # `ItemSnapshot.prompt`


class Objective(Protocol):
    """Evaluates a live model on some of a benchmark's items; never sees a recipe.

    A user's own class need not inherit from it, and may leave out ``respond`` and what losses need:
    ``targets``, ``right_answers`` and ``loss``. Its ``score`` and ``loss`` take the model and the
    items alone.

    Attributes:
        tasks: Task name to its weight in the study's mean; weights are positive, of any scale.
        items: All items; an item's number is its index here.
    """

    tasks: Mapping[str, float]
    items: Sequence[Item]

    def snapshots(self, items: Sequence[int]) -> list[ItemSnapshot]:
        """Return the inputs of the numbered items, to be compared when a run is resumed."""

    def score(
        self, model: nn.Module, items: Sequence[int], journal: Journal | None = None
    ) -> list[ItemResult]:
        """Return one result per numbered item; a task's score is the mean of its items' values.

        Args:
            model: The live model, in evaluation mode and without gradients.
            items: Item numbers, in any order.
            journal: Of this recipe's responses to these items: those in it are not computed again.

        Raises:
            ObjectiveError: The model gave no usable answer to an item.
        """

    def respond(self, model: nn.Module, items: Sequence[int]) -> list[Response]:
        """Return the text of the model's answers, one ``Response`` per item."""

    def targets(self, items: Sequence[int]) -> list[str | None]:
        """Return the labels that the tasks themselves have for the items' losses.

        For a generated answer a label is the target's text, if the task's metric judges it right.
        It is "" for items that need none (choices, log-likelihoods, text), and None if the task has
        no label or the objective no loss.
        """

    def right_answers(self, model: nn.Module, items: Sequence[int]) -> list[str | None]:
        """Generate answers and return the right ones, as labels for items without a target.

        An answer is right if its value is 1, or 100 for a metric in per cent. None stands for a
        wrong answer, and for items whose answers are not generated.

        Args:
            model: The live model, in evaluation mode and without gradients.
            items: Item numbers, in any order.
        """

    def loss(self, model: nn.Module, items: Sequence[int], targets: Sequence[str]) -> Tensor:
        """Return differentiable losses (n,) of n items, float32 on the model's device.

        With log-likelihoods in nats: for multiple choice the cross-entropy over what the metric
        compares, ``logsumexp(all) - logsumexp(correct)``; for a given or generated answer minus its
        log-likelihood; for text the same divided by its UTF-8 bytes.

        Args:
            model: The live model, in evaluation mode. Losses have gradients with respect to those
                of its parameters that require them.
            items: Item numbers, in any order.
            targets: The items' labels, from ``targets`` or ``right_answers``.

        Raises:
            ObjectiveError: The objective has no loss, or a loss is not a number.
        """
