"""Ways in which lm-eval, its caches or a model give wrong scores silently: a test for each."""

from __future__ import annotations

import contextlib

import datasets
import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from objectives.base import ObjectiveError
from objectives.harness.responding import Responder
from tiny_models import make_model, make_tokenizer
from tiny_tasks import (
    CHOICE,
    everything,
    prepare,
    values_of,
    write_rows,
    write_task,
)

KINDS = ["choice_shots", "answer"]  # log-likelihoods after few-shot examples, and generation

SHUFFLE = """import random

def process_docs(docs):
    def shuffled(doc):
        choices = list(doc["choices"])
        right = choices[doc["gold"]]
        random.shuffle(choices)
        return {"choices": choices, "gold": choices.index(right)}
    return docs.map(shuffled)
"""


DRAWN = """

def drawn_text(doc):
    return random.choice("abc") + doc["question"]
"""


@pytest.fixture(scope="module")
def sent(folder):
    """The prompts lm-eval sends in a full run of choice_shots, by document."""
    return sent_by_lm_eval(folder, "choice_shots")


def sent_by_lm_eval(folder, task):
    language_model = HFLM(pretrained=make_model(), tokenizer=make_tokenizer(), batch_size=8)
    with contextlib.chdir(folder):
        results = simple_evaluate(
            language_model,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False, include_path=str(folder)),
            bootstrap_iters=0,
        )
    samples = results["samples"][task]
    return {sample["doc_id"]: sample["arguments"][0][0] for sample in samples}


def prompts(harness, numbers):
    return [each.prompt for each in harness.snapshots(numbers)]


def changed_model(factor=-1.0):
    model = make_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(factor)
    return model


def test_every_evaluation_has_the_same_fewshot_examples(folder, model, sent):
    harness = prepare(folder, model, "choice_shots")
    for _ in range(2):
        harness.score(model, everything(harness))
        found = [question.requests[0].args[0] for question in harness.questions]
        assert found == list(sent.values())


def test_a_subset_has_the_prompts_of_the_full_run(folder, model, sent):
    harness = prepare(folder, model, "choice_shots")
    harness.score(model, [17, 5])
    for number, prompt in zip([17, 5], prompts(harness, [17, 5]), strict=True):
        assert prompt.startswith(sent[number])


def test_changed_data_under_the_same_task_name_changes_the_prompts(folder, model):
    rows = [{"choices": ["a", "b"], "gold": 0}] * 6
    kwargs = {"dataset_kwargs": {"data_files": {"test": "changing.jsonl"}}}
    write_task(folder, "changing", **CHOICE | kwargs)
    for word in ("old", "new"):
        changed = [row | {"question": f"{word} {number}?"} for number, row in enumerate(rows)]
        write_rows(folder / "changing.jsonl", changed)
        harness = prepare(folder, model, "changing")
        assert all(prompt.startswith(word) for prompt in prompts(harness, [0, 4]))


def test_items_in_any_order_keep_their_own_results_and_none_means_none(folder, model):
    harness = prepare(folder, model, *KINDS)
    whole = values_of(harness, model)
    numbers = [30, 2, 41, 17]
    assert values_of(harness, model, numbers) == [whole[number] for number in numbers]
    assert len({whole[number] for number in numbers}) > 1
    assert harness.score(model, []) == []


def test_scores_follow_the_weights_and_come_back_with_them(folder, model):
    harness = prepare(folder, model, *KINDS)
    before = values_of(harness, model)
    assert values_of(harness, model) == before
    own = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-1.0)
    changed = values_of(harness, model)
    assert changed != before
    fresh = prepare(folder, model, *KINDS)
    assert values_of(fresh, model) == changed
    model.load_state_dict(own)
    assert values_of(harness, model) == before


def test_data_shuffled_when_loaded_is_scored_by_the_row_in_the_prompt(folder, model):
    (folder / "shuffle.py").write_text(SHUFFLE)
    write_task(folder, "shuffled", **CHOICE)
    with (folder / "shuffled.yaml").open("a") as file:
        file.write("process_docs: !function shuffle.process_docs\n")
    datasets.disable_caching()
    try:
        harness = prepare(folder, model, "shuffled")
        again = prepare(folder, model, "shuffled")
        answers = harness.score(model, everything(harness))
    finally:
        datasets.enable_caching()
    assert harness.snapshots(everything(harness)) == again.snapshots(everything(again))
    for question, answer in zip(harness.questions, answers, strict=True):
        logliks = [request.resps[0][0] for request in question.requests]
        gold = question.requests[0].doc["gold"]
        assert answer.value == float(max(logliks) == logliks[gold])
    assert len({answer.value for answer in answers}) > 1


