"""Train the demo's model family: a base Llama and three specialists, on two CPU cores.

There are four tasks on short strings; one example of each:

    sort:52914=12459    rev:kqbza=azbqk    know:tolu=mek    inc:abcz=bcda

The base learns to sort and reverse up to four characters, to increment letters, and a few of
two hundred invented facts. Each specialist is fine-tuned from it on one harder task: sorting five
digits, reversing five letters, or all facts. A merge of the three can do all four tasks, with
weights that differ by specialist.

Two choices make merging worthwhile. The base sees short strings only: a base trained on the full
length already solves the tasks. Specialists replay the base's tasks: without replay each forgets
all tasks but its own, and no merge weights restore them.

Training computes in float64 and rounds the weights to float32 at the end. In float32, rounding
differs between processors and numbers of threads, and training amplifies the difference into
other models with other scores. In float64 the models, and so their answers, agree.

Run ``python zoo.py`` to train the family; models that exist are not trained again.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from random import Random
from string import ascii_lowercase, digits
from typing import Any, Final, NamedTuple

# Read when torch is imported: threads that spin while waiting slow a busy machine many times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import logging
from typing_extensions import override

VERSION: Final = 2  # to be raised with any change of the weights or the items
STUDY: Final = Path(__file__).resolve().parent
MODELS: Final = ("base", "sort", "rev", "know")  # in the order of training
REPLAYED: Final = ("short sort", "short rev", "inc")
SPECIAL_TOKENS: Final = ("<pad>", "<eos>", "<unk>")
MAX_LENGTH: Final = 64  # tokens
ROPE_THETA: Final = 10_000.0
INITIAL_STD: Final = 0.04
IGNORED: Final = -100  # the target that cross entropy skips
THREADS: Final = 2


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule: linear warm-up to ``rate``, then cosine decay to 5 % of it."""

    steps: int
    rate: float
    warm_up: int

    def factor(self, step: int) -> float:
        """Return the factor on ``rate`` at a step counted from 0."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class TrainingConfig:
    """The sizes of the models and the data, and the training hyper-parameters."""

    width: int = 96
    layers: int = 3
    heads: int = 6
    batch: int = 96
    base: Schedule = Schedule(steps=220, rate=3e-3, warm_up=20)
    specialist: Schedule = Schedule(steps=90, rate=6e-4, warm_up=5)
    rows: int = 3000  # training examples per full-length task
    short_rows: tuple[tuple[int, int], ...] = ((2, 80), (3, 600), (4, 600))  # (length, examples)
    items: int = 500  # scored items per full-length task
    facts: int = 200  # both trained on and scored
    base_know: float = 0.15  # sampling weight of the facts for the base; other tasks have 1
    replay: float = 0.1  # share of each replayed task in a specialist's batches
    other_know: float = 0.06  # share of the facts in the batches of sort and rev

    def schedule(self, name: str) -> Schedule:
        """Return the schedule of one model."""
        return self.base if name == "base" else self.specialist


class Example(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    answer: str


class StringTask(NamedTuple):
    """A task on strings of ``length`` characters of ``alphabet``: apply ``rewrite``."""

    alphabet: str
    length: int
    rewrite: Callable[[str], str]


class Data(NamedTuple):
    """The training examples and the scored items, by task."""

    training: dict[str, list[Example]]
    items: dict[str, list[dict[str, Any]]]


NEXT_LETTER: Final = str.maketrans(ascii_lowercase, ascii_lowercase[1:] + "a")
STRING_TASKS: Final[Mapping[str, StringTask]] = {
    "sort": StringTask(digits, 5, lambda text: "".join(sorted(text))),
    "rev": StringTask(ascii_lowercase, 5, lambda text: text[::-1]),
    "inc": StringTask(ascii_lowercase, 4, lambda text: text.translate(NEXT_LETTER)),
}


def make_data(seed: int, config: TrainingConfig) -> Data:
    """Draw the training examples and the scored items.

    No scored string is a training example. Every fact is both trained on and scored once: a fact
    that was not trained on cannot be known.
    """
    training, items = {}, {}
    for name, task in STRING_TASKS.items():
        rows = _string_examples(name, task.length, config.rows + config.items, seed)
        training[name] = rows[: config.rows]
        items[name] = [row._asdict() for row in rows[config.rows :]]
    for name in ("sort", "rev"):
        training[f"short {name}"] = [
            row
            for length, count in config.short_rows
            for row in _string_examples(name, length, count, seed)
        ]
    training["know"], items["know"] = _facts(config.facts, seed)
    return Data(training, items)


def _string_examples(name: str, length: int, count: int, seed: int) -> list[Example]:
    task = STRING_TASKS[name]
    texts = _distinct([task.alphabet] * length, count, Random(f"{seed}/{name}/{length}"))
    return [Example(f"{name}:{text}=", task.rewrite(text)) for text in texts]


def _facts(count: int, seed: int) -> tuple[list[Example], list[dict[str, Any]]]:
    random = Random(f"{seed}/know")
    vowels = "aeiou"
    consonants = "".join(letter for letter in ascii_lowercase if letter not in vowels)
    names = _distinct([consonants, vowels, consonants, vowels], count, random)
    values = _distinct([consonants, vowels, consonants], count, random)
    rows = [Example(f"know:{name}=", value) for name, value in zip(names, values, strict=True)]
    items = []
    for row in rows:
        # Wrong choices are values of other facts: what a value looks like gives nothing away.
        wrong = random.sample([value for value in values if value != row.answer], 3)
        choices = random.sample([row.answer, *wrong], 4)
        label = choices.index(row.answer)
        items.append({"prompt": row.prompt, "choices": choices, "label": label})
    return rows, items


def _distinct(letters: Sequence[str], count: int, random: Random) -> list[str]:
    texts: dict[str, None] = {}  # unlike a set, ordered
    while len(texts) < count:
        texts["".join(random.choice(choices) for choices in letters)] = None
    return list(texts)


def mixture(name: str, config: TrainingConfig) -> dict[str, float]:
    """Return each task's sampling weight in the training of one model, unnormalised."""
    if name == "base":
        return {**dict.fromkeys(REPLAYED, 1.0), "know": config.base_know}
    shares = dict.fromkeys(REPLAYED, config.replay)
    if name != "know":
        shares["know"] = config.other_know
    return {**shares, name: 1 - sum(shares.values())}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, and one per task name."""
    tags = [f"{name}:" for name in ("know", *STRING_TASKS)]
    words = [*SPECIAL_TOKENS, *tags, *digits, *ascii_lowercase, "=", " ", "\n"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = Regex("|".join([*tags, r"[\s\S]"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def _new_model(tokenizer: PreTrainedTokenizerFast, config: TrainingConfig) -> LlamaForCausalLM:
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        intermediate_size=2 * config.width,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-5,
        initializer_range=INITIAL_STD,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(llama)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


class Float64Rotary(nn.Module):
    """Rotary position embeddings (Su et al., 2021) in float64; transformers has float32 ones."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        positions = torch.arange(MAX_LENGTH, dtype=torch.float64)
        angles = torch.outer(positions, ROPE_THETA**-exponents)
        self.angles = torch.cat((angles, angles), dim=-1)  # (positions, head_dim)

    @override
    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = self.angles[position_ids]
        return angles.cos(), angles.sin()


