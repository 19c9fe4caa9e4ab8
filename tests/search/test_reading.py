import sys

import pytest
import yaml

from search.cli import main
from search.study.reading import load_study, parse_study
from search.study.spec import BelowBase, ModelDifference, StudyError, StudySpec


def test_study_of_the_design_is_read_with_absolute_paths(make_study, tmp_path, zoo):
    spec = load_study(make_study(tmp_path))
    assert spec.base_model == str(zoo / "base")
    assert spec.objective.include_path == (tmp_path / "tasks",)
    assert spec.objective.tasks[1].weight == 2.0
    assert spec.search.sampler == "auto"


def test_folders_count_from_the_study_file(make_study, tmp_path, zoo):
    (tmp_path / "models").symlink_to(zoo)
    models = {"base_model": "models/base", "models": ["models/a"], "search": {}}
    spec = load_study(make_study(tmp_path, **models))
    assert spec.models == (str(zoo / "a"),)


def test_tokenizer_is_read_as_in_recipes_with_folders_of_the_study(make_study, tmp_path, zoo):
    (tmp_path / "models").symlink_to(zoo)
    tokens = {
        "<x>": {"source": "models/a"},
        "<y>": {"source": {"kind": "model_token", "model": "models/b", "token_id": 3}},
    }
    block = {"source": "models/base", "tokens": tokens, "pad_to_multiple_of": 8}
    found = load_study(make_study(tmp_path, tokenizer=block)).tokenizer
    assert (found.source, found.pad_to_multiple_of) == (str(zoo / "base"), 8)
    assert found.tokens["<x>"].source == str(zoo / "a")
    assert found.tokens["<y>"].source.model == str(zoo / "b")


def test_short_tokenizer_source_is_the_same_study(make_study, tmp_path):
    short = load_study(make_study(tmp_path / "short", tokenizer_source="union"))
    long = load_study(make_study(tmp_path / "long", tokenizer={"source": "union"}))
    assert short.tokenizer == long.tokenizer
    assert StudySpec.model_validate(short.model_dump(mode="json")) == short


def test_methods_default_to_all_the_donors_allow(make_study, tmp_path, zoo):
    file = make_study(tmp_path, search={}, models=[str(zoo / "a")])
    assert "model_stock" not in load_study(file).search.methods
    assert "ties" in load_study(file).search.methods


def test_number_fixes_and_range_searches(make_study, tmp_path):
    search = {"methods": ["ties"], "scale": 1.0, "density": [0.2, 0.9], "normalize": True}
    spec = load_study(make_study(tmp_path, search=search))
    assert spec.search.scale == (1.0, 1.0)
    assert spec.search.ranges == {"density": (0.2, 0.9), "normalize": (1.0, 1.0)}


