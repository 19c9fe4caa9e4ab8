"""Which of the fast ways of asking a model give lm-eval's answers: tried, not guessed.

A way is tried on a few made-up questions of the shapes it is for, in random tokens of the model's
own vocabulary. It is taken if its log-likelihoods are as near to ``HFLM``'s as rounding allows, in
16 bits judged by how ``HFLM`` itself differs between batches of one and of many, and if what is
decoded is what the model's own logits choose, near ties apart. The trial is as sharp as the model
is: where context hardly moves a model's answers, a wrong way can pass, and hardly matters.
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

from objectives.inference.fast_hflm import FastHFLM
from objectives.inference.modes import Decoding, Modes
from objectives.inference.token_tree import Request, Tokens, common_length

_LOG = logging.getLogger(__name__)

_DECODED = 4  # tokens
_LEAST_LENGTH = 12  # tokens a model must hold for the questions to have their shapes


_WAYS: Final = {
    "scoring": "batches by length",
    "kept": "logits at answers alone",
    "tail": "its last MLP at answers alone",
    "tree": "answers as branches of one row",
    "prefix": "a common beginning read once",
    "generation": "own decoding",
}


def settle_modes(language_model: FastHFLM) -> None:
    """Try each way on the model and set ``modes``; a warning names each one left off."""
    language_model.modes = Modes()
    if language_model.model.device.type == "meta":
        return  # without weights there is nothing to try, and nothing will be asked
    if language_model.backend != "causal" or language_model.max_length < _LEAST_LENGTH:
        _LOG.warning("this model is asked by lm-eval's own code: it is no decoder of texts")
        return
    stock = _Stock.ask(language_model)
    for name, way in _WAYS.items():
        if name in ("tree", "prefix") and _keeps_a_state(language_model.model):
            _LOG.warning("this model is asked without %s: it keeps a state", way)
            continue
        agreed = language_model.modes
        language_model.modes = replace(agreed, **{name: True})
        agree = stock.texts_agree if name == "generation" else stock.scores_agree
        try:
            problem = agree(language_model)
        except Exception as error:  # a model may raise anything at what it does not know
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if problem is None:
            continue
        language_model.modes = agreed
        _LOG.warning("this model is asked without %s: %s", way, problem)
        if name == "scoring":
            return


def _keeps_a_state(model: PreTrainedModel) -> bool:
    """Whether layers pass on what they read in order, whatever a mask says."""
    cache = DynamicCache(config=model.config)
    return any(getattr(cache, "is_linear", []))


@dataclass(frozen=True)
class _Stock:
    """What HFLM answers.

    Attributes:
        requests: The questions.
        answers: To each, asked alone.
        allowed: By how much a log-likelihood may differ from it, in nats.
    """

    requests: list[Request]
    answers: list[tuple[float, bool]]
    allowed: float

    @classmethod
    def ask(cls, language_model: FastHFLM) -> _Stock:
        requests = _questions(language_model)
        asked = [
            (None, request.tokens[: 1 - len(request.answer) or None], request.answer)
            for request in requests
        ]
        alone = [language_model.stock_scores([request])[0] for request in asked]
        noise = _largest_difference(language_model.stock_scores(asked), alone)
        largest = max((abs(value) for value, _ in alone if not math.isnan(value)), default=0.0)
        softmax = 32 * torch.finfo(torch.float32).eps * largest
        model = torch.finfo(language_model.model.dtype).eps * largest
        # a model that differs from itself by more than rounding sees the padding of its batch
        return cls(requests, alone, softmax + model / 4 + min(4 * noise, model))

    def scores_agree(self, language_model: FastHFLM) -> str | None:
        """What is wrong with the log-likelihoods of the present modes, if anything is."""
        found = language_model.answers(self.requests)
        difference = _largest_difference(found, self.answers)
        if difference > self.allowed:
            return f"a log-likelihood differs by {difference:.2g}, more than {self.allowed:.2g}"
        # in 16 bits rounding decides between near ties, in lm-eval too
        exact = language_model.model.dtype == torch.float32
        if exact and any(o[1] != t[1] for o, t in zip(found, self.answers, strict=True)):
            return "another answer is the greedy one"
        return None

    def texts_agree(self, language_model: FastHFLM) -> str | None:
        """The same for what is decoded."""
        prompts = list({request.origin: request.tokens for request in self.requests}.values())
        decoded = language_model.continued(prompts, Decoding(_DECODED))
        for prompt, ours in zip(prompts, decoded, strict=True):
            gap = _decoding_gap(language_model, prompt, ours)
            if gap > self.allowed:
                return f"a decoded token is {gap:.2g} less likely than the greedy one"
        return None


def _largest_difference(
    ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]]
) -> float:
    """The largest difference of log-likelihoods; a NaN differs from all but a NaN."""
    differences = (abs(one - other) for (one, _), (other, _) in zip(ours, theirs, strict=True))
    nans = (
        math.isnan(one) != math.isnan(other)
        for (one, _), (other, _) in zip(ours, theirs, strict=True)
    )
    return math.inf if any(nans) else max(d for d in (*differences, 0.0) if not math.isnan(d))


def _questions(language_model: FastHFLM) -> list[Request]:
    """Four questions that begin alike, their answers long, short and the model's own choice."""
    draw = Random(0)
    vocabulary = language_model.model.get_input_embeddings().num_embeddings
    size = min(24, language_model.max_length // 3)

    def words(count: int) -> Tokens:
        return tuple(draw.randrange(vocabulary) for _ in range(count))

    beginning = words(size)
    requests: list[Request] = []
    for origin in range(4):
        context = beginning + words(1 + origin * size // 6)
        chosen = (_greedy_token(language_model, context),)
        for answer in (words(1), chosen, chosen + words(size // 4)):
            whole = context + answer
            requests.append(Request(len(requests), origin, whole[:-1], answer))
    return requests


@torch.no_grad()
def _last_logits(language_model: FastHFLM, tokens: Sequence[int]) -> torch.Tensor:
    read = torch.tensor([tokens], device=language_model.device)
    return language_model.model(read).logits[0, -1].float()  # type: ignore[no-any-return]


def _greedy_token(language_model: FastHFLM, tokens: Sequence[int]) -> int:
    return int(_last_logits(language_model, tokens).argmax())


def _decoding_gap(language_model: FastHFLM, prompt: Tokens, ours: Sequence[int]) -> float:
    """How much less likely our first other token is than the one the model's logits choose."""
    theirs: list[int] = []
    while len(theirs) < len(ours) and ours[: len(theirs)] == theirs:
        theirs.append(_greedy_token(language_model, (*prompt, *theirs)))
    same = common_length(ours, theirs)
    if same == len(ours):
        return 0.0
    logits = _last_logits(language_model, (*prompt, *ours[:same]))
    return float(logits.max() - logits[ours[same]])
