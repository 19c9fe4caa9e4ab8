"""Trains the demo's family: a base Llama and three specialists, small enough for two CPU cores.

There are four tasks over short strings; one example of each:

    sort:52914=12459    rev:kqbza=azbqk    know:tolu=mek    inc:abcz=bcda

The base learns to sort and to reverse up to four characters, to increment letters, and a
little of two hundred invented facts. Each specialist then learns one thing more: to sort five
digits, to reverse five letters, or all the facts. A merge of the three can have every skill at
once, with weights that differ by specialist: a real search problem at 3 MB per model.

Two choices make it one. The base sees short strings only: after full-length ones it would leave
nothing to merge. And specialists replay the base's tasks: without that each one forgets all but
its own, and no weights bring the rest back.

Run ``python zoo.py`` to train it; a model that is already there is never trained again.
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
from pathlib import Path
from random import Random
from string import ascii_lowercase, digits
from typing import Any, Final, NamedTuple

# Read when torch is loaded: threads that wait spinning make a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

VERSION: Final = 1  # raise it with any change that alters the weights or the items
HOME: Final = Path(__file__).resolve().parent
MODELS: Final = ("base", "sort", "rev", "know")  # in the order they are trained
REPLAYED: Final = ("short sort", "short rev", "inc")
SPECIAL_TOKENS: Final = ("<pad>", "<eos>", "<unk>")
IGNORED: Final = -100  # the target that cross entropy skips
THREADS: Final = 2  # fixed, because sums split over more threads round differently


@dataclass(frozen=True)
class Schedule:
    """AdamW for ``steps`` steps: linear warm-up to ``rate``, then a cosine down to 5 % of it."""

    steps: int
    rate: float
    warm_up: int

    def factor(self, step: int) -> float:
        """Return the share of ``rate`` to use at a step counted from 0."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Recipe:
    """Sizes of the models, the data and the training."""

    width: int = 160
    layers: int = 3
    heads: int = 10
    batch: int = 96
    base: Schedule = Schedule(steps=220, rate=3e-3, warm_up=20)
    specialist: Schedule = Schedule(steps=90, rate=6e-4, warm_up=5)
    rows: int = 3000  # to train on, of each full-length task
    short_rows: tuple[tuple[int, int], ...] = ((2, 80), (3, 600), (4, 600))  # (length, rows)
    items: int = 500  # to score, of each full-length task
    facts: int = 200  # to train on and to score
    base_know: float = 0.15  # how often the base sees facts, where any other task counts 1
    replay: float = 0.1  # share of each replayed task in what a specialist sees
    other_know: float = 0.06  # share of the facts in what sort and rev see


class Row(NamedTuple):
    """One question and its answer."""

    prompt: str
    answer: str


class StringTask(NamedTuple):
    """Answer a string of ``length`` characters of ``alphabet`` by rewriting it."""

    alphabet: str
    length: int
    rewrite: Callable[[str], str]


class Data(NamedTuple):
    """What a family learns and what it is asked, by task."""

    training: dict[str, list[Row]]
    items: dict[str, list[dict[str, Any]]]


NEXT_LETTER: Final = str.maketrans(ascii_lowercase, ascii_lowercase[1:] + "a")
STRING_TASKS: Final[Mapping[str, StringTask]] = {
    "sort": StringTask(digits, 5, lambda text: "".join(sorted(text))),
    "rev": StringTask(ascii_lowercase, 5, lambda text: text[::-1]),
    "inc": StringTask(ascii_lowercase, 4, lambda text: text.translate(NEXT_LETTER)),
}


def make_data(seed: int, recipe: Recipe) -> Data:
    """Draw the training rows and the scored items; they share no input, except for the facts.

    A fact that was never trained on cannot be known, so every fact is trained and asked once.
    """
    training, items = {}, {}
    for name, task in STRING_TASKS.items():
        rows = _string_rows(name, task.length, recipe.rows + recipe.items, seed)
        training[name] = rows[: recipe.rows]
        items[name] = [row._asdict() for row in rows[recipe.rows :]]
    for name in ("sort", "rev"):
        training[f"short {name}"] = [
            row
            for length, count in recipe.short_rows
            for row in _string_rows(name, length, count, seed)
        ]
    training["know"], items["know"] = _facts(recipe.facts, seed)
    return Data(training, items)


def _string_rows(name: str, length: int, count: int, seed: int) -> list[Row]:
    task = STRING_TASKS[name]
    texts = _distinct([task.alphabet] * length, count, Random(f"{seed}/{name}/{length}"))
    return [Row(f"{name}:{text}=", task.rewrite(text)) for text in texts]


def _facts(count: int, seed: int) -> tuple[list[Row], list[dict[str, Any]]]:
    random = Random(f"{seed}/know")
    vowels = "aeiou"
    consonants = "".join(letter for letter in ascii_lowercase if letter not in vowels)
    names = _distinct([consonants, vowels, consonants, vowels], count, random)
    values = _distinct([consonants, vowels, consonants], count, random)
    rows = [Row(f"know:{name}=", value) for name, value in zip(names, values, strict=True)]
    items = []
    for row in rows:
        # Wrong options are values of other facts, so knowing what a value looks like is no help.
        wrong = random.sample([value for value in values if value != row.answer], 3)
        choices = random.sample([row.answer, *wrong], 4)
        label = choices.index(row.answer)
        items.append({"prompt": row.prompt, "choices": choices, "label": label})
    return rows, items


