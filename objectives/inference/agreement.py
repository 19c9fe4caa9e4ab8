"""Measure which shortcuts of the forward pass reproduce lm-eval's scores on a model.

Each shortcut is tried on a few made-up questions of random tokens. It is kept if its
log-likelihoods differ from ``HFLM``'s by no more than rounding (in 16 bits: by no more than
``HFLM``'s own differ between batches of one and of many), and if decoding generates the tokens of
highest logit, except for near ties. If context hardly changes a model's scores, a wrong shortcut
may pass the test, but then it hardly changes scores either.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

import torch
from transformers import DynamicCache, PreTrainedModel

from objectives.base import ObjectiveError
from objectives.inference.decoding import captures
from objectives.inference.decoding_plan import Continuation, StopCriteria
from objectives.inference.fast_hflm import FastHFLM
from objectives.inference.forward import Modes
from objectives.inference.loglikelihood import Loglikelihood
from objectives.inference.token_tree import Request, Tokens
from objectives.inference.vllm_engine import TextEngine

_LOG = logging.getLogger(__name__)

_GENERATED_TOKENS = 4
_MIN_LENGTH = 12  # tokens a model must accept for the questions to have their shapes
_SHORTCUTS: Final = {  # by field of Modes, each tried with those kept before it
    "scoring": "batches ordered by length",
    "sparse_logits": "logits at answer tokens only",
    "sparse_mlp": "the last MLP at answer tokens only",
    "tree": "answers as branches of one token tree",
    "prefix": "shared prefixes computed once",
    "generation": "batched greedy decoding",
    "refilled": "slots that waiting prompts take as texts end",
    "captured": "captured decoding passes",
}


_ATTENTION: Final = ("tree", "prefix", "refilled")  # not for recurrent models
_GENERATION: Final = ("generation", "refilled", "captured")  # tried by generating text


def settle_modes(language_model: FastHFLM) -> None:
    """Try each shortcut on the model, and turn on those that agree with ``HFLM``.

    A warning names each shortcut that stays off, and why.
    """
    language_model.use_modes(Modes())
    if language_model.device.type == "meta":
        return  # without weights there is nothing to try, and nothing will be evaluated
    if language_model.backend != "causal" or language_model.max_length < _MIN_LENGTH:
        _LOG.warning(
            "the model is evaluated by lm-eval's own code, which is slower: it is not a causal "
            "language model of %d tokens or more",
            _MIN_LENGTH,
        )
        return
    reference = _Reference.measure(language_model)
    for name, shortcut in _SHORTCUTS.items():
        agreed = language_model.modes
        if name in _ATTENTION and _is_recurrent(language_model.model):
            _leave_off(shortcut, "the model carries a recurrent state")
            continue
        if not _may_be_tried(name, language_model):
            continue
        language_model.use_modes(replace(agreed, **{name: True}))
        if problem := reference.problem(language_model, texts=name in _GENERATION):
            language_model.use_modes(agreed)
            _leave_off(shortcut, problem)
            if name == "scoring":
                return


def settle_engine(language_model: FastHFLM, engine: TextEngine) -> None:
    """Let an engine generate text, after checking that it generates what the live model would.

    Raises:
        ObjectiveError: It generates something else.
    """
    if not language_model.modes.generation:
        raise ObjectiveError(
            "objective.engine: this model's texts are written by lm-eval's own code; leave the key "
            "out"
        )
    language_model.engine = engine
    reference = _Reference.measure(language_model)
    if problem := reference.problem(language_model, texts=True):
        raise ObjectiveError(
            f"objective.engine: its texts are not the model's greedy ones ({problem}); leave the "
            "key out"
        )


def _may_be_tried(name: str, language_model: FastHFLM) -> bool:
    """Return whether the shortcuts that a shortcut builds on are on."""
    if name == "refilled":
        return language_model.modes.generation
    return name != "captured" or (language_model.modes.refilled and captures(language_model.runner))


def _leave_off(shortcut: str, reason: str) -> None:
    _LOG.warning("the model is evaluated without %s, which is slower: %s", shortcut, reason)


def _is_recurrent(model: PreTrainedModel) -> bool:
    """Return whether layers carry a state from token to token, which no attention mask resets."""
    cache = DynamicCache(config=model.config)
    return any(getattr(cache, "is_linear", []))


@dataclass(frozen=True)
class _Reference:
    """``HFLM``'s scores of the made-up questions."""

    requests: list[Request]
    scores: list[Loglikelihood]  # log-likelihoods, each request in a batch of its own
    tolerance: float  # largest difference of a log-likelihood that counts as rounding, in nats

    @classmethod
    def measure(cls, language_model: FastHFLM) -> _Reference:
        requests = _questions(language_model)
        in_tokens = [(None, request.context, request.targets) for request in requests]
        scores = [
            language_model.stock_loglikelihoods([each], disable_tqdm=True)[0] for each in in_tokens
        ]
        batched = language_model.stock_loglikelihoods(in_tokens, disable_tqdm=True)
        noise = _largest_difference(batched, scores)
        largest = max((abs(value) for value, _ in scores if not math.isnan(value)), default=0.0)
        softmax = 32 * torch.finfo(torch.float32).eps * largest
        model = torch.finfo(language_model.model.dtype).eps * largest
        # a model that differs from itself by more than rounding is affected by padding
        return cls(requests, scores, softmax + model / 4 + min(4 * noise, model))

    def problem(self, language_model: FastHFLM, *, texts: bool) -> str | None:
        """Return what is wrong with log-likelihoods, or with ``texts``; None: nothing."""
        try:
            return (self.compare_texts if texts else self.compare_scores)(language_model)
        except Exception as error:  # a model may raise anything at inputs it does not support
            return f"{type(error).__name__}: {error}".splitlines()[0]

    def compare_scores(self, language_model: FastHFLM) -> str | None:
        """Return how log-likelihoods with the present modes are wrong; None: they agree."""
        scores = language_model.scorer.score_requests(self.requests)
        difference = _largest_difference(scores, self.scores)
        if difference > self.tolerance:
            return f"a log-likelihood differs by {difference:.2g}, more than {self.tolerance:.2g}"
        # in 16 bits rounding decides between near ties, in lm-eval too
        exact = language_model.model.dtype == torch.float32
        if exact and any(o[1] != t[1] for o, t in zip(scores, self.scores, strict=True)):
            return "another answer is the greedy one"
        return None

    def compare_texts(self, language_model: FastHFLM) -> str | None:
        """Return how tokens generated with the present modes are wrong; None: they agree.

        The texts have 1 to 4 tokens, so that slots are refilled while other texts go on.
        """
        prompts = list({request.group: request.inputs for request in self.requests}.values())
        criteria = [StopCriteria(1 + number % _GENERATED_TOKENS) for number in range(len(prompts))]
        decoder = language_model.decoder
        wanted = list(zip(prompts, criteria, strict=True))
        if language_model.engine:
            generated = language_model.engine.decode(wanted)
        else:
            before, decoder.most_rows = decoder.most_rows, 2
            generated = decoder.decode(decoder.plan(Continuation(*one) for one in wanted))
            decoder.most_rows = before
        for prompt, tokens in zip(prompts, generated, strict=True):
            gap = _logit_gap(language_model, prompt, tokens)
            if gap > self.tolerance:
                return f"a generated token's logit is {gap:.2g} below the greedy token's"
        return None


