"""Losses are those of plain forward passes, on prompts as scored; labels are judged right."""

from __future__ import annotations

import pytest
import torch
from tokenizers import decoders
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from in_memory import IN_MEMORY
from merge_engine.building.builder import Builder
from merge_engine.building.recipe_gradient import RecipeGradient
from merge_engine.building.units import Units
from merge_engine.models.model_set import ModelSet
from merge_engine.recipe.recipe_file import parse_recipe
from objectives.base import ObjectiveError
from objectives.entries import TaskEntry, TextEntry
from objectives.harness.encoding import Prompting
from objectives.inference.forward import Modes
from tiny_models import chat_tokenizer, make_model, make_tokenizer, tiny_tokenizer
from tiny_tasks import (
    ANSWER,
    CHOICE,
    everything,
    greedy_answer,
    mean_of,
    prepare,
    write_rows,
    write_task,
)

END = 2  # the end-of-text token


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
        -loglik(model, row["question"], row["answer"])
        if len(row["answer"]) == 6  # as long as it may be
        else ways_to_end(model, row["question"], row["answer"])
        for row in rows
    ]
    assert close(losses_of(harness, model), expected)


def test_a_delimiter_stands_before_a_target_where_the_metric_ignores_it(folder, model):
    strip = {"filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
    task = ANSWER | {"filter_list": [{"name": "stripped", **strip}]}
    task["generation_kwargs"] = task["generation_kwargs"] | {"max_gen_toks": 9}
    write_task(folder, "stripped", **task)
    harness = prepare(folder, model, "stripped")
    answers = [row["answer"] for row in rows_of(harness)]
    assert harness.targets(everything(harness)) == [f" {answer}" for answer in answers]
    settings = {"tokenizer": chat_tokenizer(), "prompting": Prompting(apply_chat_template=True)}
    chat = prepare(folder, model, "stripped", **settings)
    assert chat.targets(everything(chat)) == answers
    prompt = f"<user>{rows_of(chat)[0]['question']}!"
    assert close(losses_of(chat, model, [0]), [ways_to_end(model, prompt, answers[0])])


def test_losses_of_given_answers_are_minus_their_log_likelihoods(folder, model):
    write_task(
        folder,
        "given",
        output_type="loglikelihood",
        dataset_kwargs={"data_files": {"test": "answer.jsonl"}},
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        metric_list=mean_of("acc"),
    )
    harness = prepare(folder, model, "given")
    expected = [-loglik(model, row["question"], row["answer"]) for row in rows_of(harness)]
    assert close(losses_of(harness, model), expected)


def test_loss_of_text_is_per_byte_and_windows_are_those_that_are_scored(folder, tmp_path):
    model = make_model(max_position_embeddings=24)
    texts = ["short", "a text of more tokens than the context has, 24 of them", "\u00e9t\u00e9"]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    text = TextEntry(text=(tmp_path / "text.txt",), name="text", unit="line")
    harness = prepare(folder, model, text)
    losses = losses_of(harness, model)
    margins = torch.tensor([result.margin for result in harness.score(model, range(3))])
    assert torch.allclose(losses, -margins, atol=1e-5)
    plain = -loglik(model, "", texts[0]) / len(texts[0])
    assert close(losses[:1], [plain])


def test_several_correct_choices_share_the_numerator(folder, model):
    rows = [
        {"question": "ab?", "choices": ["a", "bc", "d"], "gold": [0, 2]},
        {"question": "abc?", "choices": ["a", "bc", "d"], "gold": [0, 1, 2]},
        {"question": "abcd?", "choices": ["a", "bc", "d"], "gold": [5]},
    ]
    write_rows(folder / "several.jsonl", rows)
    data = {"dataset_kwargs": {"data_files": {"test": "several.jsonl"}}}
    write_task(folder, "several", **CHOICE | data)
    harness = prepare(folder, model, "several")
    assert harness.targets([0, 1, 2]) == ["", None, None]
    scores = torch.stack([loglik(model, "ab?", f" {each}") for each in rows[0]["choices"]])
    expected = scores.logsumexp(0) - scores[[0, 2]].logsumexp(0)
    assert close(harness.loss(model, [0], [""]), [expected])


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2", "Mixtral"])
def test_losses_are_the_scorers_values_to_rounding(folder, name):
    model = make_model(name)
    harness = prepare(folder, model, "choice_shots", "answer")
    scorer, found = harness.language_model.scorer, {}

    def planned(requests):
        requests = [*requests]
        found["scored"] = [value for value, _ in scorer.score_requests(requests)]
        return torch.tensor(found["scored"])

    items = everything(harness)
    labels = harness.targets(items)
    losses = harness.loss(model, items, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.language_model, "differentiable_loglikelihoods", planned)
        expected = harness.loss(model, items, labels)
    assert len(found["scored"]) > len(items)
    assert torch.allclose(losses, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(losses, harness.loss(model, items, labels))


JUDGED = """def judge(doc, results):
    return {"exact_match": float(ord(results[0][-1:] or "y") % 2 == 0)}
"""


def test_right_answers_of_the_model_are_labels_of_tasks_without_targets(folder, model):
    (folder / "judged.py").write_text(JUDGED)
    wrong = "{{'y' * (1 + question | length % 3)}}"
    for name, target in {"judged": wrong, "placeholder": "z"}.items():
        write_task(folder, name, **ANSWER | {"doc_to_target": target})
        with (folder / f"{name}.yaml").open("a") as file:
            file.write("process_results: !function judged.judge\n")
    harness = prepare(folder, model, "judged", "placeholder", "choice")
    items = everything(harness)
    judged = [number for number in items if harness.items[number].generated]
    assert set(harness.targets(judged)) == {None}
    answers = harness.right_answers(model, items)
    texts = [response.text for response in harness.respond(model, items)]
    values = [result.value for result in harness.score(model, items)]
    expected = [
        text if value == 1 and number in judged else None
        for number, text, value in zip(items, texts, values, strict=True)
    ]
    assert answers == expected
    labelled = [number for number in judged if answers[number] is not None]
    assert 0 < len(labelled) < len(judged)
    losses = harness.loss(model, labelled, [answers[number] for number in labelled])
    others = harness.loss(model, labelled, ["zzzz"] * len(labelled))
    assert (losses < others).all(), "the model's own answer is the likeliest"


MASS = """from math import exp

def correct(doc, results):
    likely = [exp(loglik) for loglik, _ in results]
    return {"acc": likely[doc["gold"]] / sum(likely)}

def wrong(doc, results):
    return {"acc": 1 - correct(doc, results)["acc"]}
"""


def test_correct_choices_are_labels_where_a_tasks_own_code_says_so(folder, model):
    (folder / "mass.py").write_text(MASS)
    for name in ("correct", "wrong"):
        write_task(folder, name, **CHOICE | {"metric_list": mean_of("acc")})
        with (folder / f"{name}.yaml").open("a") as file:
            file.write(f"process_results: !function mass.{name}\n")
    harness = prepare(folder, model, "correct", "wrong")
    count = len(harness.items) // 2
    assert harness.targets(everything(harness)) == [""] * count + [None] * count
    losses = harness.loss(model, range(count), [""] * count)
    values = torch.tensor([each.value for each in harness.score(model, range(count))])
    assert torch.allclose((-losses).exp(), values, atol=1e-5)


def test_an_answer_of_no_text_is_a_label(folder, model):
    write_task(folder, "silent", **ANSWER | {"doc_to_target": "{{answer if answer == 'no'}}"})
    harness = prepare(folder, model, "silent")
    rows = rows_of(harness)
    number = next(n for n, row in enumerate(rows) if row["answer"] != "no")
    assert harness.targets([number]) == [""]
    assert close(
        losses_of(harness, model, [number]), [ways_to_end(model, rows[number]["question"], "")]
    )


def test_a_target_that_cannot_be_written_within_the_limit_is_no_label(folder, model):
    rows = [{"question": "a?", "answer": text} for text in ("sixsix", "seven77", "a\nb", "ok")]
    write_rows(folder / "long.jsonl", rows)
    data = {"dataset_kwargs": {"data_files": {"test": "long.jsonl"}}}
    write_task(folder, "long", **ANSWER | data)
    harness = prepare(folder, model, "long")
    assert harness.targets(range(4)) == ["sixsix", None, None, "ok"]


def test_prompts_that_do_not_fit_lose_their_beginning_as_in_generation(folder):
    model = make_model(max_position_embeddings=18)
    harness = prepare(folder, model, "answer")
    row = next(n for n, each in enumerate(rows_of(harness)) if len(each["question"]) > 12)
    (found,) = losses_of(harness, model, [row])
    prompt, answer = rows_of(harness)[row]["question"][-12:], rows_of(harness)[row]["answer"]
    assert close(found[None], [ways_to_end(model, prompt, answer)])


def test_wrong_models_and_items_are_refused(folder, model):
    harness = prepare(folder, model, "choice")
    with pytest.raises(ObjectiveError, match="another model"):
        harness.loss(make_model(), [0], [""])
    with pytest.raises(ObjectiveError, match="training mode"):
        harness.loss(model.train(), [0], [""])
    with pytest.raises(ObjectiveError, match="item 99 does not exist"):
        harness.loss(model.eval(), [99], [""])
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ObjectiveError, match="task 'choice', doc 0: its loss is not a number"):
        harness.loss(model, [0], [""])


def test_models_without_batches_of_ours_have_no_losses(folder, model):
    harness = prepare(folder, model, "choice", "answer")
    harness.language_model.use_modes(Modes())
    assert set(harness.targets(everything(harness))) == {None}
    assert set(harness.right_answers(model, everything(harness))) == {None}
    with pytest.raises(ObjectiveError, match="tune without gradients"):
        harness.loss(model, [0], [""])


class HarnessLoss(nn.Module):
    """The losses as a module, so that autograd can look through other values of its weights."""

    def __init__(self, harness):
        super().__init__()
        self.model, self.harness = harness.language_model.model, harness

    def forward(self, items, labels):
        return self.harness.loss(self.model, items, labels)


class Family:
    """A live model of a base and three donors, two tasks, and their items that have labels."""

    def __init__(self, zoo, folder):
        self.paths = [str(zoo / name) for name in ("base", *"abc")]
        self.models = ModelSet.open(self.paths)
        self.models.place(torch.device("cpu"), IN_MEMORY)
        model = AutoModelForCausalLM.from_pretrained(zoo / "base", dtype=torch.float32).eval()
        self.harness = prepare(folder, model, "choice", "answer", tokenizer=tiny_tokenizer())
        self.builder, self.units = Builder(model, self.models), Units.of_tensors(self.models.names)
        targets = self.harness.targets(everything(self.harness))
        self.labels = {n: label for n, label in enumerate(targets) if label is not None}

    def build(self, weights):
        base, *donors = self.paths
        models = [
            {"model": donor, "parameters": {"weight": self._by_tensor(weights[:, column])}}
            for column, donor in enumerate(donors)
        ]
        mapping = {"merge_method": "task_arithmetic", "base_model": base, "models": models}
        self.builder.build(parse_recipe(mapping, "r.yaml")[0])

    def _by_tensor(self, weights):
        filters = zip(self.units.filters, weights.tolist(), strict=True)
        return [{"filter": name, "value": weight} for (name,), weight in filters]

    def loss(self, items):
        labels = [self.labels[number] for number in items]
        return self.harness.loss(self.harness.language_model.model, items, labels)

    def merged(self, weights):
        base, *donors = self.paths
        found = {}
        for name, unit in self.units.index.items():
            origin = self.models.read(base, name)
            deltas = [self.models.read(donor, name) - origin for donor in donors]
            found[f"model.{name}"] = origin + sum(map(torch.mul, weights[unit], deltas))
        return found


@pytest.fixture
def family(zoo, folder):
    return Family(zoo, folder)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_of_a_recipe_is_that_of_autograd_through_the_merge(family, recompute):
    torch.manual_seed(0)
    weights = torch.rand(len(family.units), 3, requires_grad=True)
    items = [*family.labels][::3]
    assert {family.labels[number] for number in items} >= {"", "no"}
    module = HarnessLoss(family.harness)
    losses = functional_call(
        module, family.merged(weights), (items, [family.labels[number] for number in items])
    )
    (expected,) = torch.autograd.grad(losses.mean(), weights)
    family.build(weights)
    gradient = RecipeGradient(family.builder, family.units, batch=5, recompute=recompute)
    values, found = gradient.values_and_grad(family.loss, items)
    assert torch.allclose(values.float(), losses, rtol=1e-4, atol=1e-5)
    assert (found.float() - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_few_steps_from_uniform_weights_lower_the_loss(family):
    weights = nn.Parameter(torch.full((len(family.units), 3), 1 / 3, dtype=torch.float64))
    optimizer = torch.optim.Adam([weights], lr=0.3)
    gradient = RecipeGradient(family.builder, family.units, batch=64)
    items, path = [*family.labels], []
    for _ in range(6):
        family.build(weights.detach())
        losses, weights.grad = gradient.values_and_grad(family.loss, items)
        path.append(losses.mean().item())
        optimizer.step()
    assert path[-1] < 0.95 * path[0]


def test_a_first_space_that_decoding_loses_is_put_back_into_a_right_answer(folder, model):
    tokenizer = make_tokenizer()
    plain = make_tokenizer()
    strip = decoders.Strip(" ", 1, 0)  # as of Llama 2
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), strip])
    prompts = [row["question"] for row in rows_of(prepare(folder, model, "answer"))]
    begins = [plain.encode(greedy_answer(model, plain, prompt)[:1]) for prompt in prompts]
    often, space = max(begins, key=begins.count)[0], plain.encode(" ")[0]
    with torch.no_grad():  # it writes a space where it wrote its favourite letter
        model.lm_head.weight[[often, space]] = model.lm_head.weight[[space, often]]
    written = [greedy_answer(model, plain, prompt) for prompt in prompts]
    (folder / "anything.py").write_text("def judge(doc, results): return {'exact_match': 1.0}")
    write_task(folder, "anything", **ANSWER)
    with (folder / "anything.yaml").open("a") as file:
        file.write("process_results: !function anything.judge\n")
    harness = prepare(folder, model, "anything", tokenizer=tokenizer)
    found = harness.right_answers(model, everything(harness))
    whole = [n for n, text in enumerate(written) if len(text) == 6]  # no special token is in it
    assert [found[number] for number in whole] == [written[number] for number in whole]
    assert {found[number].startswith(" ") for number in whole} == {True, False}
