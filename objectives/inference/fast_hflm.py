"""lm-eval's answers from a transformers model, at a fraction of their cost.

``FastHFLM`` is lm-eval's ``HFLM`` with another way through the model. It has the same tokens, the
same positions and the same float32 log-softmax, and so the same answers up to rounding, but

* reads a question once for all its answers, and examples shown before many questions once for
  all of them (``objectives.inference.token_tree`` has the layout);
* computes logits, and the last layer's MLP, only where a token of an answer is predicted;
* drops generated texts from the batch when they have ended.

Texts are encoded and batches planned once; nothing that depends on weights outlives a call, so
weights may be rewritten between calls. A list of requests always makes the same batches, so asked
again it has the same values to the bit. Asked in other company a request can differ by what the
shape of a batch does to rounding, as it does in lm-eval itself.

Not every model can be asked this way: some attend by other rules than a mask, some keep a state.
``objectives.inference.agreement.settle_modes`` therefore tries each way against ``HFLM`` on the
model at hand, and leaves off those that differ by more than rounding; until then all are off.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from transformers import DynamicCache, PreTrainedConfig

from objectives.base import ObjectiveError
from objectives.inference.modes import Decoding, Modes
from objectives.inference.token_tree import (
    Request,
    Tokens,
    TokenTree,
    in_batches,
    make_rows,
    share_prefixes,
)

# a batch reads as many tokens as ``batch_size`` sequences of this length; on a CPU larger ones are
# past its caches: with 32 sequences, 1,024 tokens took 8 % less time than 2,048, and those 30 %
# less than 8,192
TOKENS_PER_SEQUENCE = 256
TOKENS_PER_SEQUENCE_ON_CPU = 32

_LOG = logging.getLogger(__name__)

_SOFTMAX_ROWS = 1024  # positions whose float32 logits are in memory at once
_PLANS = 1024

# ended texts leave a batch when no more than this share of its rows goes on: their leaving copies
# the keys and values of all others
_GOING = 0.5

# settings a model may ship with that do not change a greedy answer
_HARMLESS = frozenset(
    [
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "max_length"),
        *("use_cache", "transformers_version", "_from_model_config"),
        *("output_attentions", "output_hidden_states", "return_dict_in_generate"),
    ]
)

LogLikelihood = tuple[float, bool]
Written = tuple[str, int]  # a text, and the tokens that the model wrote for it


@dataclass(frozen=True)
class _Batch:
    """What one forward pass reads, b rows of t tokens, and where it predicts n answer tokens.

    Attributes:
        tokens: (b, t), padded on the right.
        depths: (b, t), the position of each token.
        ends: (b, t), see ``TokenTree``; None where no row has a branch.
        kept: (b, t), where something is predicted; m places in all.
        places: (n), which of the m places predicts each answer token.
        targets: (n), the answer tokens.
        numbers: Whose tokens they are, in their order: (request, how many).
    """

    tokens: Tensor
    depths: Tensor
    ends: Tensor | None
    kept: Tensor
    places: Tensor
    targets: Tensor
    numbers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Prompt:
    """A text to be continued, in tokens."""

    number: int
    tokens: Tokens

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def head(self) -> Tokens:
        return self.tokens[:-1]  # the last token's logits are wanted


@dataclass(frozen=True)
class _Prompts:
    """b prompts decoded together: tokens and mask (b, t), padded on the left."""

    prefix: Tokens
    tokens: Tensor
    mask: Tensor
    numbers: Tokens


@dataclass(frozen=True)
class _Passes:
    """Batches behind one prefix."""

    prefix: Tokens
    batches: tuple[_Batch, ...]


class FastHFLM(HFLM):  # type: ignore[misc]  # lm-eval is published without types
    """``HFLM`` for a live model; see the module.

    Args:
        batch_size: Of what ``HFLM`` does itself; ours read ``TOKENS_PER_SEQUENCE`` tokens for
            each of these in a pass.
        settings: As ``HFLM``'s. Log-probabilities are float32 unless ``softmax_dtype`` is given.

    Attributes:
        modes: What is done our way.
    """

    def __init__(self, *, batch_size: int = 32, **settings: Any) -> None:
        super().__init__(batch_size=batch_size, **{"softmax_dtype": "float32"} | settings)
        self._encoded: dict[str, list[int]] = {}
        self._plan_scoring = functools.lru_cache(_PLANS)(self._plan_texts)
        self._plan_generation = functools.lru_cache(_PLANS)(self._plan_continuations)
        on_cpu = self.device.type == "cpu"
        self._read = batch_size * (TOKENS_PER_SEQUENCE_ON_CPU if on_cpu else TOKENS_PER_SEQUENCE)
        self._tail = last_mlp(self.model)
        self.modes = Modes()  # none until ``settle_modes`` tries them

    def halve_batches(self) -> None:
        """Ask in smaller batches from here on.

        Raises:
            ObjectiveError: They are of one sequence.
        """
        if self.batch_size_per_gpu == 1:
            raise ObjectiveError(
                "there is no memory to ask one sequence at a time; free the device, ask for fewer "
                "examples (num_fewshot) or shorter answers, or take a smaller model"
            )
        self.batch_size_per_gpu //= 2
        self._read //= 2
        self._plan_scoring.cache_clear()
        self._plan_generation.cache_clear()
        torch.cuda.empty_cache()
        _LOG.warning("out of memory: asked in batches of %d from here on", self.batch_size_per_gpu)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **settings: Any,
    ) -> list[int]:
        """As ``HFLM``'s, once per text."""
        if add_special_tokens is not None or left_truncate_len or settings:
            return cast(
                "list[int]",
                super().tok_encode(string, add_special_tokens, left_truncate_len, **settings),
            )
        if string not in self._encoded:
            self._encoded[string] = super().tok_encode(string)
        return self._encoded[string]

    # -- log-likelihoods -------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[LogLikelihood]:
        """Log-likelihood of each answer after its context, and whether it is the greedy one."""
        if not self.modes.scoring or self.enable_thinking:
            return cast("list[LogLikelihood]", super().loglikelihood(requests, disable_tqdm))
        texts = tuple((_origin(request), *request.args) for request in requests)
        answers = self._score(self._plan_scoring(texts), len(requests))
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[LogLikelihood]:
        """The same for requests in tokens, each a question of its own: a rolling text's windows."""
        if not self.modes.scoring:
            return self.stock_scores(requests, disable_tqdm, override_bs)
        return self.answers(
            [
                self._request(number, number, context, answer)
                for number, (_, context, answer) in enumerate(requests)
            ]
        )

    def answers(self, requests: Sequence[Request]) -> list[LogLikelihood]:
        """Answers to requests in tokens, by their numbers."""
        return self._score(self._plan(requests), len(requests))

    def stock_scores(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[LogLikelihood]:
        """``HFLM``'s own answers to requests in tokens."""
        answers = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        return cast("list[LogLikelihood]", answers)

    def _request(
        self, number: int, origin: Hashable, context: Sequence[int], answer: Sequence[int]
    ) -> Request:
        whole = (*context, *answer)[-(self.max_length + 1) :]
        return Request(number, origin, whole[:-1], tuple(answer))

    def _plan_texts(self, texts: tuple[tuple[Hashable, str, str], ...]) -> tuple[_Passes, ...]:
        requests = []
        for number, (origin, context, continuation) in enumerate(texts):
            before, answer = self._encode(context, continuation)
            requests.append(self._request(number, origin, before, answer))
        return self._plan(requests)

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As ``TemplateLM.loglikelihood``: without a context, the first token stands for one."""
        if context:
            return cast("tuple[list[int], list[int]]", self._encode_pair(context, continuation))
        answer = self.tok_encode(continuation, add_special_tokens=False)
        if answer[0] == self.prefix_token_id:
            return answer[:1], answer[1:]
        return [self.prefix_token_id], answer

    def _plan(self, requests: Iterable[Request]) -> tuple[_Passes, ...]:
        """Batches for requests; those behind one task's prefix together."""
        plain = plain_length(self.config)
        by_task: dict[Hashable, list[Request]] = defaultdict(list)
        far = []
        for request in requests:
            if len(request.tokens) > plain:
                far.append(request)
            else:
                by_task[_task(request.origin)].append(request)
        passes: list[_Passes] = []
        for of_task in by_task.values():
            rows = make_rows(of_task, self._read if self.modes.tree else 0)
            passes += self._passes(rows, share=self.modes.prefix)
        return (*passes, *self._passes(make_rows(far, 0), share=False))

    def _passes(self, rows: Sequence[TokenTree], *, share: bool) -> Iterator[_Passes]:
        if not share:
            yield self._pass((), rows)
            return
        alone: list[TokenTree] = []
        for shared in share_prefixes(rows):
            if shared.prefix:
                yield self._pass(shared.prefix, shared.rows)
            else:
                alone += shared.rows
        yield self._pass((), alone)

    def _pass(self, prefix: Tokens, rows: Iterable[TokenTree]) -> _Passes:
        behind = [row.behind(len(prefix)) for row in rows]
        batches = in_batches(behind, self._read, len(prefix))
        return _Passes(prefix, tuple(_batch(rows, self.device) for rows in batches))

    @torch.no_grad()
    def _score(self, plan: Iterable[_Passes], count: int) -> list[LogLikelihood]:
        answers: list[LogLikelihood] = [(math.nan, False)] * count
        for passes in plan:
            held = self._read_prefix(passes.prefix) if passes.batches else None
            for batch in passes.batches:
                logits = self._logits(batch, len(passes.prefix), held)  # (m, vocabulary)
                chosen, greedy = _choices(logits, batch, self.softmax_dtype)
                start = 0
                for number, length in batch.numbers:
                    own = slice(start, start + length)
                    answers[number] = (float(chosen[own].sum()), bool(greedy[own].all()))
                    start += length
        return answers

    def _read_prefix(self, prefix: Tokens) -> DynamicCache | None:
        """Keys and values of a prefix, of one row."""
        if not prefix:
            return None
        held = DynamicCache(config=self.config)
        tokens = torch.tensor([prefix], device=self.device)
        self._last_logits(tokens, past_key_values=held)
        return held

    def _last_logits(self, tokens: Tensor, **settings: Any) -> Tensor:
        """Logits of each row's last token (b, vocabulary), with keys and values kept."""
        if self.modes.kept:
            settings["logits_to_keep"] = 1
        kept = torch.zeros_like(tokens, dtype=torch.bool)
        kept[:, -1] = True
        return self._forward(tokens, kept, use_cache=True, **settings)[:, -1]

    def _logits(self, batch: _Batch, prefix: int, held: DynamicCache | None) -> Tensor:
        """Logits at a batch's places, (m, vocabulary)."""
        settings: dict[str, Any] = {"use_cache": held is not None}
        if held is not None:
            settings["past_key_values"] = _repeated(held, len(batch.tokens))
        if batch.ends is not None or held is not None:
            settings["attention_mask"] = _tree_mask(batch, prefix, self.model.dtype)
            settings["position_ids"] = batch.depths
        if self.modes.kept:
            return self._forward(batch.tokens, batch.kept, logits_to_keep=batch.kept, **settings)
        return self._forward(batch.tokens, batch.kept, **settings)[batch.kept]

    def _forward(self, tokens: Tensor, kept: Tensor, **settings: Any) -> Tensor:
        """The model's logits of tokens (b, t), of use where ``kept`` (b, t) holds."""
        autocast = torch.autocast(
            self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        )
        tail = self._tail if self.modes.tail and tokens.shape[1] > 1 else None
        with autocast, only_at(tail, kept) if tail is not None else contextlib.nullcontext():
            return cast("Tensor", self.model(tokens, **settings).logits)

    # -- generation ------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each prompt's continuation up to a stop string."""
        return [text for text, _ in self.written(requests, disable_tqdm)]

    def written(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[Written]:
        """The same, with the number of tokens up to the one that ended each text."""
        texts: list[Written] = [("", 0)] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(request.args[1])].append(number)
        for numbers in alike.values():
            wanted = [requests[number] for number in numbers]
            if self._is_greedy(wanted[0].args[1]):
                found = self._greedy_texts(wanted)
            else:
                found = self._stock_texts(wanted, disable_tqdm)
            for number, text in zip(numbers, found, strict=True):
                texts[number] = text
        return texts

    def _greedy_texts(self, requests: Sequence[Instance]) -> list[Written]:
        """Greedy continuations of prompts whose settings are the same."""
        decoding = self._decoding(requests[0].args[1])
        prompts = tuple(request.args[0] for request in requests)
        plan = self._plan_generation(prompts, decoding.max_tokens)
        texts = [
            (self._text(tokens, decoding), len(tokens))
            for tokens in self._decode_all(plan, decoding)
        ]
        for request, (text, _) in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _stock_texts(self, requests: Sequence[Instance], disable_tqdm: bool) -> list[Written]:
        """``HFLM``'s own continuations of prompts whose settings are the same."""

        def place(number: int) -> tuple[int, str]:  # in the order HFLM asks them
            prompt = requests[number].args[0]
            return -len(self.tok_encode(prompt)), prompt

        order = sorted(range(len(requests)), key=place)
        self._lengths: list[int] = []
        texts = super().generate_until([requests[number] for number in order], disable_tqdm)
        written = dict(zip(order, zip(texts, self._lengths, strict=True), strict=True))
        return [written[number] for number in range(len(requests))]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> Tensor:
        """As ``HFLM``'s, with the number of tokens up to each row's own end in ``_lengths``."""
        rows: Tensor = super()._model_generate(context, max_length, stop, **settings)
        before = context.shape[1] if self.backend == "causal" else 1
        for row in rows[:, before:].tolist():
            decoding = self._ending(stop, len(row))
            lengths = range(1, len(row) + 1)
            self._lengths.append(
                next(n for n in lengths if not self._going({0: row[:n]}, decoding))
            )
        return rows

    def _is_greedy(self, settings: dict[str, Any]) -> bool:
        """Whether plain greedy decoding is all that is asked for, by request and model."""
        if not self.modes.generation or self.think_end_token is not None:
            return False
        wanted = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        wanted.pop("until")
        room = self.max_length - wanted.pop("max_gen_toks")
        own = self.model.generation_config
        return (
            wanted in ({"do_sample": False}, {"do_sample": False, "temperature": 0.0})
            and 0 < room < self.max_length
            and own is not None
            and own.to_diff_dict().keys() <= _HARMLESS
        )

    def _decoding(self, settings: dict[str, Any]) -> Decoding:
        wanted = normalize_gen_kwargs(settings, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        return self._ending(handle_stop_sequences(wanted["until"], eos), wanted["max_gen_toks"])

    def _ending(self, stops: Sequence[str], max_tokens: int) -> Decoding:
        lengths = (len(self.tokenizer.encode(stop, add_special_tokens=False)) for stop in stops)
        # a stop string may be spelled in more tokens than its own encoding; lm-eval adds two, too
        return Decoding(max_tokens, tuple(stops), max(lengths, default=0) + 2)

    def _text(self, tokens: Sequence[int], decoding: Decoding) -> str:
        text = self.tok_decode(tokens)
        return cast("str", postprocess_generated_text(text, list(decoding.stops), None))

    def continued(self, prompts: Sequence[Tokens], decoding: Decoding) -> list[list[int]]:
        """The tokens greedily chosen after each prompt, with the one that ended it."""
        return self._decode_all(self._plan_prompts(prompts, decoding.max_tokens), decoding)

    def _plan_continuations(self, texts: tuple[str, ...], max_tokens: int) -> tuple[_Prompts, ...]:
        room = self.max_length - max_tokens
        encoded = (self.tok_batch_encode([text], truncation=self.truncation)[0] for text in texts)
        return self._plan_prompts(
            [tuple(tokens[0, -room:].tolist()) for tokens in encoded], max_tokens
        )

    def _plan_prompts(self, prompts: Sequence[Tokens], max_tokens: int) -> tuple[_Prompts, ...]:
        numbered = [_Prompt(number, tokens) for number, tokens in enumerate(prompts)]
        return tuple(
            _prompts(prefix, rows, self.device)
            for prefix, sharers in self._prompt_groups(numbered, max_tokens)
            for rows in in_batches(
                [replace(prompt, tokens=prompt.tokens[len(prefix) :]) for prompt in sharers],
                self._read,
                len(prefix) + max_tokens,
            )
        )

    def _prompt_groups(
        self, prompts: Sequence[_Prompt], max_tokens: int
    ) -> Iterator[tuple[Tokens, Sequence[_Prompt]]]:
        """Prompts by prefix; those that will outgrow the plain length have none."""
        plain = plain_length(self.config)
        near = [p for p in prompts if self.modes.prefix and len(p) + max_tokens <= plain]
        far = [p for p in prompts if not self.modes.prefix or len(p) + max_tokens > plain]
        for shared in share_prefixes(near):
            yield shared.prefix, shared.rows
        yield (), far

    @torch.no_grad()
    def _decode_all(self, plan: Iterable[_Prompts], decoding: Decoding) -> list[list[int]]:
        written: dict[int, list[int]] = {}
        before: tuple[Tokens, DynamicCache | None] = ((), None)
        for batch in plan:
            if batch.prefix != before[0]:
                before = batch.prefix, self._read_prefix(batch.prefix)
            written |= self._decode(batch, before[1], decoding)
        return [written[number] for number in sorted(written)]

    def _decode(
        self,
        batch: _Prompts,
        prefix: DynamicCache | None,
        decoding: Decoding,
    ) -> dict[int, list[int]]:
        """The tokens after each prompt of a batch; rows leave it when their texts have ended."""
        numbers = list(batch.numbers)  # of the batch's rows
        going = set(numbers)
        written: dict[int, list[int]] = {number: [] for number in numbers}
        if prefix is None:
            held = DynamicCache(config=self.config)
        else:
            held = _repeated(prefix, len(numbers))
        before = batch.mask.new_ones(len(numbers), len(batch.prefix))
        mask = torch.cat([before, batch.mask], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, len(batch.prefix) :]
        tokens = batch.tokens
        while True:
            logits = self._last_logits(
                tokens, attention_mask=mask, position_ids=positions, past_key_values=held
            )
            chosen = logits.float().argmax(-1)  # (b)
            for number, token in zip(numbers, chosen.tolist(), strict=True):
                if number in going:
                    written[number].append(token)
            going = self._going({number: written[number] for number in going}, decoding)
            if not going:
                return written
            if len(going) <= _GOING * len(numbers):
                places = [place for place, number in enumerate(numbers) if number in going]
                numbers = [numbers[place] for place in places]
                rows = torch.tensor(places, device=self.device)
                held.batch_select_indices(rows)
                chosen, mask, positions = chosen[rows], mask[rows], positions[rows]
            tokens = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(numbers), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def _going(self, written: Mapping[int, Sequence[int]], decoding: Decoding) -> set[int]:
        """The numbers of the texts that have not ended."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        latest = self.tokenizer.batch_decode(
            [tokens[-decoding.lookback :] for tokens in written.values()]
        )
        return {
            number
            for (number, tokens), text in zip(written.items(), latest, strict=True)
            if len(tokens) < decoding.max_tokens
            and tokens[-1] not in ends
            and not any(stop in text for stop in decoding.stops)
        }


def _origin(request: Instance) -> Hashable:
    """What a request is an answer to; one without a context cannot share a prompt."""
    document = request.args[0] if request.doc_id is None else request.doc_id
    return request.task_name, document, request.args[0] == ""


def _task(origin: Hashable) -> Hashable:
    return origin[0] if isinstance(origin, tuple) else None


def plain_length(config: PreTrainedConfig) -> float:
    """Tokens up to which every token sees all before it, each at the position it always has.

    Beyond a sliding window or an attention chunk it does not; and some rotary embeddings change
    for all tokens when one of them goes beyond the original length.
    """
    text = config.get_text_config(decoder=True)
    limits = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    rope = getattr(text, "rope_parameters", None) or {}
    limits += [
        settings.get("original_max_position_embeddings")
        for settings in (rope, *(own for own in rope.values() if isinstance(own, dict)))
        if settings.get("rope_type") in ("dynamic", "longrope")
    ]
    return min((limit for limit in limits if limit), default=math.inf)


def last_mlp(model: torch.nn.Module) -> torch.nn.Module | None:
    """The last layer's MLP, if the model has layers in a list and they call it so."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    last = max(layers, key=len, default=[None])[-1]
    return getattr(last, "mlp", None) or getattr(last, "feed_forward", None)


@contextlib.contextmanager
def only_at(module: torch.nn.Module, kept: Tensor) -> Iterator[None]:
    """Have a module that maps each place by itself do so where ``kept`` (b, t) holds alone.

    Elsewhere its result is 0, which nothing reads behind the last layer.
    """

    def gather(_: torch.nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0][kept][None],)  # (1, m, d)

    def scatter(_: torch.nn.Module, __: tuple[Tensor, ...], found: Tensor) -> Tensor:
        return found.new_zeros(*kept.shape, found.shape[-1]).masked_scatter_(kept[..., None], found)

    hooks = module.register_forward_pre_hook(gather), module.register_forward_hook(scatter)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _batch(rows: Sequence[TokenTree], device: torch.device) -> _Batch:
    shape = (len(rows), max(map(len, rows)))
    tokens = torch.zeros(shape, dtype=torch.long)
    depths = torch.zeros(shape, dtype=torch.long)
    # padding sees itself alone: a token that sees nothing would be a NaN
    ends = torch.arange(1, shape[1] + 1).repeat(len(rows), 1)
    kept = torch.zeros(shape, dtype=torch.bool)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row.tokens)
        depths[place, : len(row)] = torch.tensor(row.depths)
        ends[place, : len(row)] = torch.tensor(row.ends)
        for answer in row.answers:
            kept[place, list(answer.nodes)] = True
    order = kept.flatten().cumsum(0).reshape(shape) - 1
    answers = [(place, answer) for place, row in enumerate(rows) for answer in row.answers]
    branched = not all(row.is_chain for row in rows)
    return _Batch(
        tokens=tokens.to(device),
        depths=depths.to(device),
        ends=ends.to(device) if branched or any(row.depths[0] for row in rows) else None,
        kept=kept.to(device),
        places=torch.cat([order[place, list(a.nodes)] for place, a in answers]).to(device),
        targets=torch.tensor([t for _, a in answers for t in a.tokens], device=device),
        numbers=tuple((answer.number, len(answer.tokens)) for _, answer in answers),
    )


