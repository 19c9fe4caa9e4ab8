"""Files of several recipes that use one another's results, as mergekit-multi reads them."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from merge_engine.errors import MergeError
from merge_engine.recipe.stages import load_stages
from search.cli import main


def arithmetic(base, *models, weight=0.5, **more):
    entries = [{"model": model, "parameters": {"weight": weight}} for model in models]
    start = {"merge_method": "task_arithmetic", "base_model": base, "dtype": "float32"}
    return start | {"models": entries} | more


def stack(*models, **more):
    slices = [{"sources": [{"model": m, "layer_range": r}]} for m, r in models]
    return {"merge_method": "passthrough", "slices": slices, "dtype": "float32"} | more


@pytest.fixture
def documents(zoo):
    """The result first, then what it uses, one of which uses another."""
    base, a, b, c = (str(zoo / name) for name in ("base", "a", "b", "c"))
    return [
        arithmetic("twice", "half", weight=0.7),
        arithmetic(base, a, b, name="half"),
        stack(("quarter", [0, 2]), (b, [1, 2]), name="twice"),
        arithmetic("half", c, name="quarter", weight=0.25, chat_template="chatml"),
    ]


def write(path, documents):
    path.write_text("---\n".join(yaml.safe_dump(each) for each in documents))
    return path


def run(command, capsys=None):
    code = main([*map(str, command), "--device", "cpu"])
    return code, " ".join("".join(capsys.readouterr()).split()) if capsys else ""


def test_documents_are_built_in_the_order_of_their_use_into_one_folder(documents, tmp_path, build):
    path = write(tmp_path / "r.yaml", documents)
    assert run(["build", path, tmp_path / "out"])[0] == 0
    placed = yaml.safe_load(json.dumps(documents))
    for name in ("half", "quarter", "twice"):
        text = json.dumps(placed)
        one = next(each for each in placed if each.get("name") == name)
        build({k: v for k, v in one.items() if k != "name"}, tmp_path / "by hand" / name)
        placed = json.loads(text.replace(f': "{name}"', f': "{tmp_path}/by hand/{name}"'))
        for each in placed:
            each["name"] = each.get("name", "").rpartition("/")[2]
    result = next(each for each in placed if not each["name"])
    expected = build({k: v for k, v in result.items() if k != "name"}, tmp_path / "expected")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml", "out", "by hand", "expected"}
    again = tmp_path / "out" / "mergekit_config.yml"
    assert run(["build", again, tmp_path / "again"])[0] == 0
    assert again.read_text() == (tmp_path / "again" / "mergekit_config.yml").read_text()


@pytest.mark.oracle
def test_result_equals_that_of_mergekit_multi(documents, tmp_path):
    documents = [each for each in documents if each.get("name") != "half"]
    documents[0] |= arithmetic("twice", documents[1]["slices"][1]["sources"][0]["model"])
    documents[2]["base_model"] = documents[0]["models"][0]["model"]
    documents[2].pop("chat_template")
    documents[1] = stack(("quarter", [0, 2]), ("quarter", [2, 3]), name="twice")
    path = write(tmp_path / "r.yaml", documents)
    assert run(["build", path, tmp_path / "mine"])[0] == 0
    command = [sys.executable, "-m", "mergekit.scripts.multimerge", path]
    command += ["--out-path", tmp_path / "theirs", "-I", tmp_path / "stages"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    mine, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("mine", "theirs"))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_kept_results_are_used_again_unless_their_recipes_changed(documents, tmp_path, capsys):
    kept = tmp_path / "kept"
    command = ["build", write(tmp_path / "r.yaml", documents), tmp_path / "one"]
    command += ["--intermediate-dir", kept]
    assert run(command)[0] == 0
    assert {path.name for path in kept.iterdir()} == {"half", "quarter", "twice"}
    command[2] = tmp_path / "two"
    assert f"{kept}/half is there already" in run(command, capsys)[1].replace("\n", "")
    documents[1]["models"][0]["parameters"]["weight"] = 0.1
    write(tmp_path / "r.yaml", documents)
    command[2] = tmp_path / "three"
    code, said = run(command, capsys)
    assert code == 2
    assert "document 2 ('half')" in said
    assert "was built from something else; remove it" in said


def test_check_describes_each_document_and_builds_none(documents, tmp_path, capsys):
    code, said = run(["check", write(tmp_path / "r.yaml", documents)], capsys)
    assert code == 0
    for where in ("document 1:", "document 2 ('half'):", "document 3 ('twice'):"):
        assert where in said
    assert said.count("recipe: task_arithmetic, writes float32") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_what_cannot_be_built_is_said_by_document_before_anything_is(documents, tmp_path, capsys):
    documents[0]["models"][0]["model"] = "twise"
    code, said = run(["build", write(tmp_path / "r.yaml", documents), tmp_path / "o"], capsys)
    assert code == 2
    assert "document 1: model 'twise': no such folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: {"base_model": "twice"}}, "use one another in a circle: .*half.*(twice|quarter)"),
        ({1: {"base_model": "half"}}, "in a circle: half -> half"),
        ({1: {"name": "quarter"}}, "documents 2 and 4 have the same name 'quarter'; rename"),
        ({1: {"name": ""}}, "documents 1 and 2 have no name; only the result may"),
        ({1: {"name": 7}}, "document 2: name 7 has to be a text"),
        ({1: {"name": "../x"}}, r"document 2: name '../x' has to be"),
        ({2: {"merge_method": "tise"}}, r"document 3 \('twice'\): unknown merge_method 'tise'"),
    ],
)
def test_wrong_documents_are_refused_by_name(documents, tmp_path, changes, message):
    for index, change in changes.items():
        documents[index] |= change
    with pytest.raises(MergeError, match=message):
        load_stages(write(tmp_path / "r.yaml", documents))


def test_result_is_the_document_without_a_name_or_the_last_that_none_uses(documents, tmp_path):
    documents[0]["name"] = "best"
    stages, notes = load_stages(write(tmp_path / "r.yaml", documents))
    assert stages[-1].name == "best"
    assert not notes
    documents.append(arithmetic("half", documents[1]["models"][0]["model"], name="other"))
    stages, notes = load_stages(write(tmp_path / "r.yaml", documents))
    assert stages[-1].name == "other"
    assert {stage.name for stage in stages if not stage.needed} == {"best", "twice", "quarter"}
    assert len(notes) == 3
    assert "the result does not use it; built only with --intermediate-dir" in notes[0]


def test_adapters_and_slices_may_be_of_a_result(documents, tmp_path, zoo):
    documents[0]["models"][0]["model"] = f"half+{zoo / 'c'}"
    stage = load_stages(write(tmp_path / "r.yaml", documents))[0][-1]
    assert stage.uses == {"half", "twice"}
    assert stage.placed(tmp_path).models[0].model == f"{tmp_path / 'half'}+{zoo / 'c'}"


@pytest.mark.parametrize("command", ["check", "build"])
def test_configuration_for_experts_is_said_to_be_mergekit_moes(tmp_path, capsys, command):
    mapping = {"base_model": "a", "gate_mode": "hidden", "experts": [{"source_model": "b"}]}
    path = write(tmp_path / "r.yaml", [mapping])
    code, said = run([command, path, *([tmp_path / "o"] if command == "build" else [])], capsys)
    assert code == 2
    assert "'gate_mode' makes it a configuration of mergekit-moe" in said


def test_output_paths_of_mergekit_mega_are_names(documents, tmp_path):
    named = load_stages(write(tmp_path / "named.yaml", documents))[0]
    text = yaml.safe_dump_all(documents).replace("name: ", "out_path: ./models/")
    for name in ("half", "quarter", "twice"):
        text = text.replace(f"model: {name}\n", f"model: ./models/{name}\n")
    (tmp_path / "mega.yaml").write_text(text)
    mega = load_stages(tmp_path / "mega.yaml")[0]
    assert [stage.recipe for stage in mega] == [stage.recipe for stage in named]
