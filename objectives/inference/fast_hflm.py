"""lm-eval's ``HFLM`` with faster forward passes.

Tokens, positions and the float32 log-softmax are those of ``HFLM``, so scores are the same up to
rounding, but

* a question is read once for all its answers, and few-shot examples shared by many questions once
  for all of them (``token_tree``, ``loglikelihood``);
* logits, and the last layer's MLP, are computed only at tokens that predict a target (``forward``);
* texts with different stop criteria are generated in one loop with continuous batching
  (``decoding``).

Texts are encoded and batches planned once; nothing that depends on weights is kept between calls.
The same requests always form the same batches, and so give bit-identical values; batched with other
requests, values may differ by rounding, as in lm-eval. All shortcuts are off until
``agreement.settle_modes`` has compared each with ``HFLM`` on the model.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from objectives.inference.batch_size import BatchSizes
from objectives.inference.decoding import GreedyDecoder
from objectives.inference.decoding_plan import Continuation, StopCriteria
from objectives.inference.forward import ModelRunner, Modes
from objectives.inference.loglikelihood import (
    SOFTMAX_DTYPE,
    Loglikelihood,
    LoglikelihoodScorer,
    PrefixBatches,
)
from objectives.inference.nan_watch import NanWatch
from objectives.inference.token_tree import Request, Tokens
from objectives.inference.vllm_engine import TextEngine
from objectives.journal import Journal

_PLANS = 1024  # plans of batches kept in memory
_PROMPTS = 4096  # token ids of prompts to be continued kept in memory

# generation settings of a model that do not change greedy decoding
_HARMLESS = frozenset(
    [
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "max_length"),
        *("use_cache", "transformers_version", "_from_model_config"),
        *("output_attentions", "output_hidden_states", "return_dict_in_generate"),
    ]
)

GeneratedText = tuple[str, int]  # a text, and the number of tokens generated for it
TokenRequest = tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]  # lm-eval's own


class FastHFLM(HFLM):  # type: ignore[misc]  # lm-eval is published without types
    """``HFLM`` for a live model, with the shortcuts of ``modes``.

    Args:
        batch_size: Sequences per batch; None: the first of ``sizes``.
        settings: Model, tokenizer and context length, passed to ``HFLM``.

    Attributes:
        sizes: Batch sizes to try on the model's device.
        runner: Forward passes of the model.
        scorer: Log-likelihoods of requests in tokens, with the shortcuts that are on.
        decoder: Greedy decoding of prompts in tokens.
        engine: Generates text instead of ``decoder``; None: ``decoder`` does.
        encode_prompt: Encodes a text to be continued; cached.
        plan_generation: Plans batches of prompts, once.
    """

    def __init__(self, *, batch_size: int | None = None, **settings: Any) -> None:
        super().__init__(softmax_dtype=SOFTMAX_DTYPE, **settings)
        self.sizes = BatchSizes.of(self.device, batch_size)
        self.batch_size_per_gpu = self.sizes.first
        self.runner = ModelRunner(self.model, self.device, self.sizes.first * self.sizes.tokens)
        self.scorer = LoglikelihoodScorer(self.runner)
        self.decoder = GreedyDecoder(self.runner, self.tokenizer)
        self.engine: TextEngine | None = None
        self._encoded: dict[str, list[int]] = {}
        self._plan_scoring = functools.lru_cache(_PLANS)(self._plan_texts)
        self.plan_generation = functools.lru_cache(_PLANS)(self.decoder.plan)
        self._generated_lengths: list[int] = []
        self.encode_prompt = functools.lru_cache(_PROMPTS)(self._encode_prompt)

    @property
    @override
    def device(self) -> torch.device:
        """Device of the model's inputs; an offloaded model has its weights elsewhere."""
        own: torch.device = self.model.device
        placed = getattr(self.model, "hf_device_map", {})
        return torch.device(placed[""]) if own.type == "meta" and "" in placed else own

    @property
    def modes(self) -> Modes:
        """Shortcuts that are on."""
        return self.runner.modes

    def use_modes(self, modes: Modes) -> None:
        """Turn on these shortcuts and no others, and plan batches anew."""
        self.runner.modes = modes
        self._plan_scoring.cache_clear()
        self.plan_generation.cache_clear()
        self.decoder.release()

    def resize_batches(self, size: int) -> None:
        """Set the batch size, in sequences, and plan batches anew."""
        self.batch_size_per_gpu = size
        self.runner.tokens_per_batch = size * self.sizes.tokens
        self.use_modes(self.modes)

    @override
    def tok_encode(self, string: str, *args: Any, **settings: Any) -> list[int]:
        if args or settings:
            tokens: list[int] = super().tok_encode(string, *args, **settings)
            return tokens
        if string not in self._encoded:  # prompts are encoded for snapshots and in every call
            self._encoded[string] = super().tok_encode(string)
        return self._encoded[string]

    @override
    def loglikelihood(
        self,
        requests: list[Instance],
        disable_tqdm: bool = False,
        journal: Journal | None = None,
    ) -> list[Loglikelihood]:
        if not self.modes.scoring:
            return cast("list[Loglikelihood]", super().loglikelihood(requests, disable_tqdm))
        texts = tuple((request.task_name, _group(request), *request.args) for request in requests)
        return self.scorer.score(self._plan_scoring(texts), len(requests), journal)

    @override
    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], *args: Any, **settings: Any
    ) -> list[Loglikelihood]:
        # the windows of a rolling text; each is a group of its own
        if not self.modes.scoring:
            return self.stock_loglikelihoods(requests, *args, **settings)
        return self.scorer.score_requests(
            [
                Request.truncated(context, continuation, self.max_length, index=index, group=index)
                for index, (_, context, continuation) in enumerate(requests)
            ]
        )

    def stock_loglikelihoods(
        self, requests: Sequence[TokenRequest], *args: Any, **settings: Any
    ) -> list[Loglikelihood]:
        """Return ``HFLM``'s own log-likelihoods of requests in tokens."""
        scores = super()._loglikelihood_tokens(requests, *args, **settings)
        return cast("list[Loglikelihood]", scores)

    @property
    def is_differentiable(self) -> bool:
        """Whether log-likelihoods have gradients: those of a causal model in batches of ours."""
        is_planned = self.model.device.type == "meta"  # no mode was tried, and nothing is run
        return self.backend == "causal" and (self.modes.scoring or is_planned)

    def differentiable_loglikelihoods(self, requests: Iterable[Request]) -> Tensor:
        """Return log-likelihoods (n,) in nats, float32, in the order of the requests' indices.

        Activations of all requests are in memory until they have gone backward.
        """
        runner = ModelRunner(self.model, self.device, self.runner.tokens_per_batch)
        # keys and values of a prefix are computed without gradients; hooks of a last MLP are gone
        # when a layer computes its activations again
        runner.modes = replace(self.modes, prefix=False, sparse_mlp=False)
        scorer = LoglikelihoodScorer(runner)
        return scorer.differentiable(scorer.plan(requests))

    def _plan_texts(
        self, texts: tuple[tuple[Hashable, Hashable, str, str], ...]
    ) -> tuple[PrefixBatches, ...]:
        """Plan requests given as (task, group, context, continuation)."""
        return self.scorer.plan(
            Request.truncated(
                *self.encode_pair(*pair), self.max_length, index=index, group=group, task=task
            )
            for index, (task, group, *pair) in enumerate(texts)
        )

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode as ``TemplateLM.loglikelihood``: an empty context becomes a prefix token."""
        if context:
            return cast("tuple[list[int], list[int]]", self._encode_pair(context, continuation))
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens[0] == self.prefix_token_id:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def _encode_prompt(self, text: str) -> Tokens:
        """Encode a text to be continued, as ``HFLM.generate_until``."""
        tokens = self.tok_batch_encode([text], truncation=self.truncation)[0]
        return tuple(tokens[0].tolist())

    @override
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [text for text, _ in self.generate_counted(requests)]

    def generate_counted(
        self, requests: Sequence[Instance], journal: Journal | None = None
    ) -> list[GeneratedText]:
        """Return what ``generate_until`` does, each text with the number of its tokens.

        The token that ends a text, or completes a stop string, is counted. Tokens are noted in a
        journal; texts that it has are not generated, or only continued.

        Raises:
            NanError: The model's logits are not numbers.
        """
        texts: list[GeneratedText] = [("", 0)] * len(requests)
        by_settings: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_settings[repr(request.args[1])].append(index)
        greedy: dict[int, StopCriteria] = {}
        for indices in by_settings.values():
            group = [requests[index] for index in indices]
            if criteria := self._greedy_criteria(group[0].args[1]):
                greedy |= dict.fromkeys(indices, criteria)
                continue
            for index, text in zip(indices, self._stock_texts(group), strict=True):
                texts[index] = text
        wanted = {index: (requests[index].args[0], greedy[index]) for index in greedy}
        for index, tokens in _decode(self, wanted, journal).items():
            stops, text = [*greedy[index].strings], self.tok_decode(tokens)
            texts[index] = postprocess_generated_text(text, stops, None), len(tokens)
        return texts

    def _stock_texts(self, requests: Sequence[Instance]) -> list[GeneratedText]:
        """Continue prompts of equal settings with ``HFLM``'s own code."""

        def batch_order(index: int) -> tuple[int, str]:  # HFLM's own
            prompt = requests[index].args[0]
            return -len(self.tok_encode(prompt)), prompt

        order = sorted(range(len(requests)), key=batch_order)
        self._generated_lengths.clear()  # HFLM returns texts alone; _model_generate adds lengths
        with _nan_refused(self.model):
            texts = super().generate_until([requests[index] for index in order], disable_tqdm=True)
        found = zip(order, texts, self._generated_lengths, strict=True)
        return [(text, length) for _, text, length in sorted(found)]

    @override
    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> Tensor:
        rows: Tensor = super()._model_generate(context, max_length, stop, **settings)
        before = context.shape[1] if self.backend == "causal" else 1
        criteria = StopCriteria.from_strings(stop, rows.shape[1] - before, self.tokenizer)
        self._generated_lengths += [
            self.decoder.length_until_end(row, criteria) for row in rows[:, before:].tolist()
        ]
        return rows

    def _greedy_criteria(self, settings: dict[str, Any]) -> StopCriteria | None:
        """Return the stop criteria if all settings mean greedy decoding, else None."""
        own = self.model.generation_config
        wanted = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        until, max_tokens = wanted.pop("until"), wanted.pop("max_gen_toks")
        if (
            not self.modes.generation
            or wanted not in ({"do_sample": False}, {"do_sample": False, "temperature": 0.0})
            or not 0 < max_tokens < self.max_length
            or own is None
            or not own.to_diff_dict().keys() <= _HARMLESS
        ):
            return None
        return StopCriteria.from_strings(self.stop_strings(until), max_tokens, self.tokenizer)

    def stop_strings(self, until: Sequence[str]) -> list[str]:
        """Return the strings that end a text: a task's own and the end-of-text token."""
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        return cast("list[str]", handle_stop_sequences([*until], eos))


