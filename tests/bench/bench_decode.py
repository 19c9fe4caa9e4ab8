"""One token for each text being written: milliseconds a pass, by rows, one JSON line each.

    python tests/bench/bench_decode.py [--device cuda --dtype bfloat16] [--rows 1,4,20,64]
        [--hidden 4096 --layers 32] [--prompt 512] [--tokens 64]

A Llama of random weights continues random prompts. ``batch`` writes them as they were read,
``slots`` in rows of their own lengths, ``captured`` replays captured passes (on a CPU the same
code without capturing). ``speedup`` is over ``batch``; ``differ`` counts texts that are not its.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from dataclasses import replace

import torch
import transformers

from objectives.inference.agreement import settle_modes
from objectives.inference.decoding_plan import Continuation, StopCriteria
from objectives.inference.fast_hflm import FastHFLM

VOCABULARY = 96
WAYS = {
    "batch": {"refilled": False, "captured": False},
    "slots": {"refilled": True, "captured": False},
    "captured": {"refilled": True, "captured": True},
}


def make_language_model(given: argparse.Namespace) -> FastHFLM:
    torch.manual_seed(0)
    heads = max(1, given.hidden // 128)
    config = transformers.LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.hidden,
        intermediate_size=7 * given.hidden // 2,
        num_hidden_layers=given.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=4 * (given.prompt + given.tokens),
        eos_token_id=None,
    )
    with torch.device(given.device):
        model = transformers.LlamaForCausalLM(config).to(getattr(torch, given.dtype)).eval()
    found = FastHFLM(pretrained=model, tokenizer=make_tokenizer())
    settle_modes(found)
    return found


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")


def measure(language_model: FastHFLM, rows: int, given: argparse.Namespace) -> dict[str, object]:
    draw = random.Random(rows)
    prompts = [[draw.randrange(2, VOCABULARY) for _ in range(given.prompt)] for _ in range(rows)]
    wait = torch.cuda.synchronize if given.device.startswith("cuda") else lambda: None
    decoder, modes = language_model.decoder, language_model.modes
    texts, line = {}, {"rows": rows}
    for way, on in WAYS.items():
        language_model.use_modes(replace(modes, **on))
        seconds = {}
        for tokens in (1, given.tokens + 1):  # reading, reading and writing
            plan = decoder.plan(Continuation(tuple(one), StopCriteria(tokens)) for one in prompts)
            if tokens > 1:
                decoder.decode(plan)  # captures
            wait()
            start = time.perf_counter()
            texts[way] = decoder.decode(plan)
            wait()
            seconds[tokens] = time.perf_counter() - start
        line[f"{way}_ms"] = round(1e3 * (seconds[given.tokens + 1] - seconds[1]) / given.tokens, 3)
        line[f"{way}_differ"] = sum(a != b for a, b in zip(texts[way], texts["batch"], strict=True))
    language_model.use_modes(modes)
    fastest = min(line["slots_ms"], line["captured_ms"])
    return line | {"speedup": round(line["batch_ms"] / fastest, 2), "modes": str(modes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", default="1,4,20,64")
    for name, value in {"hidden": 512, "layers": 8, "prompt": 64, "tokens": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    language_model = make_language_model(given)
    for rows in map(int, given.rows.split(",")):
        print(json.dumps(measure(language_model, rows, given)), flush=True)


if __name__ == "__main__":
    main()
