"""Where models are found: folders, the hub's cache, and a small server in the hub's place."""

import json
import logging
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.locating import is_local, locate
from tiny_models import pickled_twin

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's client."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cached(cache, model):
    """Put a folder into the cache as the client does; returns its id."""
    repository = cache / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(model, repository / "snapshots" / COMMIT)
    return "org/name"


class Hub(ThreadingHTTPServer):
    """A hub of one repository, ``org/name``, which once was called ``old/name``."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder, self.fetched = folder, []


class Answers(BaseHTTPRequestHandler):
    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        folder = self.server.folder
        headers = {"X-Repo-Commit": COMMIT}
        if "/tree/" in self.path:
            sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            body = json.dumps(
                [{"type": "file", "path": n, "size": size, "oid": n} for n, size in sizes.items()]
            ).encode()
        elif self.path.startswith("/api/models/"):
            siblings = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
            info = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
            body = json.dumps(info).encode()
        else:
            name = self.path.rsplit("/", 1)[-1]
            body = (folder / name).read_bytes()
            headers["ETag"] = f'"{name}"'
            if self.command == "GET":
                self.server.fetched.append(name)
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def publish(cache, monkeypatch):
    """Start a hub with a folder; returns the names of the files that are fetched from it."""
    servers = []

    def start(folder):
        servers.append(Hub(folder))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{servers[-1].server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        return servers[-1].fetched

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("model", "message"),
    [("no/such/folder", "not a hub id"), ("nobody/nothing", "not available from the hub")],
)
def test_missing_model_is_refused_by_name(model, message):
    with pytest.raises(MergeError, match=f"model '{model}': no such folder, and {message}"):
        Checkpoint(model)


def test_pickled_model_in_the_cache_is_local_and_read(zoo, cache, tmp_path):
    assert not is_local("org/name")
    model = cached(cache, pickled_twin(zoo / "a", tmp_path / "a"))
    assert is_local(model)
    expected = load_file(zoo / "a" / "model.safetensors")
    checkpoint = Checkpoint(model)
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(name), expected[name]) for name in expected)


def test_cache_without_weights_is_not_local_and_says_how_to_fetch_them(cache, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    model = cached(cache, tmp_path / "m")
    assert not is_local(model)
    with pytest.raises(MergeError, match=r"model 'org/name': no model.safetensors .*; fetch it"):
        Checkpoint(model).tensors  # noqa: B018


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files_are_fetched_where_there_are_no_safetensors(zoo, publish, tmp_path, shards):
    folder = pickled_twin(zoo / "a", tmp_path / "a", shards)
    (folder / "training_args.bin").write_bytes(b"not weights")
    fetched = publish(folder)
    checkpoint = Checkpoint("org/name")
    expected = load_file(zoo / "a" / "model.safetensors")
    assert all(torch.equal(checkpoint.read(name), expected[name]) for name in expected)
    assert len([name for name in fetched if name.endswith(".bin")]) == shards
    assert "training_args.bin" not in fetched


def test_bin_files_are_left_where_there_are_safetensors(zoo, publish, tmp_path):
    folder = pickled_twin(zoo / "a", tmp_path / "a")
    shutil.copy(zoo / "a" / "model.safetensors", folder)
    fetched = publish(folder)
    assert Checkpoint("org/name").tensors
    assert "model.safetensors" in fetched
    assert "pytorch_model.bin" not in fetched


def test_pickled_adapter_is_fetched(publish, tmp_path):
    for name in ("adapter_config.json", "adapter_model.bin"):
        (tmp_path / "hub").mkdir(exist_ok=True)
        (tmp_path / "hub" / name).write_text("{}")
    fetched = publish(tmp_path / "hub")
    assert (locate("org/name") / "adapter_model.bin").is_file()
    assert "adapter_model.bin" in fetched


def test_repository_of_gguf_files_is_refused_by_them_without_fetching_them(publish, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    (tmp_path / "hub" / "model-q4.gguf").write_text("large")
    fetched = publish(tmp_path / "hub")
    with pytest.raises(MergeError, match=r"model-q4\.gguf, which is in the GGUF format"):
        Checkpoint("org/name").tensors  # noqa: B018
    assert "model-q4.gguf" not in fetched


def test_repository_that_moved_is_a_warning_with_its_new_name(zoo, publish, caplog):
    publish(zoo / "a")
    with caplog.at_level(logging.WARNING, logger="merge_engine"):
        locate("old/name")
        locate("org/name")
    (record,) = caplog.records
    assert (
        record.getMessage() == "old/name is now called org/name on the hub; name it so from now on"
    )
