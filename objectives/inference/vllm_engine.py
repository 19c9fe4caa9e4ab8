"""Generate text with vLLM, the live model's weights being copied into a resident engine.

Written against vLLM's documented interface (``LLM``, ``apply_model``, ``reset_prefix_cache``,
``generate`` on token ids) and tested with a stand-in that has it; **never run on a GPU**. Prompts,
limits, stop strings and the end of a text are those of ``decoding``; vLLM only chooses tokens.
Before it is used, its texts are compared with the live model's logits, like those of any shortcut.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from objectives.base import ObjectiveError
from objectives.entries import ENGINE_MEMORY
from objectives.inference.decoding import GreedyDecoder
from objectives.inference.decoding_plan import StopCriteria
from objectives.inference.forward import ModelRunner
from objectives.inference.nan_watch import NanWatch
from objectives.inference.token_tree import Tokens


class TextEngine(Protocol):
    """Generates text in place of the live model."""

    def decode(self, prompts: Sequence[tuple[Tokens, StopCriteria]]) -> list[list[int]]:
        """Return the tokens generated after each prompt, including the one that ended the text."""


def check_installed() -> None:
    """Raise an ``ObjectiveError`` if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ObjectiveError(
            "objective.engine: vllm is not installed; pip install 'mergesearch[vllm]', or leave "
            "the key out"
        )


class VllmEngine:
    """A resident vLLM engine of the live model's config.

    Raises:
        ObjectiveError: The model is on several devices, or vLLM cannot run its config.
    """

    def __init__(
        self, runner: ModelRunner, decoder: GreedyDecoder, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        check_installed()
        if runner.spans_devices:
            raise ObjectiveError(
                "objective.engine: vllm takes a live model on one device; this one is spread over "
                "several: leave the key out"
            )
        self._runner, self._decoder = runner, decoder
        # in one process the engine can read the live weights in place
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm

        self._vllm: Any = vllm
        with tempfile.TemporaryDirectory() as folder:
            runner.model.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            try:
                self._engine = vllm.LLM(
                    model=folder,
                    dtype=str(runner.model.dtype).removeprefix("torch."),
                    load_format="dummy",  # weights come from the live model
                    gpu_memory_utilization=ENGINE_MEMORY,
                    seed=0,
                )
            except Exception as error:  # an engine may refuse a config in any way
                first = f"{type(error).__name__}: {error}".splitlines()[0]
                raise ObjectiveError(
                    f"objective.engine: vllm cannot run this model ({first}); leave the key out"
                ) from error

    @torch.no_grad()
    def decode(self, prompts: Sequence[tuple[Tokens, StopCriteria]]) -> list[list[int]]:
        """Generate text with the live model's present weights (``TextEngine.decode``).

        Raises:
            NanError: Its logits are not numbers.
        """
        if not prompts:
            return []
        nan = NanWatch()
        first = torch.tensor([prompts[0][0]], device=self._runner.device)
        nan.see(self._runner.next_token_logits(first))
        nan.raise_if_seen()
        weights = self._runner.model.state_dict()
        self._engine.apply_model(lambda model: model.load_weights(iter(weights.items())))
        self._engine.reset_prefix_cache()  # keys and values of other weights
        ends = self._runner.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        outputs = self._engine.generate(
            [{"prompt_token_ids": list(tokens)} for tokens, _ in prompts],
            [
                self._vllm.SamplingParams(
                    temperature=0.0,
                    max_tokens=criteria.max_tokens,
                    stop=list(criteria.strings),
                    stop_token_ids=ends,
                )
                for _, criteria in prompts
            ],
            use_tqdm=False,
        )
        texts = [list(output.outputs[0].token_ids) for output in outputs]
        return [
            text[: self._decoder.length_until_end(text, criteria)]
            for text, (_, criteria) in zip(texts, prompts, strict=True)
        ]
