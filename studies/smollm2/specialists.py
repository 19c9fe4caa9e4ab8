"""Train the specialists: a LoRA adapter of the base on one task each."""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .family import Training
from .items import Item


class Row(NamedTuple):
    """An item's tokens: the prompt under the chat template, and the answer to be learnt."""

    prompt: list[int]
    answer: list[int]


class Batch(NamedTuple):
    """Rows in one sequence; what all their prompts begin with is in it once."""

    tokens: Tensor  # (1, n)
    positions: Tensor  # (1, n)
    mask: Tensor  # (1, 1, n, n) bool: query, key
    predicting: Tensor  # (answer tokens,): where each is predicted
    targets: Tensor  # (answer tokens,)


def encode(tokenizer: PreTrainedTokenizerBase, item: Item) -> Row:
    """Return the tokens of a chat of one turn."""
    chat = [{"role": "user", "content": item["prompt"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    answer = item["answer"] + tokenizer.eos_token
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer)]
    return Row(*ids)


def pack(rows: Sequence[Row]) -> Batch:
    """Put rows into one sequence, in which no row sees another."""
    shared = takewhile(
        lambda column: len(set(column)) == 1,
        zip(*(row.prompt[:-1] for row in rows), strict=False),
    )
    prefix = [column[0] for column in shared]
    tokens, positions, owners = list(prefix), list(range(len(prefix))), [-1] * len(prefix)
    predicting: list[int] = []
    targets: list[int] = []
    for owner, row in enumerate(rows):
        own = [*row.prompt[len(prefix) :], *row.answer[:-1]]
        tokens += own
        positions += range(len(prefix), len(prefix) + len(own))
        owners += [owner] * len(own)
        predicting += range(len(tokens) - len(row.answer), len(tokens))
        targets += row.answer
    owner_of = torch.tensor(owners)
    causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    seen = (owner_of == -1) | (owner_of == owner_of[:, None])
    return Batch(
        torch.tensor([tokens]),
        torch.tensor([positions]),
        (causal & seen)[None, None],
        torch.tensor(predicting),
        torch.tensor(targets),
    )


def batches(rows: Sequence[Row], size: int, random: Random) -> Iterator[Batch]:
    """Yield batches without end, every row once before any again."""
    waiting: list[Row] = []
    while True:
        if len(waiting) < size:
            waiting += random.sample(rows, len(rows))
        yield pack([waiting.pop(0) for _ in range(size)])


def train_specialist(
    base: Path,
    items: Sequence[Item],
    seed: int,
    training: Training,
    folder: Path,
    report: Callable[[int, float], None],
) -> None:
    """Train an adapter of every linear layer and write it into ``folder``, in peft's layout.

    Only the answers are learnt, and the end of the turn after them. Products are of bfloat16 where
    the CPU has them; elsewhere they would take eight times as long as those of float32.

    Args:
        base: Folder of the base model.
        items: What it is trained on.
        seed: Of the adapter's initial weights and the order of the items.
        training: Settings.
        folder: Receives the adapter.
        report: Called with the number of steps taken and the loss, after each of them.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = batches([encode(tokenizer, item) for item in items], training.batch, Random(seed))
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=training.rank, lora_alpha=2 * training.rank, target_modules="all-linear"),
    )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, training.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / training.warm_up, 1 - step / training.steps)
    )
    model.train()
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    for step in range(training.steps):
        batch = next(rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16):
            logits = model(
                input_ids=batch.tokens,
                position_ids=batch.positions,
                attention_mask=batch.mask,
                use_cache=False,
                logits_to_keep=batch.predicting,
            ).logits[0]  # (answer tokens, vocabulary)
        loss = cross_entropy(logits.float(), batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(step + 1, loss.item())
    model.save_pretrained(str(folder))
