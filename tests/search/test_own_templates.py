"""Donors with chat templates of their own are scored under those, too."""

import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaForCausalLM

from search.cli import main
from search.preparing.context import load, plan_study
from search.preparing.cost import describe_cost
from search.preparing.models import Hardware
from search.preparing.own_templates import find_own_templates
from search.running.evaluator import under_own_templates
from search.running.workers import EvalJob, Worker
from search.storing.folder import CARD, DATABASE
from search.storing.result import read_result
from search.study.reading import load_study
from tiny_models import LETTERS, make_llama
from tiny_tasks import ANSWER, CHOICE, SHOTS, write_rows, write_task
from vocabularies import ENDS, make_with_tokens

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
RENAMING = PLAIN.replace("m.content", "m.content | replace('a', 'c') | replace('b', 'd')")
NAMED = "all under its own chat template"
ITEMS = {"search": 40, "select": 20, "test": 60}
# What a donor answers by the last letter of its prompt, and how surely. "all" answers every item
# under its own template, which has c for a, and half of them under the study's.
ANSWERS = {
    "base": {},
    "half": {"ax": 1.0, "by": -0.1},
    "all": {"az": 0.4, "ay": 0.1, "by": 1.0, "cx": 1.0, "dy": 1.0},
}


def write_model(folder, answers, template):
    """Write a llama that answers by its prompt's last letter, and then ends the text."""
    make_llama(folder, seed=0, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, numbers = LlamaForCausalLM.from_pretrained(folder), tokenizer.get_vocab()
    torch.manual_seed(1)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight.normal_()
        for index, letter in enumerate("abcdxyz"):
            embedding[numbers[letter]] = 5 * torch.eye(embedding.shape[1])[index]
        head = model.get_output_embeddings().weight.zero_()
        for layer in model.model.layers:  # the last token alone decides
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head[numbers["<eos>"]] = embedding[numbers["x"]] + embedding[numbers["y"]]
        for (last, answer), weight in answers.items():
            head[numbers[answer]] += weight * embedding[numbers[last]]
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    for name, answers in ANSWERS.items():
        # white space makes no other template
        template = {"all": RENAMING, "half": f"{PLAIN}\n"}.get(name, PLAIN)
        write_model(folder / name, answers, template)
    return folder


def rows_of(start, count):
    """Questions that end in a, answered by x, and in b, answered by y, in turn."""
    return [
        {
            "question": f"{number}={'ab'[number % 2]}",
            "answer": "xy"[number % 2],
            "choices": ["x", "y"],
            "gold": number % 2,
        }
        for number in range(start, start + count)
    ]


def write_study(family, folder, models=("half", "all"), **objective):
    tasks = folder / "tasks"
    tasks.mkdir(parents=True)
    write_rows(tasks / "answer.jsonl", rows_of(0, 80))
    write_rows(tasks / "choice.jsonl", rows_of(100, 80))
    write_rows(tasks / "shots.jsonl", rows_of(200, 30))
    write_task(tasks, "answer", **ANSWER)
    write_task(tasks, "choice", **CHOICE | SHOTS)
    contents = {
        "base_model": str(family / "base"),
        "models": [str(family / name) for name in models],
        "search": {"methods": ["task_arithmetic"], "trials": 6, "tune": False},
        "objective": {
            "include_path": "tasks",
            "tasks": [{"task": "answer"}, {"task": "choice"}],
            "items": ITEMS,
            "block": 10,
            "apply_chat_template": True,
            **objective,
        },
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(contents))
    return file


@pytest.fixture
def study(family, tmp_path):
    return lambda folder="study", **changes: write_study(family, tmp_path / folder, **changes)


def run(file, *options):
    out = file.parent / "run"
    assert main(["run", str(file), "--out", str(out), "--device", "cpu", *options]) == 0
    return out, read_result(out)


@pytest.fixture(scope="module")
def finished(family, tmp_path_factory):
    """The folder of a finished run, beside its study, and its result."""
    return run(write_study(family, tmp_path_factory.mktemp("finished") / "study"))


def test_donor_is_best_under_its_own_template_and_decides_the_verdict(finished, family):
    out, result = finished
    donor, lead = result.donors[str(family / "all")], result.difference_to_best_donor
    assert result.donors[str(family / "half")].own_template is None
    assert donor.own_template.test.tasks == {"answer": 1.0, "choice": 1.0}
    assert max(donor.test.tasks.values()) < 0.7
    assert result.winner.test.mean == 1.0  # it beats what donors get under the study's template
    assert donor.difference.ci95[0] > 0
    assert (lead.donor, lead.own_template, lead.mean) == (str(family / "all"), True, 0.0)
    assert result.verdict == "not better"
    page = " ".join((out / "report.html").read_text().split())
    card = (out / "checkpoint" / CARD).read_text()
    assert f"lead over {NAMED}, the best donor" in page
    assert f"lead over `{NAMED}`, the best donor" in card
    assert f"| donor {NAMED} | 100.0 |" in card


def stored(out):
    query = "select recipe, split, block, answers from mergesearch_answers"
    with sqlite3.connect(out / DATABASE) as database:
        return sorted(database.execute(query))


def under_own(rows):
    return [row for row in rows if "-" in row[0]]


def test_results_under_own_templates_are_stored_and_resumed(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0].parent, tmp_path / "study")
    before = stored(folder / "run")
    assert {split for _, split, *_ in under_own(before)} == {"search", "test"}
    with sqlite3.connect(folder / "run" / DATABASE) as database:  # as a kill leaves it
        database.execute(
            "delete from mergesearch_answers "
            "where recipe like '%-%' and split = 'test' and block > 2"
        )
    file = folder / "study.yaml"
    tasks = f"include_path: {finished[0].parent / 'tasks'}"
    file.write_text(file.read_text().replace("include_path: tasks", tasks))
    out, again = run(file)
    assert stored(out) == before
    assert again.donors == finished[1].donors
    assert again.times_tested == 1
    assert f"lead over {NAMED}, the best donor" in " ".join(capsys.readouterr().out.split())


