"""A user's own objective is checked, and errors name it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from objectives.base import Item, ItemResult, ItemSnapshot, Objective, ObjectiveError, Response
from objectives.entries import PluginEntry
from objectives.plugin import Plugin, Suite


class Fixed:
    """Gives each item a fixed value."""

    def __init__(self, model, tokenizer, name="fixed", values=(0.0, 1.0, 0.5), weight=4.0):
        self.tasks = {name: weight}
        self.items = [Item(name, f"{name}{row}", row) for row in range(len(values))]
        self.values = values

    def snapshots(self, items):
        return [ItemSnapshot(f"item {number}", "") for number in items]

    def score(self, model, items):
        return [ItemResult(self.values[number]) for number in items]


class Unscored:
    def __init__(self, model, tokenizer):
        self.tasks, self.items = {}, []


class Short(Fixed):
    def score(self, model, items):
        return [ItemResult(1.0)]


class Bare(Fixed):
    def score(self, model, items):
        return [self.values[number] for number in items]


class Raising(Fixed):
    def score(self, model, items):
        raise KeyError("missing")


class Tuned(Fixed):
    """Has the losses that a test gives it."""

    def __init__(self, model, tokenizer, losses=None, **settings):
        super().__init__(model, tokenizer, **settings)
        self.losses = losses

    def loss(self, model, items):
        return model.weight[0, items] if self.losses is None else self.losses


class Inheriting(Fixed, Objective):
    pass


def plugin(made, **options):
    return Plugin(
        PluginEntry(objective=f"{__name__}:{made}", options=options, weight=2.0), None, None
    )


def test_objectives_in_a_suite_keep_their_own_items_in_any_order():
    first, second = plugin("Fixed", name="a"), plugin("Fixed", name="b", values=(0.25, 0.75))
    suite = Suite([first, second])
    assert suite.tasks == {"a": 2.0, "b": 2.0}
    assert [item.task for item in suite.items] == ["a", "a", "a", "b", "b"]
    answers = suite.score(None, [4, 0, 3, 1])
    assert [answer.value for answer in answers] == [0.75, 0.0, 0.25, 1.0]
    assert [each.prompt for each in suite.snapshots([4, 0])] == ["item 1", "item 0"]


def test_a_task_in_two_objectives_is_refused():
    with pytest.raises(ObjectiveError, match="'fixed' is listed twice"):
        Suite([plugin("Fixed"), plugin("Fixed")])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_colon", "write it as package.module:Class"),
        ("no_such_module:Class", "No module named 'no_such_module'; install it, or put its folder"),
        (f"{__name__}:Nothing", "has no Nothing"),
        (f"{__name__}:__name__", "is a str, not a class"),
        (f"{__name__}:Unscored", "has no snapshots, score; see objectives.base.Objective"),
    ],
)
def test_a_name_that_is_no_objective_is_refused(path, message):
    with pytest.raises(ObjectiveError, match=message):
        Plugin(PluginEntry(objective=path), None, None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Fixed", {"wieght": 3}, "could not be made: TypeError: .*wieght"),
        ("Fixed", {"weight": 0}, "give at least one, each a positive weight"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ObjectiveError, match=message):
        plugin(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Short", {}, "gave 1 results for 2 items"),
        ("Bare", {}, "one of them 0.0; give one objectives.base.ItemResult"),
        ("Fixed", {"values": (math.nan, 1.0)}, "one of them ItemResult.value=nan"),
        ("Raising", {}, "score: KeyError: 'missing'"),
    ],
)
def test_invalid_results_fail_the_model(name, options, message):
    with pytest.raises(ObjectiveError, match=message):
        plugin(name, **options).score(None, [0, 1])


def test_losses_of_a_suite_are_those_of_its_parts_in_the_items_order():
    model = nn.Linear(3, 1).double()
    suite = Suite([plugin("Tuned", name="a"), plugin("Fixed", name="b"), plugin("Tuned", name="c")])
    assert suite.targets([7, 4, 0]) == ["", None, ""]
    assert suite.right_answers(model, [7, 4, 0]) == [None] * 3
    losses = suite.loss(model, [7, 2, 0, 7], [""] * 4)
    assert losses.dtype == torch.float32
    assert losses.tolist() == model.weight[0, [1, 2, 0, 1]].float().tolist()
    (gradient,) = torch.autograd.grad(losses.sum(), model.weight)
    assert gradient.tolist() == [[1, 2, 1]]
    with pytest.raises(ObjectiveError, match="has no loss; add one, or tune without gradients"):
        suite.loss(model, [4], [""])


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([0.5, 0.5], re.escape("loss gave [0.5, 0.5]; return a tensor with one finite number")),
        (torch.ones(2, dtype=torch.long), "loss gave tensor"),
        (torch.ones(2, 1), re.escape("loss gave a tensor of shape (2, 1)")),
        (torch.tensor([1.0, math.nan]), re.escape("loss gave [1.0, nan]")),
        (torch.ones(2), "loss gave losses without gradients"),
    ],
)
def test_invalid_losses_are_refused(losses, message):
    model = nn.Linear(3, 1)
    objective = plugin("Tuned", losses=losses)
    with pytest.raises(ObjectiveError, match=message):
        objective.loss(model, [0, 1], ["", ""])


def test_losses_need_no_gradients_of_a_model_that_has_none():
    found = plugin("Tuned").loss(nn.Linear(3, 1).requires_grad_(False), [0, 1], ["", ""])
    assert not found.requires_grad


def test_methods_left_out_by_a_class_that_inherits_the_protocol_are_missing():
    objective = plugin("Inheriting")
    assert objective.respond(None, [0, 1]) == [Response(), Response()]
    assert objective.targets([0, 1]) == [None, None]


def test_readmes_objective_scores_a_model(zoo, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "objectives" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_module.py").write_text(code)
    (tmp_path / "pairs.tsv").write_text("aab\tzzz\nzzz\taab\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(zoo / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(zoo / "base")
    spec = PluginEntry(objective="my_module:Grammar", options={"file": str(tmp_path / "pairs.tsv")})
    objective = Plugin(spec, model, tokenizer)
    first, turned = objective.score(model, [0, 1])
    assert first.margin == -turned.margin != 0
    assert first.value + turned.value == 1
    assert [each.gold for each in objective.snapshots([0, 1])] == ["aab", "zzz"]
    losses = objective.loss(model, [0, 1], objective.targets([0, 1]))
    assert losses.requires_grad
    assert (losses[0] - losses[1]).item() == pytest.approx(turned.margin, rel=1e-4)
