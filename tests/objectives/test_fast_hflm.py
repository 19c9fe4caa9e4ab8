"""The fast scorer gives lm-eval's answers: over models, request types, lengths and weights."""

from __future__ import annotations

import logging
import math
import random
from dataclasses import fields, replace

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_reference import evaluated, fast, load_every_type, stock, write_every_type
from objectives.entries import TaskEntry
from objectives.harness.harness import Harness
from objectives.harness.tasks import load_tasks
from objectives.inference.forward import plain_length
from objectives.inference.modes import Modes
from tiny_models import MODELS, make_model, make_tokenizer

ALL = Modes(*[True] * len(fields(Modes)))


def questions(count=16):
    """Long answers, letters, contexts that differ early, no context; most behind one beginning."""
    draw = random.Random(0)

    def text(least, most):
        return "".join(draw.choices("abcdefgh ", k=draw.randint(least, most))).strip() or "a"

    examples = f"examples: {text(30, 40)} "
    requests = []
    for doc in range(count):
        context = (examples if doc % 5 else "") + text(5, 30) + "?"
        for answer in range(4):
            arguments = [
                (context, f" {text(1, 20)}"),
                (context, " " + "abcd"[answer]),
                (f"{context} {text(1, 5)}", " and the rest"),
                ("" if answer % 2 else context, f" {text(1, 9)}"),
            ][doc % 4]
            requests.append(Instance("loglikelihood", {}, arguments, answer, ("t", doc, 1)))
    return requests


def prompts(count=8, **settings):
    of_doc = {request.doc_id: request.args[0] or "a" for request in questions(count)}
    wanted = {"until": ["a", "bc"], "max_gen_toks": 10, "do_sample": False} | settings
    return [
        Instance("generate_until", {}, (prompt, wanted), 0, ("g", doc, 1))
        for doc, prompt in of_doc.items()
    ]


def rolling():
    texts = [("ab cd " * count)[:-1] for count in (2, 30, 90)]  # the last is longer than a window
    return [
        Instance("loglikelihood_rolling", {}, (t,), 0, ("r", n, 1)) for n, t in enumerate(texts)
    ]


def scores(language_model, requests):
    return language_model.loglikelihood(requests, disable_tqdm=True)


def texts(language_model, requests):
    return language_model.generate_until(requests, disable_tqdm=True)


def chosen(answers):
    """The best of each question's four."""
    fours = [answers[start : start + 4] for start in range(0, len(answers), 4)]
    return [max(range(4), key=lambda number, four=four: four[number][0]) for four in fours]


def difference(ours, theirs):
    return max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.ERROR)
    monkeypatch.setattr("lm_eval.models.huggingface.tqdm", lambda items=(), **_: _NoBar(items))


class _NoBar(list):
    def update(self, count):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("name", MODELS)
def test_every_model_answers_as_it_answers_lm_eval(name, caplog):
    model = make_model(name)
    ours, theirs = fast(model), stock(model)
    assert ours.modes == ALL, caplog.text
    found, expected = scores(ours, questions()), scores(theirs, questions())
    assert difference(found, expected) < 1e-4
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert chosen(found) == chosen(expected)
    assert texts(ours, prompts()) == texts(theirs, prompts())
    assert ours.loglikelihood_rolling(rolling()) == pytest.approx(
        theirs.loglikelihood_rolling(rolling()), abs=1e-3
    )


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma2", "Mixtral"])
def test_in_16_bits_answers_differ_by_rounding_alone(name):
    model = make_model(name, torch.bfloat16)
    ours = fast(model)
    assert ours.modes == ALL
    found, expected = scores(ours, questions()), scores(stock(model), questions())
    exact = scores(stock(make_model(name, torch.float32)), questions())
    assert difference(found, expected) < 0.25
    assert difference(found, exact) < 2 * difference(expected, exact) + 0.05
    assert chosen(found) == chosen(expected)


def test_attention_that_is_not_fused_is_asked_the_same_way(caplog):
    model = make_model(attn_implementation="eager")
    assert fast(model).modes == ALL, caplog.text
    assert difference(scores(fast(model), questions()), scores(stock(model), questions())) < 1e-4


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


def test_a_text_is_encoded_once_for_what_is_shown_and_for_every_score(folder):
    model = make_model()
    tokenizer = make_tokenizer()
    tasks = load_tasks([TaskEntry(task="choice_shots")], [folder])
    harness = Harness.prepare(tasks, model=model, tokenizer=tokenizer)
    items = range(len(harness.items))
    harness.snapshots(items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFLM, "tok_encode", lambda *_, **__: pytest.fail("encoded again"))
        assert harness.score(model, items) == harness.score(model, items)
        harness.snapshots(items)


def test_answers_follow_weights_written_in_place():
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


def test_nan_is_an_answer_and_stays_with_the_question_that_has_it():
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
def test_a_text_says_how_many_tokens_it_took(changes):
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


def test_decoding_settings_of_the_model_are_obeyed_as_in_lm_eval():
    model = make_model()
    ours = fast(model)
    plain = texts(ours, prompts())
    model.generation_config.repetition_penalty = 3.0
    changed = texts(ours, prompts())
    assert changed != plain
    assert changed == texts(stock(model), prompts())


def test_a_model_with_a_state_is_asked_without_branches_and_prefixes(caplog):
    small = {"state_size": 4, "num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 99}
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**small)).eval()
    ours = fast(model)
    assert ours.modes.scoring
    assert not ours.modes.tree
    assert not ours.modes.prefix
    assert "without answers as branches of one token tree" in caplog.text
    assert difference(scores(ours, questions(4)), scores(stock(model), questions(4))) < 1e-4


def test_a_model_that_sees_what_follows_is_left_to_lm_eval(caplog):
    model = make_model(is_causal=False)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    ours = fast(model)
    assert ours.modes == Modes()
    assert "without batches ordered by length" in caplog.text
    assert scores(ours, questions(4)) == scores(stock(model), questions(4))
    assert texts(ours, prompts(3)) == texts(stock(model), prompts(3))


@pytest.mark.parametrize("way", [field.name for field in fields(Modes)][1:])
def test_without_any_one_way_answers_are_the_same(way):
    model = make_model()
    ours, theirs = fast(model), stock(model)
    ours.use_modes(replace(ours.modes, **{way: False}))
    assert difference(scores(ours, questions()), scores(theirs, questions())) < 1e-4
    assert texts(ours, prompts()) == texts(theirs, prompts())


def test_a_model_that_encodes_first_is_left_to_lm_eval(caplog):
    config = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=99, decoder_start_token_id=0, eos_token_id=2, pad_token_id=0, **config
        )
    ).eval()
    ours, theirs = fast(model, max_length=256), stock(model, max_length=256)
    assert ours.modes == Modes()
    assert "not a causal language model" in caplog.text
    assert scores(ours, questions(8)) == scores(theirs, questions(8))
    assert texts(ours, prompts(3)) == texts(theirs, prompts(3))


def test_the_last_mlp_reads_the_places_of_answers_alone():
    model = make_model()
    ours = fast(model)
    read = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, given, __: read.append(given[0].numel()))
    letters = [request for request in questions(40) if request.doc_id % 4 == 1]
    scores(ours, letters)
    assert 0 < sum(read[1::2]) < sum(read[::2]) / 8


def test_lengths_beyond_which_a_model_attends_otherwise_are_known():
    assert plain_length(make_model().config) == math.inf
    assert plain_length(make_model("Mistral").config) == 48
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 128
    assert plain_length(make_model(rope_parameters=rope).config) == 128


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