def test_best_donor_is_sampled_under_its_own_template(finished, capsys):
    assert main(["sample", str(finished[0]), "--prompt", "1=a", "--device", "cpu"]) == 0
    assert f"{NAMED}:\n    x\n" in capsys.readouterr().out


def test_workers_of_ray_give_the_same_results(finished, study):
    pytest.importorskip("ray")
    out, result = run(study(), "--workers", "1")
    assert result.donors == finished[1].donors
    assert under_own(stored(out)) == under_own(stored(finished[0]))


def test_items_are_the_same_documents_with_the_same_examples(study, family):
    context = load(plan_study(load_study(study())), Hardware("cpu"))
    own = context.own_templates[str(family / "all")].objective
    numbers = range(len(context.objective.items))
    assert own.items == context.objective.items
    pairs = zip(context.objective.snapshots(numbers), own.snapshots(numbers), strict=True)
    for theirs, mine in pairs:
        assert mine.gold == theirs.gold
        question = theirs.prompt.split("\n")[0]
        assert mine.prompt.split("\n")[0] == question.replace("a", "c").replace("b", "d")


def test_worker_scores_and_responds_under_the_template_of_its_job(study, family):
    context = load(plan_study(load_study(study())), Hardware("cpu"))
    worker, donor = Worker(context), str(family / "all")
    one = under_own_templates(context)[donor]
    items = context.splits.test[:10]
    under = {t: worker.evaluate(EvalJob(one.recipe, items, t)).results for t in (None, donor)}
    assert all(result.value == 1 for result in under[donor])
    assert not all(result.value == 1 for result in under[None])
    answers = worker.respond(one.recipe, items, donor)
    assert [answer.text for answer in answers] == [answer.target for answer in answers]


def test_nothing_is_asked_twice_without_chat_templates_or_other_ones(study):
    assert not plan_study(load_study(study("same", models=["half"]))).own_templates
    plain = study("plain", apply_chat_template=False)
    assert not plan_study(load_study(plain)).own_templates


def test_cost_counts_the_items_under_own_templates(study):
    def cost(file):
        return int(describe_cost(plan_study(load_study(file))).split()[3].replace(",", ""))

    plain = study("plain", apply_chat_template=False)
    assert cost(study()) - cost(plain) == ITEMS["search"] + ITEMS["test"]


def test_template_that_cannot_be_rendered_is_left_out_with_a_warning(
    study, family, tmp_path, caplog
):
    broken = shutil.copytree(family / "half", tmp_path / "broken")
    (broken / "chat_template.jinja").write_text("{{ raise_exception('only for tools') }}")
    file = study(models=["half"])
    contents = yaml.safe_load(file.read_text()) | {"models": [str(broken)]}
    file.write_text(yaml.safe_dump(contents))
    context = load(plan_study(load_study(file)), Hardware("cpu"))
    assert not context.own_templates
    assert "is not scored under its own chat template" in caplog.text
    assert "only for tools" in caplog.text


CHATML = PLAIN.replace("{{ m.content }}", "<|im_start|>{{ m.content }}<|im_end|>")
MARKERS = ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("added", "tokenizer", "own", "split_up"),
    [
        (["<x>", "<z>"], None, True, ()),  # the donor has renamed two of the base's tokens
        (MARKERS, None, False, ()),  # the base has them as well
        (["<x>", "<z>"], {"source": "base"}, False, tuple(MARKERS)),
        (["<x>", "<z>"], {"source": "union"}, False, ()),
    ],
)
def test_tokenizer_is_the_one_that_has_the_special_tokens(
    study, tmp_path, added, tokenizer, own, split_up
):
    tokens = [*ENDS, *LETTERS]
    names = {"base": (added, PLAIN), "donor": (MARKERS, CHATML)}
    for seed, (name, (special, template)) in enumerate(names.items()):
        make_with_tokens(tmp_path / name, tokens, special, rows=64, seed=seed, template=template)
    file = study()
    contents = yaml.safe_load(file.read_text())
    contents |= {"base_model": str(tmp_path / "base"), "models": [str(tmp_path / "donor")]}
    contents |= {} if tokenizer is None else {"tokenizer": tokenizer}
    file.write_text(yaml.safe_dump(contents))
    plan = plan_study(load_study(file))
    (template,) = find_own_templates(plan.spec, plan.model_set).values()
    assert (template.uses_own_tokenizer, template.split_up) == (own, split_up)
    assert any("splits up" in note for note in plan.notes()) == bool(split_up)
    context = load(plan, Hardware("cpu"))
    bound = context.own_templates[str(Path(tmp_path / "donor"))]
    is_one = len(bound.tokenizer.encode(MARKERS[0], add_special_tokens=False)) == 1
    assert is_one == (not split_up)
