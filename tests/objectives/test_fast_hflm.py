"""``FastHFLM`` scores as ``HFLM``: over models, request types, lengths and weights."""

from __future__ import annotations

import math

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_reference import (
    ALL,
    difference,
    evaluated,
    fast,
    load_every_type,
    prompts,
    questions,
    rolling,
    scores,
    stock,
    texts,
    write_every_type,
)
from objectives.entries import TaskEntry
from objectives.harness.harness import Harness
from objectives.harness.tasks import load_tasks
from tiny_models import MODELS, make_model, make_tokenizer


def chosen(answers):
    """The best of each question's four."""
    fours = [answers[start : start + 4] for start in range(0, len(answers), 4)]
    return [max(range(4), key=lambda number, four=four: four[number][0]) for four in fours]


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_scores_as_under_lm_eval(name, caplog):
    model = make_model(name)
    ours, theirs = fast(model), stock(model)
    assert ours.modes == ALL, caplog.text
    found, expected = scores(ours, questions()), scores(theirs, questions())
    assert difference(found, expected) < 1e-4
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert chosen(found) == chosen(expected)
    assert texts(ours, prompts()) == texts(theirs, prompts())
    assert ours.loglikelihood_rolling(rolling(), disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(rolling(), disable_tqdm=True), abs=1e-3
    )


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma2", "Mixtral"])
def test_in_16_bits_scores_differ_by_rounding_alone(name):
    model = make_model(name, torch.bfloat16)
    ours = fast(model)
    assert ours.modes == ALL
    found, expected = scores(ours, questions()), scores(stock(model), questions())
    exact = scores(stock(make_model(name, torch.float32)), questions())
    assert difference(found, expected) < 0.25
    assert difference(found, exact) < 2 * difference(expected, exact) + 0.05
    assert chosen(found) == chosen(expected)


def test_the_model_reads_a_question_once_for_all_its_answers():
    model = make_model()
    read = []
    ours, theirs = fast(model), stock(model)
    model.get_input_embeddings().register_forward_hook(
        lambda _, ids, __: read.append(ids[0].numel())
    )
    long = [request for request in questions(40) if request.doc_id % 4 == 0]
    scores(theirs, long)
    before = sum(read)
    read.clear()
    scores(ours, long)
    assert sum(read) < before / 3


def test_a_text_is_encoded_once_for_its_snapshot_and_every_score(folder):
    model = make_model()
    tokenizer = make_tokenizer()
    tasks = load_tasks([TaskEntry(task="choice_shots")], [folder])
    harness = Harness(tasks, model=model, tokenizer=tokenizer)
    items = range(len(harness.items))
    harness.snapshots(items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFLM, "tok_encode", lambda *_, **__: pytest.fail("encoded again"))
        assert harness.score(model, items) == harness.score(model, items)
        harness.snapshots(items)


def test_scores_follow_weights_written_in_place():
    model = make_model()
    ours = fast(model)
    before = scores(ours, questions()), texts(ours, prompts())
    assert (scores(ours, questions()), texts(ours, prompts())) == before
    own = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-0.7)
    found = scores(ours, questions())
    assert difference(found, before[0]) > 0.1
    assert difference(found, scores(stock(model), questions())) < 1e-4
    assert texts(ours, prompts()) == texts(stock(model), prompts())
    model.load_state_dict(own)
    assert (scores(ours, questions()), texts(ours, prompts())) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_in_growing_blocks_chooses_what_scoring_at_once_does(dtype):
    ours = fast(make_model(dtype=dtype))
    requests = questions(24)
    whole = scores(ours, requests)
    parts = [
        answer
        for start, end in [(0, 4), (4, 20), (20, 52), (52, 96)]
        for answer in scores(ours, requests[start:end])
    ]
    assert chosen(parts) == chosen(whole)
    assert difference(parts, whole) < (1e-4 if dtype == torch.float32 else 0.25)
    assert scores(ours, requests) == whole, "the same requests must have the same values to the bit"


def test_a_prompt_too_long_loses_its_beginning_as_in_lm_eval():
    model = make_model()
    ours, theirs = fast(model, max_length=40), stock(model, max_length=40)
    assert difference(scores(ours, questions()), scores(theirs, questions())) < 1e-4
    assert texts(ours, prompts()) == texts(theirs, prompts())


def test_nan_is_the_score_of_the_question_that_has_it_alone():
    model = make_model()
    ours = fast(model)
    requests = [
        Instance("loglikelihood", {}, (f"{word}?", " b"), 0, ("t", doc, 1))
        for doc, word in enumerate(["ab", "aZ", "ac"])
    ]
    with torch.no_grad():
        model.get_input_embeddings().weight[make_tokenizer().encode("Z")[-1]] = math.nan
    assert [math.isnan(value) for value, _ in scores(ours, requests)] == [False, True, False]
    assert len(texts(ours, prompts())) == 8


@pytest.mark.parametrize(
    "changes",
    [{"do_sample": True, "temperature": 1.0}, {"num_beams": 2}, {"repetition_penalty": 1.5}],
)
def test_decoding_that_is_not_greedy_is_left_to_lm_eval(changes):
    model = make_model()
    requests = prompts(3, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = texts(fast(model), requests)
        torch.manual_seed(5)
        assert found == texts(stock(model), requests)


@pytest.mark.parametrize("changes", [{}, {"repetition_penalty": 1.5}])  # our decoding, lm-eval's
def test_generated_texts_come_with_their_number_of_tokens(changes):
    model, tokenizer = make_model(), make_tokenizer()
    until = ["bc", *"aeioAEIO0369"]
    requests, lengths = prompts(until=until, **changes), []
    for request in requests:
        prompt = tokenizer(request.args[0], return_tensors="pt")["input_ids"]
        settings = changes | {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 10}
        stops = {"stop_strings": [*until, "</s>"], "tokenizer": tokenizer}
        alone = model.generate(prompt, **settings, **stops)
        lengths.append(alone.shape[1] - prompt.shape[1])
    found = fast(model).generate_counted(requests)
    assert [count for _, count in found] == lengths
    assert [text for text, _ in found] == texts(stock(model), requests)
    assert len(set(lengths)) > 2


def test_generation_settings_of_the_model_are_obeyed_as_in_lm_eval():
    model = make_model()
    ours = fast(model)
    plain = texts(ours, prompts())
    model.generation_config.repetition_penalty = 3.0
    changed = texts(ours, prompts())
    assert changed != plain
    assert changed == texts(stock(model), prompts())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_every_type(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("data"))
        yield folder


@pytest.mark.parametrize("chat", [False, True])
def test_simple_evaluate_gives_every_item_the_same_value(folder, chat):
    model = make_model()
    tasks = load_every_type(folder)
    ours, theirs = (evaluated(lm, tasks, chat).values for lm in (fast(model), stock(model)))
    perplexities = [key for key in theirs if key[2] == "word_perplexity"]
    assert len(perplexities) == 20
    for key in perplexities:
        assert ours.pop(key) == pytest.approx(theirs.pop(key), rel=1e-5)
    assert ours == theirs
    assert len(theirs) >= 100