def test_sampler_whose_package_is_missing_names_the_extra(make_study, tmp_path, monkeypatch):
    file = make_study(tmp_path, search__sampler="cmaes", objective__constraints={})
    assert load_study(file).search.sampler == "cmaes"
    monkeypatch.setitem(sys.modules, "cmaes", None)  # as if it was not installed
    with pytest.raises(StudyError, match=r"pip install 'mergesearch\[cmaes\]'"):
        load_study(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serach": {}}, "unknown key 'serach'; did you mean 'search'"),
        ({"tokenizer": {"sorce": "base"}}, "tokenizer: unknown key 'sorce'; did you mean 'source'"),
        ({"tokenizer": "union"}, "to name a source only, use tokenizer_source"),
        ({"tokenizer": {}, "tokenizer_source": "base"}, "both tokenizer and tokenizer_source"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of: Input should"),
        ({"tokenizer": {"tokens": {"x": {"forced": 1}}}}, "unknown key 'forced'; did you mean"),
        ({"search__trails": 5}, "search: unknown key 'trails'; did you mean 'trials'"),
        ({"search__densty": 0.5}, "search: unknown key 'densty'; did you mean 'density'"),
        (
            {"search__methods": ["tise"]},
            "search.methods: unknown method 'tise'; did you mean 'ties'",
        ),
        ({"search__methods": "ties"}, "search.methods has to be a list"),
        ({"search__sampler": "tep"}, "search.sampler: unknown sampler 'tep'; did you mean 'tpe'"),
        ({"search__density": [0.9, 0.2]}, r"search.density: \[0.9, 0.2\] is not a range within"),
        ({"search__start": ["no.yaml"]}, "search.start: .*no.yaml is neither a recipe nor a run"),
        (
            {"search__sampler": "cmaes", "objective__constraints": {"pick": 0.1}},
            "ignores constraints",
        ),
        ({"search__sampler": "grid", "search__scale": 1}, "a grid needs a range of scale"),
        ({"search__density": 3}, r"search.density: \[3, 3\] is not a range within \[0, 1\]"),
        ({"search__at_most": 0}, "search.at_most: Input should be greater than 0"),
        ({"search__at_most": 9}, "search.at_most: 9 is more than the . models"),
        (
            {"search__at_most": 1, "search__methods": ["slerp"]},
            "slerp needs 2 models or more, search.at_most is 1; leave it out or raise that",
        ),
        (
            {"search__at_most": 1, "search__sampler": "grid", "search__methods": ["ties"]},
            "a grid merges all models evenly",
        ),
        ({"search__trials": 0}, "search.trials: Input should be greater than 0"),
        ({"objective__task": []}, "objective: unknown key 'task'; did you mean 'tasks'"),
        (
            {"objective__tasks": []},
            r"objective.tasks: Input should be a list with an entry \(got \[\]",
        ),
        ({"objective__tasks": [{"taks": "x"}]}, r"objective.tasks\[0\]: unknown key 'taks'"),
        ({"objective__tasks": [{"text": "no/*.txt"}]}, r"tasks\[0\]: no file .*no/\*.txt"),
        ({"objective__tasks": [{"text": "x", "metric": "acc"}]}, r"tasks\[0\]: unknown key 'me"),
        ({"objective__tasks": [{"objective": 1}]}, r"tasks\[0\]: objective: Input should be"),
        ({"objective__tasks": [3]}, r"tasks\[0\] has to be a name or a mapping, got 3"),
        ({"objective__tasks": "pick"}, "objective.tasks has to be a list, got 'pick'"),
        ({"objective__items__tests": 5}, "objective.items: unknown key 'tests'"),
        ({"objective__batch_size": 0}, "objective.batch_size: Input should be greater than 0"),
        ({"objective__items__select": 0}, "objective.items.select: Input should be greater than 0"),
        ({"objective__include_path": "nowhere"}, "objective.include_path: no folder .*nowhere"),
        ({"models": []}, r"models: Input should be a list with an entry \(got \[\]\)"),
        ({"models": "a"}, "models: "),
        ({"dtype": "int8"}, "dtype: Input should be"),
        ({"objective__constraints": {"pick": "bas - 1"}}, "a floor is a number, or one like 'base"),
        ({"objective": [1]}, "'objective' has to be a mapping"),
        ({"objective": []}, "'objective' has to be a mapping"),
        ({"objective": None}, "objective.tasks: Input should be a list with an entry"),
        ({"search": 0}, "'search' has to be a mapping, got 0"),
        ({"base_model": None}, r"base_model: Input should be a valid string \(got None\)"),
        ({"models": None}, r"models: Input should be a list \(got None\)"),
        ({"models": ["a", None]}, r"models\[1\] has to be a model or {model, minus}, got None"),
        ({"models": [["a"]]}, r"models\[0\] has to be a model or {model, minus}, got \['a'\]"),
        ({"models": [{"model": "a", "minus": None}]}, r"models\[0\]: minus: Input should be"),
        ({"search__methods": {}}, "search.methods has to be a list, got {}"),
        ({"search__methods": []}, "search.methods: Input should be a list with an entry"),
        ({"search__scale": []}, r"search.scale: a range is a number, or \[low, high\] \(got \[\]"),
        ({"search__density": None}, r"search.density: a range is a number, or \[low, high\]"),
        ({"search__density": [0, "x"]}, r"search.density.1: Input should be a valid number"),
        ({"search__split": "mlp"}, "search.split: Input should be a list"),
        ({"search__start": {}}, "search.start has to be a path or a list of paths, got {}"),
        ({"objective__tasks": {}}, "objective.tasks has to be a list, got {}"),
        ({"objective__tasks": [{"text": 3}]}, "text has to be a path or a list of paths, got 3"),
        ({"objective__tasks": [{"text": [3]}]}, r"text has to be a path or .*, got \[3\]"),
        ({"objective__tasks": [{"text": []}]}, "text: Input should be a list with an entry"),
        ({"objective__include_path": 0}, "include_path has to be a path or a list of paths, got 0"),
        ({"objective__items": []}, r"objective.items: Input should be a mapping \(got \[\]\)"),
        ({"objective__constraints": [1]}, r"constraints: Input should be a mapping \(got \[1\]"),
        ({"objective__constraints": {"pick": None}}, "constraints.pick: a floor is a number, or"),
        ({"tokenizer": {"tokens": {"x": {"source": []}}}}, r"x.source: Input should be a mapping"),
    ],
)
def test_wrong_study_is_refused_with_the_key_and_the_fix(make_study, tmp_path, changes, message):
    with pytest.raises(StudyError, match=message):
        load_study(make_study(tmp_path, **changes))


