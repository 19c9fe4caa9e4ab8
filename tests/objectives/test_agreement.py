"""Which shortcuts are on for which models."""

import torch
import transformers

from lm_eval_reference import ALL, difference, fast, prompts, questions, scores, stock, texts
from objectives.inference.forward import Modes
from tiny_models import make_model


def test_eager_attention_has_every_shortcut(caplog):
    model = make_model(attn_implementation="eager")
    assert fast(model).modes == ALL, caplog.text
    assert difference(scores(fast(model), questions()), scores(stock(model), questions())) < 1e-4


def test_a_recurrent_model_is_evaluated_without_trees_and_prefixes(caplog):
    small = {"state_size": 4, "num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 99}
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**small)).eval()
    ours = fast(model)
    assert ours.modes.scoring
    assert not ours.modes.tree
    assert not ours.modes.prefix
    assert "without answers as branches of one token tree" in caplog.text
    assert difference(scores(ours, questions(4)), scores(stock(model), questions(4))) < 1e-4


def test_a_model_without_causal_attention_is_left_to_lm_eval(caplog):
    model = make_model(is_causal=False)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    ours = fast(model)
    assert ours.modes == Modes()
    assert "without batches ordered by length" in caplog.text
    assert scores(ours, questions(4)) == scores(stock(model), questions(4))
    assert texts(ours, prompts(3)) == texts(stock(model), prompts(3))


def test_an_encoder_decoder_is_left_to_lm_eval(caplog):
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