def _largest_difference(ours: Sequence[Loglikelihood], theirs: Sequence[Loglikelihood]) -> float:
    """Return the largest difference of log-likelihoods; infinity where only one is NaN."""
    pairs = [(one, other) for (one, _), (other, _) in zip(ours, theirs, strict=True)]
    if any(math.isnan(one) != math.isnan(other) for one, other in pairs):
        return math.inf
    differences = [abs(one - other) for one, other in pairs]  # NaN for two NaN or two infinities
    return max((each for each in differences if not math.isnan(each)), default=0.0)


def _questions(language_model: FastHFLM) -> list[Request]:
    """Return requests of four questions with one prefix: random, greedy and long answers."""
    draw = Random(0)
    vocabulary = language_model.model.get_input_embeddings().num_embeddings
    size = min(24, language_model.max_length // 3)

    def random_tokens(count: int) -> Tokens:
        return tuple(draw.randrange(vocabulary) for _ in range(count))

    prefix = random_tokens(size)
    requests: list[Request] = []
    for group in range(4):
        context = prefix + random_tokens(1 + group * size // 6)
        greedy = (int(_last_logits(language_model, context).argmax()),)
        for answer in (random_tokens(1), greedy, greedy + random_tokens(size // 4)):
            requests.append(Request(len(requests), group, (context + answer)[:-1], answer))
    return requests


@torch.no_grad()
def _last_logits(language_model: FastHFLM, tokens: Sequence[int]) -> torch.Tensor:
    inputs = torch.tensor([tokens], device=language_model.device)
    return language_model.model(inputs).logits[0, -1].float()  # type: ignore[no-any-return]


def _logit_gap(language_model: FastHFLM, prompt: Tokens, generated: Sequence[int]) -> float:
    """Return how far the logit of the first non-greedy token is below the maximum; 0: none is."""
    for length, token in enumerate(generated):
        logits = _last_logits(language_model, (*prompt, *generated[:length]))
        if token != int(logits.argmax()):
            return float(logits.max() - logits[token])
    return 0.0