def _decode(
    own: FastHFLM, texts: Mapping[int, tuple[str, StopCriteria]], journal: Journal | None
) -> dict[int, list[int]]:
    """Return the tokens generated after each text, by its number."""
    # prompts are cut on the left to leave room for what is generated
    prompts = {
        index: (own.encode_prompt(text)[criteria.max_tokens - own.max_length :], criteria)
        for index, (text, criteria) in texts.items()
    }
    if own.engine:
        return dict(zip(prompts, own.engine.decode([*prompts.values()]), strict=True))
    known = journal.texts if journal else {}
    begun = [index for index in prompts if index in known]
    found = {n: known[n] for n in begun if own.decoder.has_ended(known[n], prompts[n][1])}
    left = [index for index in prompts if index not in found]
    plan = own.plan_generation(
        tuple(Continuation(*prompts[n], begun=(*known.get(n, ()),)) for n in left)
    )

    def note(numbers: Sequence[int], tokens: Sequence[int]) -> None:
        if journal:
            journal.add_tokens([left[number] for number in numbers], tokens)

    generated = own.decoder.decode(plan, note if journal else None)
    return found | dict(zip(left, generated, strict=True))


def _group(request: Instance) -> Hashable:
    """Return a request's question; requests without a context share no prompt with others."""
    document = request.args[0] if request.doc_id is None else request.doc_id
    return request.task_name, document, request.args[0] == ""


@contextlib.contextmanager
def _nan_refused(model: PreTrainedModel) -> Iterator[None]:
    """Raise ``NanError`` on exit if the logits of the last token were NaN in any pass."""
    watch = NanWatch()
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, logits: watch.see(logits[..., -1, :])
    )
    try:
        yield
    finally:
        hook.remove()
    watch.raise_if_seen()