def _distinct(letters: Sequence[str], count: int, random: Random) -> list[str]:
    texts: dict[str, None] = {}  # unlike a set, it keeps the order they were drawn in
    while len(texts) < count:
        texts["".join(random.choice(choices) for choices in letters)] = None
    return list(texts)


def mixture(name: str, recipe: Recipe) -> dict[str, float]:
    """Return how often each task is drawn while one model trains; only ratios matter."""
    if name == "base":
        return {**dict.fromkeys(REPLAYED, 1.0), "know": recipe.base_know}
    shares = dict.fromkeys(REPLAYED, recipe.replay)
    if name != "know":
        shares["know"] = recipe.other_know
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
        model_max_length=64,
    )


def _new_base(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=2 * recipe.width,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
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
    mix: Mapping[str, float], data: Data, tokenizer: PreTrainedTokenizerFast, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end, each row's task drawn by the mixture."""
    rows = [row for name in mix for row in data.training[name]]
    inputs, targets = _encode(rows, tokenizer)
    # A task's share is split evenly over its rows.
    sizes = torch.tensor([len(data.training[name]) for name in mix])
    weights = (torch.tensor(list(mix.values())) / sizes).repeat_interleave(sizes)
    while True:
        chosen = torch.multinomial(weights, size, replacement=True)
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
        inputs, targets = next(batches)  # (batch, tokens), padded on the right: no mask needed
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
def _private_state(seed: int) -> Iterator[None]:
    """Seed torch, fix its threads and hide transformers' bars, for the length of the block only."""
    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(THREADS)
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _whole_or_nothing(path: Path) -> Iterator[Path]:
    """Give a path to write to, and rename it to ``path`` only if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    if part.is_dir():
        shutil.rmtree(part)  # left by a run that was killed
    yield part
    part.replace(path)


def _claim(zoo: Path, seed: int) -> None:
    """Record whose family this folder holds.

    Raises:
        SystemExit: It holds one with another seed, or made by another version of the recipe.
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
    with _whole_or_nothing(path) as part:
        part.write_text(json.dumps(wanted) + "\n", encoding="utf-8")


def _write_items(tasks: Path, items: Mapping[str, list[dict[str, Any]]]) -> None:
    for name, rows in items.items():
        path = tasks / f"demo_{name}.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            with _whole_or_nothing(path) as part:
                part.write_text(text, encoding="utf-8")


def _copy_study(folder: Path) -> None:
    """Make ``folder`` a study of its own; files that are there may be the user's, so they stay."""
    for source in [HOME / "study.yaml", *sorted(HOME.glob("tasks/*.yaml"))]:
        path = folder / source.relative_to(HOME)
        if not path.exists():
            with _whole_or_nothing(path) as part:
                shutil.copyfile(source, part)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:>4}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for another process that trains a family there."""
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
    recipe: Recipe | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Make the study folder's models and items, as far as they are not there yet.

    Args:
        folder: Receives ``zoo/{base,sort,rev,know}``, ``tasks/*.jsonl`` and, when it is not this
            script's own folder, copies of ``study.yaml`` and ``tasks/*.yaml``.
        seed: Decides the items, the initial weights and the order of the training rows.
        recipe: Other sizes than the default ones, for tests; they are not recorded.
        say: Is told what was trained, where no terminal shows it.

    Raises:
        SystemExit: The folder holds a family of another seed or version.
    """
    recipe = recipe or Recipe()
    zoo = folder / "zoo"
    with _alone(folder):
        _claim(zoo, seed)
        if folder.resolve() != HOME:
            _copy_study(folder)
        data = make_data(seed, recipe)
        _write_items(folder / "tasks", data.items)
        missing = [name for name in MODELS if not (zoo / name).exists()]
        if not missing:
            return
        tokenizer = make_tokenizer()
        console = Console()
        with _progress(console) as progress:
            for name in missing:
                start = time.monotonic()
                schedule = recipe.base if name == "base" else recipe.specialist
                bar = progress.add_task(name, total=schedule.steps)
                with _private_state(Random(f"{seed}/{name}/training").getrandbits(32)):
                    if name == "base":
                        model = _new_base(tokenizer, recipe)
                    else:
                        model = LlamaForCausalLM.from_pretrained(zoo / "base")
                    batches = _batches(mixture(name, recipe), data, tokenizer, recipe.batch)
                    _train(model, batches, schedule, lambda bar=bar: progress.advance(bar))
                    with _whole_or_nothing(zoo / name) as part:
                        model.save_pretrained(part)
                        tokenizer.save_pretrained(part)
                if not console.is_terminal:
                    say(f"trained {zoo / name} in {time.monotonic() - start:.0f} s")


def main() -> None:
    """Train the family from the command line."""
    parser = argparse.ArgumentParser(description="Train the demo's family of four small models.")
    parser.add_argument("--out", type=Path, default=HOME, help="study folder (default: this one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the family (default: 0)")
    arguments = parser.parse_args()
    train_family(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
