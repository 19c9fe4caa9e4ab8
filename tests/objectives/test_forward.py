"""Forward passes with shortcuts on and off."""

import math
from dataclasses import fields, replace

import pytest

from lm_eval_reference import difference, fast, prompts, questions, scores, stock, texts
from objectives.inference.forward import Modes, plain_length
from tiny_models import make_model


@pytest.mark.parametrize("shortcut", [field.name for field in fields(Modes)][1:])
def test_without_any_one_shortcut_scores_are_the_same(shortcut):
    model = make_model()
    ours, theirs = fast(model), stock(model)
    ours.use_modes(replace(ours.modes, **{shortcut: False}))
    assert difference(scores(ours, questions()), scores(theirs, questions())) < 1e-4
    assert texts(ours, prompts()) == texts(theirs, prompts())


def test_the_last_mlp_runs_at_answer_tokens_only():
    model = make_model()
    ours = fast(model)
    read = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, given, __: read.append(given[0].numel()))
    letters = [request for request in questions(40) if request.doc_id % 4 == 1]
    scores(ours, letters)
    assert 0 < sum(read[1::2]) < sum(read[::2]) / 8


def test_plain_length_ends_at_sliding_windows_and_dynamic_position_embeddings():
    assert plain_length(make_model().config) == math.inf
    assert plain_length(make_model("Mistral").config) == 48
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 128
    assert plain_length(make_model(rope_parameters=rope).config) == 128