def _prompts(prefix: Tokens, prompts: Sequence[_Prompt], device: torch.device) -> _Prompts:
    shape = (len(prompts), max(map(len, prompts)))
    tokens = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for place, prompt in enumerate(prompts):
        tokens[place, shape[1] - len(prompt) :] = torch.tensor(prompt.tokens)
        mask[place, shape[1] - len(prompt) :] = 1
    numbers = tuple(prompt.number for prompt in prompts)
    return _Prompts(prefix, tokens.to(device), mask.to(device), numbers)


def _tree_mask(batch: _Batch, prefix: int, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, (b, 1, t, prefix + t): 0, or the lowest number."""
    assert batch.ends is not None  # planned so where there is a branch or a prefix
    node = torch.arange(batch.ends.shape[1], device=batch.ends.device)
    key, query = node[None, None, :], node[None, :, None]
    hidden = (key > query) | (query >= batch.ends[:, None, :])  # (b, t, t)
    mask = torch.zeros(*hidden.shape[:2], prefix + len(node), dtype=dtype, device=node.device)
    mask[:, :, prefix:].masked_fill_(hidden, torch.finfo(dtype).min)
    return mask[:, None]


def _repeated(held: DynamicCache, rows: int) -> DynamicCache:
    """The same keys and values for ``rows`` rows that all begin alike.

    They are not copied: a layer that reads on joins them to its own in a new tensor.
    """
    layers: list[Any] = [copy.copy(layer) for layer in held.layers]
    for layer in layers:
        if layer.is_initialized:
            layer.keys = layer.keys.expand(rows, *layer.keys.shape[1:])  # (rows, h, t, d)
            layer.values = layer.values.expand(rows, *layer.values.shape[1:])
    repeated = copy.copy(held)
    repeated.layers = layers
    return repeated


def _choices(logits: Tensor, batch: _Batch, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer token and whether it is the likeliest, both (n), on the CPU.

    Args:
        logits: (m, vocabulary), of the batch's places.
        batch: Says which place predicts which token.
        dtype: Of the log-softmax.
    """
    chosen = torch.empty(len(batch.places), dtype=dtype or logits.dtype, device=logits.device)
    greedy = torch.zeros(len(batch.places), dtype=torch.bool, device=logits.device)
    for first in range(0, len(logits), _SOFTMAX_ROWS):
        part = logits[first : first + _SOFTMAX_ROWS]
        here = ((batch.places >= first) & (batch.places < first + len(part))).nonzero()[:, 0]
        places, targets = batch.places[here] - first, batch.targets[here]
        logs = part.log_softmax(-1, dtype=dtype)  # (m', vocabulary)
        chosen[here] = logs[places, targets]
        # argmax takes six times as long as amax, and says more only where an answer is the largest
        largest = (chosen[here] == logs.amax(-1)[places]).nonzero()[:, 0]
        greedy[here[largest]] = logs[places[largest]].argmax(-1) == targets[largest]
    return chosen.cpu(), greedy.cpu()