def test_prompts_drawn_after_the_data_go_on_with_the_same_random_stream(folder, model):
    (folder / "drawn.py").write_text(SHUFFLE + DRAWN)
    write_task(folder, "drawn", **{key: CHOICE[key] for key in CHOICE if key != "doc_to_text"})
    with (folder / "drawn.yaml").open("a") as file:
        file.write("process_docs: !function drawn.process_docs\n")
        file.write("doc_to_text: !function drawn.drawn_text\n")
    datasets.disable_caching()
    try:
        theirs = sent_by_lm_eval(folder, "drawn")
        harness = prepare(folder, model, "drawn")
    finally:
        datasets.enable_caching()
        (folder / "drawn.yaml").unlink()
    found = {q.item.doc_id: q.requests[0].args[0] for q in harness.questions}
    assert found == theirs
    assert len({prompt[0] for prompt in found.values()}) == 3


def test_no_response_is_cached_by_its_prompt_when_weights_change(folder, model):
    harness = prepare(folder, model, "choice")
    before = harness.score(model, everything(harness))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    after = harness.score(model, everything(harness))
    assert all(one.margin != other.margin for one, other in zip(before, after, strict=True))


def test_log_likelihoods_of_a_bfloat16_model_are_computed_in_float32(folder):
    def logliks(language_model):
        harness.responder = Responder(language_model)
        harness.score(model, everything(harness))
        return [request.resps[0][0] for q in harness.questions for request in q.requests]

    model = make_model().to(torch.bfloat16)
    harness = prepare(folder, model, "choice")
    ours = logliks(harness.language_model)
    settings = {"pretrained": model, "tokenizer": make_tokenizer(), "batch_size": 8}
    exact = logliks(HFLM(softmax_dtype="float32", **settings))
    differences = [np.abs(np.subtract(one, exact)) for one in (ours, logliks(HFLM(**settings)))]
    assert differences[0].mean() < differences[1].mean() / 2, "what is left is the model's rounding"
    assert not set(ours) <= set(torch.tensor(ours).bfloat16().tolist())


def test_the_same_items_have_the_same_results_to_the_last_bit(folder):
    model = make_model().to(torch.bfloat16)
    answers = [
        harness.score(model, everything(harness))
        for harness in (prepare(folder, model, *KINDS), prepare(folder, model, *KINDS))
    ]
    assert answers[0] == answers[1]


def test_nothing_computed_with_earlier_weights_is_used_again(folder, model):
    harness = prepare(folder, model, *KINDS)
    for factor in (-1.0, 0.5):
        harness.score(model, everything(harness))
        model.load_state_dict(changed_model(factor).state_dict())
        fresh_model = changed_model(factor)
        fresh = prepare(folder, fresh_model, *KINDS)
        expected = fresh.score(fresh_model, everything(fresh))
        assert harness.score(model, everything(harness)) == expected


def test_weights_are_never_frozen_into_compiled_code(folder, model):
    from torch._inductor import config

    harness = prepare(folder, model, "choice")
    harness.score(model, [0])
    assert not config.freezing


def test_tied_weights_are_one_and_untied_ones_stay_two(folder):
    tied = make_model(tie_word_embeddings=True)
    harness = prepare(folder, tied, "choice")
    before = harness.score(tied, [0, 1, 2])
    with torch.no_grad():
        tied.model.embed_tokens.weight.mul_(-0.5)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert harness.score(tied, [0, 1, 2]) != before
    untied = make_model()
    head = untied.lm_head.weight.clone()
    prepare(folder, untied, "choice")
    assert torch.equal(untied.lm_head.weight, head)
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


def test_a_model_in_training_mode_is_refused(folder, model):
    harness = prepare(folder, model, "choice")
    with pytest.raises(ObjectiveError, match="training mode"):
        harness.score(model.train(), [0])


def test_generation_settings_a_model_ships_with_change_nothing(folder, model):
    harness = prepare(folder, model, "answer")
    before = values_of(harness, model)
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.max_new_tokens = 1
    assert values_of(harness, model) == before
    assert model.generation_config.repetition_penalty == 9.0
