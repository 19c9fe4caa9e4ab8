"""The model card of a run, and its way to a hub: a small one that speaks what the client asks."""

import base64
import hashlib
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import yaml
from huggingface_hub import ModelCard, constants

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


def test_card_says_what_result_json_says(run):
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
    assert card.text.split("```yaml\n")[1].split("```")[0] == (run / "recipe.yaml").read_text()
    before_recipe = text.split("```yaml")[0]
    assert str(run.parent) not in before_recipe  # no path of this machine
    assert f"Seed {result.seed}; mergesearch {result.versions['mergesearch']}" in card.text


def test_finishing_again_writes_the_card_again(run):
    file = run / "checkpoint" / "README.md"
    text = file.read_text()
    file.unlink()
    study = run.parent / "study.yaml"
    assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 0
    assert file.read_text() == text == card_of(run)


@pytest.mark.parametrize("other", ["license: mit", "license: [", ""])
def test_licence_is_named_only_where_all_have_it(run, other):
    file = run.parent / "base" / "README.md"
    before = file.read_text()
    file.write_text(f"---\n{other}\n---\n")
    card = ModelCard(card_of(run))
    file.write_text(before)
    assert card.data.license is None
    assert f"- base: {'mit' if other == 'license: mit' else 'not known'}" in card.text


def test_another_trials_card_says_so_and_claims_no_test_that_was_not(run, tmp_path):
    winner = read_result(run).winner.trial
    donor, searched = ({1, 2} - {winner}).pop(), ({4, 5} - {winner}).pop()
    for number, tested in ((donor, True), (searched, False)):
        out = tmp_path / str(number)
        options = ["--trial", str(number), "--device", "cpu"]
        assert main(["export", str(run), str(out), *options]) == 0
        text = (out / "README.md").read_text()
        assert f"trial {number} of its run and **not a recipe" in text
        assert ("| this trial |" in text) == tested
        assert ("model-index" in text) == tested
        assert ("It has not been tested" in text) != tested
        assert read_result(run).verdict_text not in text


class Hub(ThreadingHTTPServer):
    """A hub of one repository: what was made of it, committed to it and uploaded beside it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.made, self.commits, self.objects = [], [], {}
        self.failing = None  # the way it fails, if it does
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def files(self):
        """The files of the last commit."""
        found = {}
        for line in self.commits[-1].splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                found[value["path"]] = self.objects[value["oid"]]
        return found


class Answers(BaseHTTPRequestHandler):
    def log_message(self, format, *args):
        pass

    def _answer(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _fail(self, how):
        if how == "cut":
            self.close_connection = True
        elif how == "garbage":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")
        else:
            self._answer({"error": "later"}, how)

    def do_PUT(self):
        body, oid = self._body(), self.path.rsplit("/", 1)[-1]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._answer({})

    def do_POST(self):
        hub, body = self.server, self._body()
        if hub.failing:
            self._fail(hub.failing)
        elif self.headers["Authorization"] != "Bearer hf_right":
            self._answer({"error": "no right to write to org"}, 403)
        elif self.path == "/api/repos/create":
            status = 409 if hub.made else 200
            hub.made.append(json.loads(body))
            self._answer({"url": f"{hub.url}/org/name"}, status)
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
            each = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]
            self._answer({"files": each})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{hub.url}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        else:
            assert self.path == "/api/models/org/name/commit/main"
            hub.commits.append(body.decode())
            url = f"{hub.url}/org/name/commit/{'0' * 40}"
            self._answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})


@pytest.fixture
def hub():
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def push(run, monkeypatch, tmp_path, capsys):
    """Push the run to a hub; returns the exit status and what was printed."""

    def to(url, *options, repo="org/name", token="hf_right"):
        # The client's settings, which it reads from the environment when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", token)
        capsys.readouterr()
        return main(["push", str(run), repo, *options]), *capsys.readouterr()

    return to


def test_push_uploads_card_recipe_and_weights_and_again_into_the_same_repository(run, hub, push):
    status, out, error = push(hub.url, "--private")
    assert (status, error) == (0, "")
    assert out.startswith(f"note: the recipe names folders of this machine: {run.parent}")
    assert out.endswith(f"\n{hub.url}/org/name\n")
    assert hub.made[0]["organization"] == "org"
    assert hub.made[0].get("visibility", hub.made[0].get("private")) in ("private", True)
    files = {file.name: file.read_bytes() for file in (run / "checkpoint").iterdir()}
    assert {"README.md", "model.safetensors"} < files.keys()
    assert hub.files == files | {"recipe.yaml": (run / "recipe.yaml").read_bytes()}
    assert push(hub.url)[0] == 0
    assert len(hub.commits) == 2


def test_push_to_programs_is_json_alone_and_says_as_much(run, hub, push):
    status, out, error = push(hub.url, "--json")
    assert (status, error) == (0, "")
    note, result = map(json.loads, out.splitlines())
    folders = ", ".join(Recipe.model_validate(read_result(run).winner.recipe).models_read)
    assert note["text"] == f"the recipe names folders of this machine: {folders}"
    assert result == {"event": "result", "url": f"{hub.url}/org/name"}
    status, out, error = push(hub.url, "--json", token="hf_wrong")
    assert json.loads(out.splitlines()[-1]) == {
        "event": "error",
        "message": error.removeprefix("mergesearch: ").strip(),
        "exit": status,
    }


def test_push_says_what_is_in_its_way(hub, push):
    refused, nobody = push(hub.url, token="hf_wrong"), push(hub.url, token="")
    unreachable = push("http://127.0.0.1:9")
    misnamed = push(hub.url, repo="a name")
    assert [refused[0], nobody[0], misnamed[0], unreachable[0]] == [2, 2, 2, 1]
    assert "'a name'" in misnamed[2]
    assert "log in with `hf auth login`" in refused[2]
    assert "no token of the Hub; log in with `hf auth login`" in nobody[2]
    assert "http://127.0.0.1:9 cannot be reached" in unreachable[2]
    assert not hub.commits
    assert all(error.count("\n") == 1 for _, _, error in (refused, nobody, misnamed, unreachable))


@pytest.mark.parametrize("failing", [500, 503, 429, "cut", "garbage"])
def test_a_hub_that_fails_is_no_refusal(hub, push, failing):
    hub.failing = failing
    status, _, error = push(hub.url)
    assert status == 1
    assert "when that is mended, the same command goes on" in error
    assert "log in" not in error
    assert error.count("\n") == 1


def test_push_of_what_is_not_finished_is_refused(run, tmp_path, capsys):
    assert main(["push", str(tmp_path), "org/name"]) == 2
    assert "has no result yet" in capsys.readouterr().err
    half = shutil.copytree(run, tmp_path / "half")
    recipe = half / "checkpoint" / "mergekit_config.yml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"out_dtype": "float16"}))
    assert main(["push", str(half), "org/name"]) == 2
    assert "is not what result.json speaks of" in capsys.readouterr().err
