"""Build lm-eval's requests, (prompt, continuation) pairs, for a task's whole split at once."""

from __future__ import annotations

import inspect
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import GenerationConfig

from objectives.base import Item, ItemSnapshot, ObjectiveError, objective_errors, time_limit
from objectives.harness.encoding import TEMPLATE_SECONDS, Prompting
from objectives.harness.metrics import Metric
from objectives.harness.task_factory import TEMPLATE_MAKES, limited_templates
from objectives.harness.tasks import LoadedTask, check_greedy, digest
from objectives.inference.token_tree import common_length

if TYPE_CHECKING:
    from objectives.inference.fast_hflm import FastHFLM

_LOG = logging.getLogger(__name__)

# Not part of the rules: the data themselves are compared item by item.
_DATA_KEYS = ("metadata", "dataset_path", "dataset_name", "dataset_kwargs")


@dataclass(frozen=True)
class Question:
    """One document of one task: the requests made for it, and the metric that scores them."""

    item: Item
    task: Task
    metric: Metric
    requests: tuple[Instance, ...]

    @property
    def where(self) -> str:
        """Task and document, as error messages name them."""
        return f"task {self.item.task!r}, doc {self.item.doc_id}"


def build_questions(
    loaded: LoadedTask, language_model: FastHFLM, prompting: Prompting
) -> list[Question]:
    """Build the requests of a task's whole split, as ``simple_evaluate`` does.

    Raises:
        ObjectiveError: They cannot be built, or lm-eval would fail on them during the study.
    """
    task, chat = loaded.task, prompting.apply_chat_template
    where = f"task {loaded.name!r}: its prompts could not be built"
    with loaded.random_state.active(), objective_errors(where), limited_templates(loaded.name):
        task.build_all_requests(
            system_instruction=prompting.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
            chat_template=_limited(language_model.apply_chat_template) if chat else None,
            tokenizer_name=language_model.tokenizer_name if chat else "",
        )
    if chat and prompting.system_instruction:
        _check_instruction(loaded.name, prompting.system_instruction, language_model)
    by_doc: dict[int, list[Instance]] = defaultdict(list)
    for request in sorted(task.instances, key=lambda request: request.idx):
        _check_request(loaded.name, request, language_model)
        by_doc[cast("int", request.doc_id)].append(request)
    return [
        Question(loaded.items[doc_id], task, loaded.metric, tuple(by_doc[doc_id]))
        for doc_id in sorted(by_doc)
    ]


def _limited(template: Callable[..., str]) -> Callable[..., str]:
    """Return a chat template's function with limits of time and length."""

    def apply(*arguments: Any, **settings: Any) -> str:
        with time_limit(TEMPLATE_SECONDS, "the chat template"):
            text = template(*arguments, **settings)
        if len(text) > TEMPLATE_MAKES:
            raise ObjectiveError(
                f"the chat template makes {len(text):,} characters; correct it, or unset "
                "apply_chat_template"
            )
        return text

    return apply


def _check_instruction(name: str, instruction: str, language_model: FastHFLM) -> None:
    """Refuse a system instruction that makes no difference to a chat."""
    chats = (
        [{"role": "system", "content": content}, {"role": "user", "content": "?"}]
        for content in (instruction, f"<{instruction}>")
    )
    with objective_errors(f"task {name!r}: the chat template"):
        first, second = map(_limited(language_model.apply_chat_template), chats)
    if first == second:
        raise ObjectiveError(
            f"task {name!r}: system_instruction is in none of its prompts, because the tokenizer's "
            "chat template has no system message; leave it out, or put it into the task's "
            "description"
        )


def _check_request(name: str, request: Instance, language_model: FastHFLM) -> None:
    """Refuse unknown settings, responses that are sampled, or that leave no tokens for a prompt."""
    if request.request_type == "generate_until":
        settings = normalize_gen_kwargs(request.args[1])
        check_greedy(name, settings)
        if unknown := settings.keys() - {*vars(GenerationConfig()), "until", "max_gen_toks"}:
            raise ObjectiveError(
                f"task {name!r}: its generation_kwargs have {min(unknown, key=str)!r}, which "
                "transformers does not know; correct or remove it"
            )
    limit = _max_new_tokens(request, language_model)
    if request.request_type == "generate_until" and limit < 1:
        raise ObjectiveError(f"task {name!r}: max_gen_toks is {limit}; set 1 or more")
    if limit >= language_model.max_length:
        raise ObjectiveError(
            f"task {name!r}: max_gen_toks is {limit} but the model's context, by its config.json, "
            f"has {language_model.max_length} tokens; set a smaller max_gen_toks, or correct that"
        )


