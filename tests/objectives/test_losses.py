"""Losses are those of plain forward passes, on prompts as scored; labels are judged right."""

from __future__ import annotations

import pytest
import torch

from objectives.entries import TaskEntry
from objectives.harness.prompts import Prompting
from tiny_models import chat_tokenizer, make_tokenizer
from tiny_tasks import ANSWER, CHOICE, everything, mean_of, prepare, write_task

END = 2  # the end-of-text token
STRIPPED = [
    {
        "name": "stripped",
        "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
    }
]


def loglik(model, prompt: str, answer: str | list[int]) -> torch.Tensor:
    """The log-likelihood of an answer by a forward pass of its own."""
    tokenizer = make_tokenizer()
    before = tokenizer.encode(prompt) or [tokenizer.bos_token_id]
    after = tokenizer.encode(answer) if isinstance(answer, str) else answer
    log_probs = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(log_probs[len(before) - 1 + n, token] for n, token in enumerate(after))


def losses_of(harness, model, items=None):
    items = everything(harness) if items is None else items
    labels = harness.targets(items)
    assert None not in labels
    return harness.loss(model, items, labels)


def rows_of(harness):
    return [question.requests[0].doc for question in harness.questions]


def close(ours, theirs):
    return torch.allclose(ours, torch.stack([*theirs]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_bytes", "acc_mutual_info"])
def test_loss_of_choices_is_the_cross_entropy_of_what_the_metric_compares(folder, model, metric):
    write_task(
        folder, "choices", **CHOICE | {"metric_list": mean_of(metric), "target_delimiter": "é"}
    )
    harness = prepare(folder, model, TaskEntry(task="choices", metric=metric))
    expected = []
    for row in rows_of(harness):
        scores = torch.stack([loglik(model, row["question"], f"é{c}") for c in row["choices"]])
        if metric == "acc_norm":
            scores = scores / torch.tensor([len(c) for c in row["choices"]])
        if metric == "acc_bytes":
            scores = scores / torch.tensor([len(c.encode()) for c in row["choices"]])
        if metric == "acc_mutual_info":
            scores = scores - torch.stack([loglik(model, "", f"é{c}") for c in row["choices"]])
        expected.append(-scores.log_softmax(0)[row["gold"]])
    assert close(losses_of(harness, model), expected)


def ways_to_end(model, prompt, text, stop="\n"):
    """Minus the log of the probability that a model writes a text and nothing more."""
    tokens = make_tokenizer().encode(text)
    ends = [END, *make_tokenizer().encode(stop)]
    return -torch.stack([loglik(model, prompt, [*tokens, end]) for end in ends]).logsumexp(0)


def test_loss_of_a_written_answer_is_minus_the_log_of_its_probability(folder, model):
    harness = prepare(folder, model, "answer")
    rows = rows_of(harness)
    # the metric judges an answer behind a space wrong, so the label has none
    assert harness.targets(everything(harness)) == [row["answer"] for row in rows]
    expected = [
        loglik(model, row["question"], row["answer"]) * -1
        if len(row["answer"]) == 6  # as long as it may be
        else ways_to_end(model, row["question"], row["answer"])
        for row in rows
    ]
    assert close(losses_of(harness, model), expected)


def test_a_delimiter_stands_before_a_target_where_the_metric_allows_it(folder, model):
    write_task(folder, "stripped", **ANSWER | {"filter_list": STRIPPED})
    harness = prepare(folder, model, "stripped")
    rows = rows_of(harness)
    # six tokens at most: a space and six letters are cut, and then wrong
    expected = [f" {row['answer']}"[: 6 + (len(row["answer"]) < 6)] for row in rows]
    assert harness.targets(everything(harness)) == [
        text if text[1:] == row["answer"] else row["answer"]
        for text, row in zip(expected, rows, strict=True)
    ]
    chat = prepare(folder, model, "stripped", tokenizer=chat_tokenizer(), prompting=Prompting(True))
    assert chat.targets(everything(chat)) == [row["answer"] for row in rows]
    found = losses_of(chat, model, [0])
    assert close(found, [ways_to_end(model, f"<user>{rows[0]['question']}!", "no")])
