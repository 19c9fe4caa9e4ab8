"""The model card of a run's checkpoint."""

import shutil

import pytest
from huggingface_hub import ModelCard

from merge_engine.recipe.recipe import Recipe
from search.cli import main
from search.showing.card import model_card
from search.storing.result import read_result
from search.storing.resume import stored_spec


@pytest.fixture(scope="module")
def run(make_study, zoo, tmp_path_factory):
    """A finished run whose models have cards of their own."""
    folder = tmp_path_factory.mktemp("card")
    models = [shutil.copytree(zoo / name, folder / name) for name in ("base", "a", "b")]
    for model in models:
        (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    names = [str(model) for model in models]
    study = make_study(folder, base_model=names[0], models=names[1:], search__trials=6)
    assert main(["run", str(study), "--out", str(folder / "run"), "--device", "cpu"]) == 0
    return folder / "run"


def card_of(run):
    result = read_result(run)
    recipe = Recipe.model_validate(result.winner.recipe)
    return model_card(run.name, stored_spec(run), recipe, result)


def test_card_names_the_models_that_are_on_the_hub(run):
    mapping = Recipe.model_validate(read_result(run).winner.recipe).model_dump(mode="json")
    mapping |= {"base_model": "org/base", "models": [{"model": "org/a@v1"}, *mapping["models"][1:]]}
    card = ModelCard(model_card("x", stored_spec(run), Recipe.model_validate(mapping), None))
    assert card.data.base_model == ["org/base", "org/a"]
    assert card.data.base_model_relation == "merge"


def test_card_agrees_with_result_json(run):
    result, text = read_result(run), (run / "checkpoint" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.base_model is None, "folders are no models of the Hub"
    assert card.data.tags == ["merge", "mergekit", "mergesearch"]
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    values = {one.dataset_name: one.metric_value for one in card.data.eval_results}
    assert values == {task: round(v, 4) for task, v in result.winner.test.tasks.items()}
    assert result.verdict_text in card.text
    assert f"{result.item_evaluations:,} item evaluations" in card.text
    assert "6 candidates were tried, 0 of which failed" in card.text
    models = ["base", "donor a", "donor b", "uniform", "**winner**"]
    scores = [result.base.test, *(donor.test for donor in result.donors.values())]
    scores += [result.uniform.test, result.winner.test]
    before, rule, after = card.text.partition("\n| --- |")
    lines = [before.splitlines()[-1], *(rule + after).split("\n\n")[0].strip().splitlines()]
    table = [line.split(" | ") for line in lines]  # without a line between
    assert [len(row) for row in table] == [len(table[0])] * 7
    for model, score, row in zip(models, scores, table[2:], strict=True):
        low, high = score.ci95
        assert row[0] == f"| {model}"
        assert row[-2] == f"{100 * score.mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    exported = (run / "checkpoint" / "mergekit_config.yml").read_text()
    assert card.text.split("```yaml\n")[1].split("```")[0] == exported
    assert str(run.parent) not in text  # no path of this machine
    assert f"Seed {result.seed}; mergesearch {result.versions['mergesearch']}" in card.text


@pytest.mark.parametrize("other", ["license: mit", "license: [", ""])
def test_licence_is_named_only_where_all_have_it(run, other):
    file = run.parent / "base" / "README.md"
    before = file.read_text()
    file.write_text(f"---\n{other}\n---\n")
    card = ModelCard(card_of(run))
    file.write_text(before)
    assert card.data.license is None
    assert f"- base: {'mit' if other == 'license: mit' else 'not known'}" in card.text


def test_card_of_another_trial_has_no_test_that_was_not_made(run, tmp_path):
    winner = read_result(run).winner.trial
    donor, searched = ({1, 2} - {winner}).pop(), ({4, 5} - {winner}).pop()
    for number, tested in ((donor, True), (searched, False)):
        out = tmp_path / str(number)
        options = ["--trial", str(number), "--device", "cpu"]
        assert main(["export", str(run), str(out), *options]) == 0
        text = (out / "README.md").read_text()
        assert f"trial {number} of its run and **not the recipe" in text
        assert ("| this trial |" in text) == tested
        assert ("model-index" in text) == tested
        assert ("It has not been tested" in text) != tested
        assert read_result(run).verdict_text not in text


def test_card_of_a_study_with_floors_states_them(simulated_folder):
    text = (simulated_folder / "checkpoint" / "README.md").read_text()
    assert read_result(simulated_folder).floors_text in text
