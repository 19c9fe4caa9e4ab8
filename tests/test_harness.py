"""The harness gives lm-eval's own value for every item, whatever is asked together."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from objectives.base import ObjectiveError
from objectives.harness import Harness
from objectives.items import split_items
from objectives.tasks import Prompting, TaskSpec

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
ROWS = 24


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task(folder: Path, name: str, **config) -> None:
    base = {"task": name, "dataset_path": "json", "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(base | config))


def mean_of(*metrics: str) -> list[dict]:
    return [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics
    ]


CHOICE = {
    "output_type": "multiple_choice",
    "dataset_kwargs": {"data_files": {"test": "choice.jsonl", "train": "shots.jsonl"}},
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": mean_of("acc_norm", "acc"),
}
ANSWER = {
    "output_type": "generate_until",
    "dataset_kwargs": {"data_files": {"test": "answer.jsonl"}},
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": mean_of("exact_match"),
}
SHOTS = {"num_fewshot": 2, "fewshot_split": "train", "training_split": "train"}
FIRST_LETTER = {"function": "regex", "regex_pattern": "(.)"}


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {character: 3 + place for place, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3 + len(CHARACTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.6,  # large, so that answers differ from question to question
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def greedy_answer(model, tokenizer, question: str) -> str:
    prompt = tokenizer(question, return_tensors="pt")["input_ids"]
    output = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).split("\n")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Local tasks; the model itself wrote half of the right answers, so scores are not all 0."""
    folder = tmp_path_factory.mktemp("tasks")
    model, tokenizer = make_model(), make_tokenizer()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(10 * ROWS)]
    questions = [f"{words[row]} {words[row + 1]}?" for row in range(ROWS)]
    choice = [
        {"question": question, "choices": words[row + 9 : row + 12], "gold": row % 3}
        for row, question in enumerate(questions)
    ]
    answer = [
        {
            "question": question,
            "answer": greedy_answer(model, tokenizer, question) if row % 2 else "no",
        }
        for row, question in enumerate(questions)
    ]
    shots = [{"question": f"{word}?", "choices": words[:3], "gold": 1} for word in words[:12]]
    write_rows(folder / "choice.jsonl", [*choice, choice[0]])  # one question comes twice
    write_rows(folder / "answer.jsonl", answer)
    write_rows(folder / "shots.jsonl", shots)
    write_task(folder, "choice", **CHOICE)
    write_task(folder, "choice_shots", **CHOICE | SHOTS)
    write_task(folder, "answer", **ANSWER)
    filters = [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {"name": "letter", "filter": [FIRST_LETTER, {"function": "take_first"}]},
    ]
    write_task(folder, "filtered", **ANSWER | {"filter_list": filters})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("data"))
        yield folder


@pytest.fixture
def model():
    return make_model()


def prepare(folder, model, *specs, **settings):
    specs = [TaskSpec(spec) if isinstance(spec, str) else spec for spec in specs]
    settings = {"tokenizer": make_tokenizer(), "batch_size": 8} | settings
    return Harness.prepare(specs, include_path=[folder], model=model, **settings)


def values_of(harness, model, items=None):
    answers = harness.score(model, everything(harness) if items is None else items)
    return [answer.value for answer in answers]


def everything(harness):
    return list(range(len(harness.items)))


TASKS = ["choice", "choice_shots", "answer", "filtered"]


@pytest.fixture(scope="module")
def reference(folder):
    """lm-eval's own values: {(task, filter, metric): [value per doc]}."""
    language_model = HFLM(
        pretrained=make_model(),
        tokenizer=make_tokenizer(),
        batch_size=8,
        softmax_dtype="float32",
    )
    with contextlib.chdir(folder):  # lm-eval looks for data files there
        manager = TaskManager(include_defaults=False, include_path=str(folder))
        results = simple_evaluate(
            language_model, tasks=TASKS, task_manager=manager, bootstrap_iters=0
        )
    values = {}
    for task, samples in results["samples"].items():
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            for metric in sample["metrics"]:
                key = (task, sample["filter"], metric)
                values.setdefault(key, []).append(float(sample[metric]))
    return values


@pytest.mark.parametrize(
    ("task", "metric", "judged_by"),
    [
        ("choice", None, ("none", "acc")),
        ("choice", "acc_norm", ("none", "acc_norm")),
        ("choice_shots", None, ("none", "acc")),
        ("answer", None, ("none", "exact_match")),
        ("filtered", None, ("whole", "exact_match")),
        ("filtered", "exact_match,letter", ("letter", "exact_match")),
    ],
)
def test_every_item_has_the_value_lm_eval_gives_it(
    folder, model, reference, task, metric, judged_by
):
    harness = prepare(folder, model, TaskSpec(task, metric))
    values = values_of(harness, model)
    assert values == reference[task, *judged_by]
    if "letter" not in judged_by:
        assert len(set(values)) > 1, "the test would pass on a constant"