def check_tokens(questions: Sequence[Question], language_model: FastHFLM) -> None:
    """Refuse prompts without tokens, or with a token that the model has no row for.

    Raises:
        ObjectiveError: There is one, or the tokenizer cannot encode it.
    """
    rows = language_model.model.get_input_embeddings().weight.shape[0]
    folder = language_model.tokenizer.name_or_path
    for question in questions:
        for request in question.requests:
            with objective_errors(f"{question.where}: {folder} cannot encode its prompt"):
                tokens = _tokens(request, language_model)
            if not tokens and request.request_type == "generate_until":
                raise ObjectiveError(
                    f"{question.where}: the tokenizer makes no token of its prompt "
                    f"{request.args[0]!r}; correct its doc_to_text"
                )
            if tokens and (last := max(tokens)) >= rows:
                token = language_model.tokenizer.decode([last])
                raise ObjectiveError(
                    f"{question.where}: its prompt has the token {token!r}, number {last} of the "
                    f"tokenizer in {folder}, and the model has {rows} rows; fetch both again, or "
                    "write 'tokenizer: {source: base}' to give it rows"
                )


def snapshots(questions: Sequence[Question], language_model: FastHFLM) -> list[ItemSnapshot]:
    """Return the questions' snapshots, and warn once of truncated prompts.

    lm-eval would warn in every call, prompt by prompt.
    """
    of_task = {question.item.task: question for question in questions}
    rules = {name: _rules(question) for name, question in of_task.items()}
    truncated: dict[str, list[bool]] = defaultdict(list)
    found = []
    for question in questions:
        name, requests = question.item.task, question.requests
        tokens = [_tokens(request, language_model) for request in requests]
        truncated[name].append(
            any(_is_truncated(*pair, language_model) for pair in zip(requests, tokens, strict=True))
        )
        prompt, settings = _prompt_and_settings(question)
        found.append(
            ItemSnapshot(
                prompt=prompt,
                gold=_gold(question),
                encoding=digest(json.dumps(tokens)),
                rules=rules[name],
                settings=settings,
                input_tokens=_count_tokens(tokens),
                max_new_tokens=max(_max_new_tokens(each, language_model) for each in requests),
            )
        )
    for name, each in truncated.items():
        if any(each):
            _LOG.warning(
                "task %r: %d of %d prompts do not fit in %d tokens and lose their beginning",
                *(name, sum(each), len(each), language_model.max_length),
            )
    return found


def _tokens(request: Instance, language_model: FastHFLM) -> list[int]:
    """Return the token ids of prompt and continuation, as lm-eval encodes them."""
    if request.request_type == "loglikelihood" and request.args[0]:
        prompt, continuation = language_model.encode_pair(*request.args)
        return [*prompt, *continuation]
    text = request.args[1 if request.request_type == "loglikelihood" else 0]
    return language_model.tok_encode(text)


def _count_tokens(tokens: Sequence[list[int]]) -> int:
    """Count the tokens of a question's requests, a shared prefix once."""
    shared = min(common_length(tokens[0], each) for each in tokens)
    return sum(map(len, tokens)) - shared * (len(tokens) - 1)


def _max_new_tokens(request: Instance, language_model: FastHFLM) -> int:
    """Return the limit of a response in tokens; 0 where nothing is generated."""
    if request.request_type != "generate_until":
        return 0
    settings = normalize_gen_kwargs(request.args[1], language_model.max_gen_toks)
    return cast("int", settings["max_gen_toks"])


def _is_truncated(request: Instance, tokens: Sequence[int], language_model: FastHFLM) -> bool:
    """Return whether lm-eval drops the first tokens of this prompt."""
    limit: int = language_model.max_length
    if request.request_type == "loglikelihood":
        limit += 1  # the last token of a continuation is never fed to the model
    elif request.request_type == "generate_until":
        limit -= _max_new_tokens(request, language_model)
    else:  # rolling: long texts are scored in windows
        return False
    return len(tokens) > limit


def _prompt_and_settings(question: Question) -> tuple[str, str]:
    """Return the text of all requests, and the generation settings or "".

    For multiple choice: the prompt once, then every choice.
    """
    parts: list[str] = []
    for request in question.requests:
        texts = [json.dumps(part) if isinstance(part, dict) else part for part in request.args]
        parts += [text for text in texts if text not in parts[:1]]
    generated = len(question.requests) == 1 and isinstance(question.requests[0].args[-1], dict)
    settings = parts.pop() if generated else ""
    return "\n".join(parts), settings


def _gold(question: Question) -> str:
    doc = question.requests[0].doc
    content = {"target": question.task.doc_to_target(doc), "row": doc}
    return json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)


def _rules(question: Question) -> str:
    """Hash the task's configuration, the source of its functions, metric and filter."""
    task, metric = question.task, question.metric
    config = {key: value for key, value in task.dump_config().items() if key not in _DATA_KEYS}
    rules = [config, metric.name, metric.filter.name]
    return digest(json.dumps(rules, sort_keys=True, default=_source))


def _source(value: object) -> str:
    """Return a function's source or a value's type; a memory address would differ every time."""
    if inspect.isfunction(value):
        return inspect.getsource(value)
    return getattr(value, "__qualname__", type(value).__qualname__)