def test_key_with_nothing_behind_it_is_as_if_left_out(make_study, tmp_path):
    empty = {"search__methods": None, "search__scale": None, "search__trials": None}
    empty |= {"objective__items": None, "objective__constraints": None, "objective__block": None}
    empty |= {"search__start": None, "objective__include_path": None, "tokenizer": None}
    file = make_study(tmp_path, **empty)
    study = yaml.safe_load(file.read_text())
    for path in empty:
        part = study
        *parents, last = path.split("__")
        for parent in parents:
            part = part[parent]
        assert part.pop(last) is None
    assert load_study(file) == parse_study(study, tmp_path, "study.yaml")


def test_text_files_are_found_from_the_study_and_named_after_themselves(make_study, tmp_path):
    (tmp_path / "books").mkdir()
    for name in ("b.txt", "a.txt"):
        (tmp_path / "books" / name).write_text("text")
    tasks = [{"text": "books/*.txt"}, {"text": "books/a.txt", "name": "one", "unit": "line"}]
    first, second = load_study(make_study(tmp_path, objective__tasks=tasks)).objective.tasks
    assert first.name == "books"
    assert first.text == (tmp_path / "books" / "a.txt", tmp_path / "books" / "b.txt")
    assert (second.name, second.unit) == ("one", "line")


def test_code_of_models_is_off_by_default(make_study, tmp_path):
    spec = load_study(make_study(tmp_path))
    assert not spec.trust_remote_code
    assert not spec.objective.unsafe_code


def test_model_named_twice_is_refused(make_study, tmp_path, zoo):
    with pytest.raises(StudyError, match="is named twice"):
        load_study(make_study(tmp_path, models=[str(zoo / "a"), str(zoo / "a")]))


@pytest.mark.parametrize(
    ("models", "search", "message"),
    [
        (
            [{"model": "a", "minu": "b"}],
            {},
            "unknown key 'minu'; did you mean 'minus'",
        ),
        (["c", {"model": "a"}], {}, r"models\[1\]: minus: Field required"),
        ([{"model": "a", "minus": 1}], {}, r"models\[0\]: minus: Input should be a valid string"),
        ([{"model": "a", "minus": "a"}], {}, "'a - a' is named twice"),
        (["a", {"model": "a", "minus": "base"}], {}, "'a' is named twice"),
        ([{"model": "a", "minus": "b"}], {"methods": ["ties"]}, "ties works on each model's own"),
        ([{"model": "a", "minus": "b"}], {"normalize": True}, "cannot be normalized"),
    ],
)
def test_difference_that_cannot_be_added_is_refused(make_study, tmp_path, models, search, message):
    changes = {"base_model": "base", "models": models, "search": search}
    with pytest.raises(StudyError, match=message):
        load_study(make_study(tmp_path, **changes))


def test_difference_is_a_donor_of_task_arithmetic(make_study, tmp_path, zoo):
    models = [str(zoo / "c"), {"model": str(zoo / "a"), "minus": str(zoo / "b")}]
    spec = load_study(make_study(tmp_path, models=models, search={}))
    assert spec.models[1] == ModelDifference(model=str(zoo / "a"), minus=str(zoo / "b"))
    assert spec.models_but_base == tuple(str(zoo / name) for name in "cab")
    assert spec.search.methods == ("task_arithmetic",)
    assert StudySpec.model_validate(spec.model_dump(mode="json")) == spec


def test_floors_are_numbers_or_follow_the_base(make_study, tmp_path):
    floors = {"pick": "base - 0.02", "tell": 0.5}
    constraints = load_study(
        make_study(tmp_path, objective__constraints=floors)
    ).objective.constraints
    assert constraints == {"pick": BelowBase(margin=0.02), "tell": 0.5}


def test_method_that_needs_more_donors_is_refused(make_study, tmp_path, zoo):
    changes = {"models": [str(zoo / "a")], "search__methods": ["model_stock"]}
    with pytest.raises(StudyError, match="model_stock needs 2 models or more, got 1"):
        load_study(make_study(tmp_path, **changes))


def test_missing_parts_are_named(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"base_model": "a/b", "models": ["a/c"], "search": {}}))
    with pytest.raises(StudyError, match=r"objective.tasks: Input should be a list with"):
        load_study(file)


def test_token_limit_is_refused_where_nothing_is_generated(make_study, tmp_path, capsys):
    choices = {"objective__tasks": [{"task": "pick"}], "objective__max_mean_tokens": 9}
    assert main(["check", str(make_study(tmp_path, **choices))]) == 2
    assert "no task has a model write" in capsys.readouterr().err


def test_front_is_refused_to_a_sampler_of_one_objective(make_study, tmp_path, capsys):
    study = make_study(tmp_path, search__front=True, search__sampler="tpe")
    assert main(["check", str(study)]) == 2
    assert "search.front: the sampler 'tpe' has one objective, the mean" in capsys.readouterr().err