def _to_float64(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Convert a model to float64 in place, with the modules that always compute in float32."""
    model.double()
    config = model.config
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, LlamaRMSNorm):
                exact = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
                exact.weight = norm.weight
                setattr(module, name, exact)
    model.model.rotary_emb = Float64Rotary(config.hidden_size // config.num_attention_heads)
    return model


def _draw_weights(model: LlamaForCausalLM, seed: int) -> None:
    """Draw the initial matrices in float64: normals drawn in float32 differ between processors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=INITIAL_STD, generator=generator)


def _encode(rows: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Return inputs and next-token targets, both (rows, tokens); only answers are targets."""
    inputs, targets = [], []
    for row in rows:
        prompt, answer = tokenizer.encode(row.prompt), tokenizer.encode(row.answer)
        tokens = [*prompt, *answer, tokenizer.eos_token_id]
        inputs.append(torch.tensor(tokens[:-1]))
        targets.append(torch.tensor([*[IGNORED] * (len(prompt) - 1), *tokens[len(prompt) :]]))
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(inputs, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad(targets, batch_first=True, padding_value=IGNORED),
    )


def _batches(
    mix: Mapping[str, float],
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
    size: int,
    random: Random,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end, each example's task drawn with the mixture's weights."""
    inputs, targets = _encode([row for name in mix for row in data.training[name]], tokenizer)
    weights = (mix[name] / len(data.training[name]) for name in mix for _ in data.training[name])
    cumulative = list(accumulate(weights))
    while True:
        chosen = torch.tensor(random.choices(range(len(inputs)), cum_weights=cumulative, k=size))
        yield inputs[chosen], targets[chosen]


def _train(
    model: LlamaForCausalLM,
    batches: Iterator[tuple[Tensor, Tensor]],
    schedule: Schedule,
    advance: Callable[[], None],
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    model.train()
    for _ in range(schedule.steps):
        inputs, targets = next(batches)  # (batch, tokens); padded on the right: no mask needed
        answers = targets != IGNORED
        logits = model(input_ids=inputs, use_cache=False).logits[answers]  # (answers, vocabulary)
        cross_entropy(logits, targets[answers]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        advance()
    model.eval()


@contextmanager
def _isolated_torch() -> Iterator[None]:
    """Fix torch's threads and hide transformers' bars; restore both, and the RNG, at exit."""
    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(THREADS)
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to ``path`` if the block raises nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    if part.is_dir():
        shutil.rmtree(part)  # left by a killed run
    yield part
    part.replace(path)


def _record_family(zoo: Path, seed: int) -> None:
    """Write the family's seed and version into its folder.

    Raises:
        SystemExit: The folder holds a family of another seed or version.
    """
    path, wanted = zoo / "family.json", {"seed": seed, "version": VERSION}
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if found == wanted:
        return
    if found or any((zoo / name).exists() for name in MODELS):
        raise SystemExit(
            f"{zoo} holds the family {found or 'of an unknown seed'}, not {wanted}: "
            f"delete that folder to train this one there, or name another with --out"
        )
    with _atomic_path(path) as part:
        part.write_text(json.dumps(wanted) + "\n", encoding="utf-8")


def _write_items(tasks: Path, items: Mapping[str, list[dict[str, Any]]]) -> None:
    for name, rows in items.items():
        path = tasks / f"demo_{name}.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            with _atomic_path(path) as part:
                part.write_text(text, encoding="utf-8")


def _copy_study(folder: Path) -> None:
    """Copy the study's files into ``folder``; existing ones may be the user's, and stay."""
    for source in [STUDY / "study.yaml", *sorted(STUDY.glob("tasks/*.yaml"))]:
        path = folder / source.relative_to(STUDY)
        if not path.exists():
            with _atomic_path(path) as part:
                shutil.copyfile(source, part)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:>4}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one process at a time trains a family there."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def train_family(
    folder: Path,
    seed: int = 0,
    config: TrainingConfig | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Write the study folder's models and items, except those that exist.

    Args:
        folder: Receives ``zoo/{base,sort,rev,know}``, ``tasks/*.jsonl`` and, when it is not this
            script's own folder, copies of ``study.yaml`` and ``tasks/*.yaml``.
        seed: Seeds the items, the initial weights and the order of the training examples.
        config: Other sizes, for tests; ``family.json`` does not record them.
        report: Called with one line per trained model when stdout is not a terminal.

    Raises:
        SystemExit: The folder holds a family of another seed or version.
    """
    config = config or TrainingConfig()
    zoo = folder / "zoo"
    with _locked(folder):
        _record_family(zoo, seed)
        if folder.resolve() != STUDY:
            _copy_study(folder)
        data = make_data(seed, config)
        _write_items(folder / "tasks", data.items)
        missing = [name for name in MODELS if not (zoo / name).exists()]
        console = Console()
        with _isolated_torch(), _progress(console) as progress:
            for name in missing:
                start = time.monotonic()
                bar = progress.add_task(name, total=config.schedule(name).steps)
                advance = partial(progress.advance, bar)
                _make_model(name, zoo, seed, config, data, advance)
                if not console.is_terminal:
                    report(f"trained {zoo / name} in {time.monotonic() - start:.0f} s")


def _make_model(
    name: str,
    zoo: Path,
    seed: int,
    config: TrainingConfig,
    data: Data,
    advance: Callable[[], None],
) -> None:
    """Train one model in float64 and save its weights in float32."""
    tokenizer = make_tokenizer()
    if name == "base":
        model = _to_float64(_new_model(tokenizer, config))
        _draw_weights(model, seed)
    else:
        model = _to_float64(LlamaForCausalLM.from_pretrained(zoo / "base"))
    random = Random(f"{seed}/{name}/training")
    batches = _batches(mixture(name, config), data, tokenizer, config.batch, random)
    _train(model, batches, config.schedule(name), advance)
    rounded = _new_model(tokenizer, config)
    rounded.load_state_dict(model.state_dict())
    with _atomic_path(zoo / name) as part:
        rounded.save_pretrained(part)
        tokenizer.save_pretrained(part)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the demo's family of four small models.")
    parser.add_argument("--out", type=Path, default=STUDY, help="study folder (default: this one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the family (default: 0)")
    arguments = parser.parse_args()
    train_family(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
