"""Upload of a checkpoint, to a small server that answers the client's requests."""

import base64
import hashlib
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import yaml
from huggingface_hub import constants

from merge_engine.recipe.recipe import Recipe
from search.cli import main


@pytest.fixture(scope="module")
def run(make_study, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("hub")
    study = make_study(folder, search__trials=1)
    assert main(["run", str(study), "--out", str(folder / "run"), "--device", "cpu"]) == 0
    return folder / "run"


class Hub(ThreadingHTTPServer):
    """A hub of one repository: requests to create it, its commits and its uploaded objects."""

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


def test_push_uploads_card_recipe_and_weights_and_again_into_the_same_repository(
    run, hub, push, zoo
):
    status, out, error = push(hub.url, "--private")
    assert (status, error) == (0, "")
    assert out.startswith("note: the recipe names folders of this machine: ./")
    assert out.endswith(f"\n{hub.url}/org/name\n")
    assert hub.made[0]["organization"] == "org"
    assert hub.made[0].get("visibility", hub.made[0].get("private")) in ("private", True)
    files = {file.name: file.read_bytes() for file in (run / "checkpoint").iterdir()}
    assert {"README.md", "model.safetensors"} < files.keys()
    assert hub.files == files | {"recipe.yaml": files["mergekit_config.yml"]}
    assert push(hub.url)[0] == 0
    assert len(hub.commits) == 2


def test_push_with_json_writes_json_lines_alone(run, hub, push):
    status, out, error = push(hub.url, "--json")
    assert (status, error) == (0, "")
    note, result = map(json.loads, out.splitlines())
    winner = json.loads((run / "result.json").read_text())["winner"]["recipe"]
    folders = ", ".join(Recipe.model_validate(winner).models_read)
    assert folders.startswith("./")
    assert note["text"] == f"the recipe names folders of this machine: {folders}"
    assert result == {"event": "result", "url": f"{hub.url}/org/name"}
    status, out, error = push(hub.url, "--json", token="hf_wrong")
    assert json.loads(out.splitlines()[-1]) == {
        "event": "error",
        "message": error.removeprefix("mergesearch: ").strip(),
        "exit": status,
    }


def test_push_that_is_refused_is_one_line_with_the_fix(hub, push):
    refused, nobody = push(hub.url, token="hf_wrong"), push(hub.url, token="")
    unreachable = push("http://127.0.0.1:9")
    misnamed = push(hub.url, repo="a name")
    assert [refused[0], nobody[0], misnamed[0], unreachable[0]] == [2, 2, 2, 1]
    assert "'a name'" in misnamed[2]
    assert "log in with `hf auth login`" in refused[2]
    assert "no Hub token; log in with `hf auth login`" in nobody[2]
    assert "http://127.0.0.1:9 cannot be reached" in unreachable[2]
    assert not hub.commits
    assert all(error.count("\n") == 1 for _, _, error in (refused, nobody, misnamed, unreachable))


@pytest.mark.parametrize("failing", [500, 503, 429, "cut", "garbage"])
def test_hub_that_fails_is_exit_1_with_advice(hub, push, failing):
    hub.failing = failing
    status, _, error = push(hub.url)
    assert status == 1
    assert "when that is fixed, repeat the command" in error
    assert "log in" not in error
    assert error.count("\n") == 1


def test_push_of_what_is_not_finished_is_refused(run, tmp_path, capsys):
    assert main(["push", str(tmp_path), "org/name"]) == 2
    assert "has no result yet" in capsys.readouterr().err
    half = shutil.copytree(run, tmp_path / "half")
    recipe = half / "checkpoint" / "mergekit_config.yml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"out_dtype": "float16"}))
    assert main(["push", str(half), "org/name"]) == 2
    assert "is incomplete, or not the winner of result.json" in capsys.readouterr().err