def test_fewshot_examples_given_by_the_study_are_those_lm_eval_would_draw(folder, model):
    config = CHOICE | SHOTS
    config.pop("num_fewshot")
    write_task(folder, "choice_open", **config)
    ours = prepare(folder, model, TaskSpec("choice_open", num_fewshot=2))
    theirs = prepare(folder, model, "choice_shots")
    assert [q.requests[0].args for q in ours._questions] == [
        q.requests[0].args for q in theirs._questions
    ]


def test_any_subset_in_any_order_has_the_values_of_the_whole(folder, model):
    harness = prepare(folder, model, *TASKS)
    whole = values_of(harness, model)
    draw = random.Random(1)
    shuffled = draw.sample(everything(harness), len(harness.items))
    for start in range(0, len(shuffled), 17):
        block = shuffled[start : start + 17]
        assert values_of(harness, model, block) == [whole[number] for number in block]
    assert values_of(harness, model, [3, 3, 0]) == [whole[3], whole[3], whole[0]]
    assert harness.score(model, []) == []


def test_scores_follow_the_weights_and_come_back_with_them(folder, model):
    harness = prepare(folder, model, *TASKS)
    before = values_of(harness, model)
    assert values_of(harness, model) == before
    own = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-1.0)
    changed = values_of(harness, model)
    assert changed != before
    fresh = prepare(folder, model, *TASKS)
    assert values_of(fresh, model) == changed
    model.load_state_dict(own)
    assert values_of(harness, model) == before


def test_decoding_settings_the_model_ships_with_change_nothing(folder, model):
    harness = prepare(folder, model, "answer")
    before = values_of(harness, model)
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.max_new_tokens = 1
    assert values_of(harness, model) == before
    assert model.generation_config.repetition_penalty == 9.0


def random_states():
    old_numpy = np.random.get_state()[1].tolist()  # noqa: NPY002  # the one lm-eval seeds
    return random.getstate(), old_numpy, torch.get_rng_state().tolist()


def test_random_states_tokenizer_and_logging_are_left_alone(folder, model):
    tokenizer = make_tokenizer()
    log = logging.getLogger("lm_eval")
    before = random_states(), log.level, tokenizer.pad_token
    harness = prepare(folder, model, "choice_shots", "answer", tokenizer=tokenizer)
    harness.score(model, everything(harness))
    assert (random_states(), log.level, tokenizer.pad_token) == before


def test_nothing_is_printed(folder, model, capfd):
    harness = prepare(folder, model, *TASKS)
    harness.score(model, everything(harness))
    assert capfd.readouterr() == ("", "")


def test_the_same_question_has_one_key_in_two_tasks_and_twice_in_one(folder, model):
    harness = prepare(folder, model, "choice", "choice_shots", "answer")
    by_task = {
        task: [item.key for item in harness.items if item.task == task] for task in harness.tasks
    }
    assert by_task["choice"] == by_task["choice_shots"]
    assert by_task["choice"][0] == by_task["choice"][-1]
    assert len(set(by_task["choice"])) == ROWS
    assert not set(by_task["choice"]) & set(by_task["answer"])
    assert [item.doc_id for item in harness.items if item.task == "answer"] == list(range(ROWS))


def test_real_items_split_without_overlap(folder, model):
    harness = prepare(folder, model, "choice", "answer")
    counts = {"search": 12, "select": 12, "test": 24}
    splits = split_items(harness.items, harness.tasks, counts, 0)
    used = [harness.items[n].key for n in splits.search + splits.select + splits.test]
    assert len(set(used)) == 48


def test_a_group_shares_its_weight_over_its_tasks(folder, model):
    (folder / "elsewhere").mkdir()
    group = {"group": "both", "task": ["choice", "answer"]}
    (folder / "elsewhere" / "group.yaml").write_text(yaml.safe_dump(group))
    harness = prepare(folder, model, TaskSpec("both", weight=3.0), "filtered")
    assert harness.tasks == {"choice": 1.5, "answer": 1.5, "filtered": 1.0}


def test_prompts_that_do_not_fit_are_reported_once(folder, model, caplog):
    harness = prepare(folder, model, "answer", "choice", max_length=18)
    harness.shown(everything(harness))
    assert caplog.messages[0].startswith("task 'answer': ")
    assert caplog.messages[0].endswith("do not fit in 18 tokens and lose their beginning")
    reported = len(caplog.messages)
    harness.score(model, everything(harness))
    assert len(caplog.messages) == reported


def test_a_chat_template_reaches_the_prompts(folder, model):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}!"
    harness = prepare(folder, model, "answer", tokenizer=tokenizer, prompting=Prompting(True))
    assert harness._questions[0].requests[0].args[0].startswith("<user>")
    assert values_of(harness, model, [0]) in ([0.0], [1.0])


