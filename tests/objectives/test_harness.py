"""The harness gives lm-eval's own value for every item, whatever is evaluated together."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random

import numpy as np
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from objectives.base import ObjectiveError, without_settings
from objectives.entries import TaskEntry
from objectives.harness.encoding import Prompting
from objectives.items import split_items
from tiny_models import make_model, make_tokenizer
from tiny_tasks import (
    ANSWER,
    CHOICE,
    ROWS,
    SHOTS,
    TASKS,
    everything,
    mean_of,
    prepare,
    values_of,
    write_task,
)


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
    harness = prepare(folder, model, TaskEntry(task=task, metric=metric))
    values = values_of(harness, model)
    assert values == reference[task, *judged_by]
    if "letter" not in judged_by:
        assert len(set(values)) > 1, "the test would pass on a constant"


def test_fewshot_examples_given_by_the_study_are_those_lm_eval_would_draw(folder, model):
    config = CHOICE | SHOTS
    config.pop("num_fewshot")
    write_task(folder, "choice_open", **config)
    ours = prepare(folder, model, TaskEntry(task="choice_open", num_fewshot=2))
    theirs = prepare(folder, model, "choice_shots")
    assert [q.requests[0].args for q in ours.questions] == [
        q.requests[0].args for q in theirs.questions
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
    harness = prepare(folder, model, TaskEntry(task="both", weight=3.0), "filtered")
    assert harness.tasks == {"choice": 1.5, "answer": 1.5, "filtered": 1.0}


def test_prompts_that_do_not_fit_are_reported_once(folder, caplog):
    model = make_model(max_position_embeddings=18)
    harness = prepare(folder, model, "answer", "choice")
    harness.snapshots(everything(harness))
    assert caplog.messages[0].startswith("task 'answer': ")
    assert caplog.messages[0].endswith("do not fit in 18 tokens and lose their beginning")
    reported = len(caplog.messages)
    harness.score(model, everything(harness))
    assert len(caplog.messages) == reported


def test_a_chat_template_reaches_the_prompts(folder, model):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}!"
    harness = prepare(folder, model, "answer", tokenizer=tokenizer, prompting=Prompting(True))
    assert harness.questions[0].requests[0].args[0].startswith("<user>")
    assert values_of(harness, model, [0]) in ([0.0], [1.0])


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
SKIPS = "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"


@pytest.mark.parametrize("start", [REFUSES, SKIPS])
def test_system_instruction_that_the_template_leaves_out_is_refused(folder, model, start):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = start + "{% for m in messages %}{{ m.content }}{% endfor %}"
    prompting = Prompting(apply_chat_template=True, system_instruction=" Be brief. ")
    with pytest.raises(ObjectiveError, match="system_instruction is in none of its prompts"):
        prepare(folder, model, "answer", tokenizer=tokenizer, prompting=prompting)


@pytest.mark.parametrize("chat", [False, True])
def test_chat_template_and_system_prompt_give_the_values_lm_eval_gives(folder, model, chat):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}!"
    language_model = HFLM(
        pretrained=make_model(), tokenizer=tokenizer, batch_size=8, softmax_dtype="float32"
    )
    tasks = ["choice_shots", "answer"]
    with contextlib.chdir(folder):
        samples = simple_evaluate(
            language_model,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False, include_path=str(folder)),
            bootstrap_iters=0,
            apply_chat_template=chat,
            system_instruction="Be brief.",
        )["samples"]
    prompting = Prompting(chat, "Be brief.")
    harness = prepare(folder, model, *tasks, tokenizer=tokenizer, prompting=prompting)
    metric = {"choice_shots": "acc", "answer": "exact_match"}
    theirs = [
        (sample["arguments"][0][0], float(sample[metric[task]]))
        for task in tasks
        for sample in sorted(samples[task], key=lambda sample: sample["doc_id"])
    ]
    prompts = [question.requests[0].args[0] for question in harness.questions]
    assert list(zip(prompts, values_of(harness, model), strict=True)) == theirs
    assert all(prompt.startswith("<system>" if chat else "Be brief.") for prompt in prompts)


def test_unsafe_code_is_allowed_by_the_setting_alone(folder, model):
    write_task(folder, "unsafe", **CHOICE | {"unsafe_code": True})
    harness = prepare(folder, model, "unsafe", unsafe_code=True)
    assert len(harness.items) == ROWS + 1


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
        ("unsafe", CHOICE | {"unsafe_code": True}, {}, "'unsafe' runs code .*unsafe_code: true"),
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
            "max_gen_toks is 256 but the model's context, by its config.json, has 256 tokens",
        ),
        ("shots", CHOICE | SHOTS, {"num_fewshot": 99}, "'shots': its prompts could not be built"),
        ("split", CHOICE | {"test_split": "tset"}, {}, r"'split' \(.*\) could not be loaded.*tset"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused(folder, model, name, config, spec, message):
    write_task(folder, name, **config)
    with pytest.raises(ObjectiveError, match=message):
        prepare(folder, model, TaskEntry(task=name, **spec))


def test_settings_that_cannot_be_used_are_refused(folder, model):
    for specs, settings, message in [
        ([], {}, "the list is empty"),
        (["choice", "choice"], {}, "'choice' is listed twice"),
        (["choice"], {"prompting": Prompting(True)}, "has no chat template"),
    ]:
        with pytest.raises(ObjectiveError, match=message):
            prepare(folder, model, *specs, **settings)
    with pytest.raises(ObjectiveError, match="nowhere is not a folder"):
        prepare(folder / "nowhere", model, "choice")
    with pytest.raises(ObjectiveError, match="got a Linear"):
        prepare(folder, torch.nn.Linear(1, 1), "choice")


@pytest.mark.slow
def test_an_unknown_task_in_a_group_gets_a_suggestion_and_the_folders_searched(folder, model):
    group = {"group": "mixed", "task": ["choice", "choice_shot"]}
    (folder / "mixed.yaml").write_text(yaml.safe_dump(group))
    (folder / "broken.yaml").write_text("task: [unclosed")
    with pytest.raises(ObjectiveError) as caught:
        prepare(folder, model, "mixed")
    message = str(caught.value)
    for name in ("mixed.yaml", "broken.yaml"):
        (folder / name).unlink()
    assert "no task 'choice_shot'" in message
    assert "did you mean 'choice_shots'" in message
    assert str(folder) in message
    assert "lm-eval's own tasks" in message
    assert "broken.yaml" in message


def test_only_the_prepared_model_is_scored(folder, model):
    harness = prepare(folder, model, "choice")
    with pytest.raises(ObjectiveError, match="another model"):
        harness.score(make_model(), [0])
    with pytest.raises(ObjectiveError, match="item 99 does not exist"):
        harness.score(model, [99])


def test_a_model_of_nans_fails_instead_of_choosing_the_first_answer(folder, model):
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


def test_batches_too_large_for_memory_are_halved_with_a_warning(folder, caplog):
    model, specs = make_model(), (TaskEntry(task="choice"), TaskEntry(task="answer"))
    harness = prepare(folder, model, *specs)
    expected = harness.score(model, everything(harness))

    def fill(module, given):
        if len(given[0]) > 5:
            raise torch.OutOfMemoryError("full")

    model.model.layers[0].mlp.register_forward_pre_hook(fill)
    with caplog.at_level(logging.WARNING, "objectives.harness.harness"):
        found = harness.score(model, everything(harness))
    assert [answer.value for answer in found] == [answer.value for answer in expected]
    assert "out of memory: batch size halved to" in caplog.text
    always = (torch.zeros(6, 1),)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, _: fill(module, always))
    with pytest.raises(ObjectiveError, match="not enough memory for a batch of one sequence"):
        harness.score(model, everything(harness))


def test_snapshots_keep_the_prompt_apart_from_the_generation_settings(folder, model):
    harness = prepare(folder, model, "answer", "choice")
    generated, chosen = harness.snapshots([0, ROWS])
    prompt, settings = harness.questions[0].requests[0].args
    assert (generated.prompt, json.loads(generated.settings)) == (prompt, settings)
    assert generated.full_prompt == f"{prompt}\n{json.dumps(settings)}"
    assert chosen.settings == ""
    for snapshot in (generated, chosen):
        assert without_settings(snapshot.full_prompt) == snapshot.prompt