@pytest.mark.parametrize(
    ("name", "config", "spec", "message"),
    [
        ("choice", CHOICE, {"metric": "accc"}, "no metric 'accc'; usable: acc_norm, acc"),
        ("filtered2", ANSWER, {"metric": "exact_match,x"}, "no filter 'x'; it has none"),
        (
            "f1",
            CHOICE | {"metric_list": [*mean_of("acc"), {"metric": "f1", "aggregation": "f1"}]},
            {"metric": "f1"},
            "'f1' is not a mean of one number per item; usable: acc",
        ),
        (
            "lower",
            CHOICE
            | {
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}]
            },
            {"metric": "acc"},
            "'acc' is better when lower; usable: none",
        ),
        (
            "lost",
            CHOICE | {"dataset_kwargs": {"data_files": {"test": "lost.jsonl"}}},
            {},
            r"'lost' \(.*lost\.yaml\).*lost\.jsonl",
        ),
        ("unsafe", CHOICE | {"unsafe_code": True}, {}, "'unsafe' runs code the model writes"),
        ("fixed", CHOICE | {"num_fewshot": 0}, {"num_fewshot": 3}, "3 but the task itself fixes 0"),
        (
            "sampled",
            ANSWER | {"generation_kwargs": {"do_sample": True, "temperature": 1.0, "until": ["."]}},
            {},
            "'sampled': its answers are sampled.*do_sample: false",
        ),
        (
            "long",
            ANSWER | {"generation_kwargs": {"max_gen_toks": 256, "until": ["."]}},
            {},
            "max_gen_toks is 256 but the model holds 256 tokens",
        ),
        ("shots", CHOICE | SHOTS, {"num_fewshot": 99}, "'shots': its prompts could not be built"),
        ("split", CHOICE | {"test_split": "tset"}, {}, r"'split' \(.*\) could not be loaded.*tset"),
        ("choice", CHOICE, {"weight": 0.0}, "'choice': weight is 0.0; make it a positive number"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused(folder, model, name, config, spec, message):
    write_task(folder, name, **config)
    with pytest.raises(ObjectiveError, match=message):
        prepare(folder, model, TaskSpec(name, **spec))


def test_settings_that_cannot_be_used_are_refused(folder, model):
    for specs, settings, message in [
        ([], {}, "the list is empty"),
        (["choice", "choice"], {}, "'choice' is listed twice"),
        (["choice"], {"batch_size": 0}, "batch_size is 0"),
        (["choice"], {"prompting": Prompting(True)}, "has no chat template"),
    ]:
        with pytest.raises(ObjectiveError, match=message):
            prepare(folder, model, *specs, **settings)
    with pytest.raises(ObjectiveError, match="nowhere is not a folder"):
        prepare(folder / "nowhere", model, "choice")
    with pytest.raises(ObjectiveError, match="got a Linear"):
        prepare(folder, torch.nn.Linear(1, 1), "choice")


@pytest.mark.slow
def test_an_unknown_task_in_a_group_gets_a_suggestion_and_the_places_searched(folder, model):
    group = {"group": "mixed", "task": ["choice", "choice_shot"]}
    (folder / "mixed.yaml").write_text(yaml.safe_dump(group))
    (folder / "broken.yaml").write_text("task: [unclosed")
    with pytest.raises(ObjectiveError) as caught:
        prepare(folder, model, "mixed")
    message = str(caught.value)
    (folder / "broken.yaml").unlink()
    assert "no task 'choice_shot'" in message
    assert "did you mean 'choice_shots'" in message
    assert str(folder) in message
    assert "lm-eval's own tasks" in message
    assert "broken.yaml" in message


def test_only_the_prepared_model_in_evaluation_mode_is_scored(folder, model):
    harness = prepare(folder, model, "choice")
    with pytest.raises(ObjectiveError, match="another model"):
        harness.score(make_model(), [0])
    with pytest.raises(ObjectiveError, match="item 99 does not exist"):
        harness.score(model, [99])
    with pytest.raises(ObjectiveError, match="training mode"):
        harness.score(model.train(), [0])


def test_a_model_of_nans_fails_instead_of_answering_a(folder, model):
    harness = prepare(folder, model, "choice")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ObjectiveError, match=r"'choice', doc 5.*not a number"):
        harness.score(model, [5])


def test_a_value_that_is_not_one_number_fails_with_the_item(folder, model):
    (folder / "odd.py").write_text("def judge(doc, results):\n    return {'acc': [1.0, 0.0]}\n")
    write_task(folder, "odd", **CHOICE)
    with (folder / "odd.yaml").open("a") as file:
        file.write("process_results: !function odd.judge\n")
    harness = prepare(folder, model, "odd")
    with pytest.raises(ObjectiveError, match=r"'odd', doc 2: 'acc' is \[1.0, 0.0\]"):
        harness.score(model, [2])
