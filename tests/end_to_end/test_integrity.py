"""Nothing silently wrong, nothing let out: outputs, links, caches, databases, cards, task code.

Each row is a thing that has happened to somebody, or that somebody might do to them.
"""

import json
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge_engine.models.model_set import ModelSet
from merge_engine.models.placement import ON_DISK
from merge_engine.models.statistics_cache import StatisticsCache
from search.cli import main
from search.storing.folder import DATABASE

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def models(zoo, tmp_path):
    """A base and a donor of one's own, and a recipe of them."""
    for name in ("base", "a", "b"):
        shutil.copytree(zoo / name, tmp_path / name)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 1.0}} for name in ("base", "a")],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.fixture(scope="module")
def done(make_study, zoo, tmp_path_factory):
    """A finished run, its study and its models, not to be changed."""
    folder = tmp_path_factory.mktemp("done")
    for name in ("base", "a", "b", "c"):
        shutil.copytree(zoo / name, folder / "zoo" / name)
    study = make_study(
        folder / "study",
        base_model=str(folder / "zoo" / "base"),
        models=[str(folder / "zoo" / name) for name in "abc"],
        search__trials=3,
        search__methods=["task_arithmetic"],
    )
    assert main(["run", str(study), "--out", str(folder / "run"), "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def run(done, tmp_path):
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(done / "run", tmp_path / "run", symlinks=True))


def study_of(done):
    return done / "study" / "study.yaml"


def again(done, run, *options):
    return main(["run", str(study_of(done)), "--out", str(run), "--device", "cpu", *options])


def build(models, out, recipe="recipe.yaml"):
    return main(["build", str(models / recipe), str(out), "--device", "cpu"])


def one_line(capsys, *parts):
    """What was said on stderr is one line of ours that has these parts."""
    error = capsys.readouterr().err
    assert error.startswith("mergesearch: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error
    return error


# Outputs


def test_second_build_into_the_same_folder_is_refused_and_the_first_is_whole(
    models, monkeypatch, capsys
):
    out, codes = models / "out", []
    code = (
        "import sys, search.cli as c, merge_engine.building.export as e\n"
        "import time, pathlib\n"
        "write = e._write_others\n"
        "def slow(*a):\n"
        "    pathlib.Path(sys.argv[3]).touch()\n"
        "    time.sleep(4)\n"
        "    return write(*a)\n"
        "e._write_others = slow\n"
        "sys.exit(c.main(['build', *sys.argv[1:3], '--device', 'cpu']))\n"
    )
    started = models / "started"
    first = subprocess.Popen([sys.executable, "-c", code, models / "recipe.yaml", out, started])
    while not started.exists() and first.poll() is None:
        time.sleep(0.02)
    codes.append(build(models, out))
    assert first.wait() == 0
    assert codes == [2]
    one_line(capsys, str(out), "another process")
    (models / "twin").mkdir()
    assert build(models, models / "twin" / "out") == 0
    mine, theirs = (load_file(o / "model.safetensors") for o in (out, models / "twin" / "out"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_folder_of_the_users_beside_an_output_stays(models):
    (models / "out.partial").mkdir()
    (models / "out.partial" / "thesis.tex").write_text("mine")
    (models / "out.partial-link").symlink_to(models / "out.partial")
    assert build(models, models / "out") == 0
    assert (models / "out.partial" / "thesis.tex").read_text() == "mine"
    assert sorted(path.name for path in models.glob("out*")) == [
        *("out", "out.partial", "out.partial-link")
    ]


def test_what_a_killed_build_has_left_is_removed_by_the_next(models):
    code = (
        "import os, signal, sys, search.cli as c, merge_engine.building.export as e\n"
        "e._write_others = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "c.main(['build', *sys.argv[1:], '--device', 'cpu'])\n"
    )
    out = models / "out"
    killed = subprocess.run([sys.executable, "-c", code, models / "recipe.yaml", out])
    assert killed.returncode == -9
    assert not out.exists()
    assert len(list(models.glob("out*"))) == 1
    assert build(models, out) == 0
    assert [path.name for path in models.glob("out*")] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "dangling", "pipe"])
def test_what_is_no_file_in_the_base_is_not_copied(models, kind):
    odd = models / "base" / "tokenizer.old"
    {
        "folder": lambda: (odd.mkdir(), (odd / "x").write_text("x")),
        "dangling": lambda: odd.symlink_to(models / "nowhere"),
        "pipe": lambda: os.mkfifo(odd),
    }[kind]()
    assert build(models, models / "out") == 0
    assert not (models / "out" / odd.name).exists()


@pytest.mark.parametrize("name", ["tokenizer_x.json", "merges.txt", "my.model", "evil.py"])
def test_link_out_of_the_base_is_not_followed_into_a_checkpoint(models, name, capsys):
    (models / "id_rsa").write_text(SECRET)
    (models / "base" / name).symlink_to(models / "id_rsa")
    config = json.loads((models / "base" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.C"} if name == "evil.py" else None
    (models / "base" / "config.json").write_text(json.dumps(config))
    build(models, models / "out")
    copied = [file for file in models.glob("out/**/*") if file.is_file()]
    assert not any(SECRET in file.read_bytes().decode("latin-1") for file in copied)


def test_links_of_the_hubs_cache_are_followed(models):
    blobs = models / "models--org--base" / "blobs"
    snapshot = models / "models--org--base" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (models / "base").iterdir():
        shutil.copyfile(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    recipe = (models / "recipe.yaml").read_text().replace("base", str(snapshot))
    (models / "recipe.yaml").write_text(recipe)
    assert build(models, models / "out") == 0
    assert (models / "out" / "tokenizer.json").is_file()


# Cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache with one statistic, and how to read it again."""
    monkeypatch.setenv("MERGESEARCH_CACHE", str(tmp_path / "cache"))
    cache = StatisticsCache()
    right = {"gram": torch.arange(64.0).double().reshape(8, 8)}
    file = cache.file_of("gram", [("f", "t")])
    cache.load_or_make(file, lambda: right)
    return file, right, lambda: cache.load_or_make(file, lambda: right)


def test_every_flipped_byte_of_a_cached_file_is_found(cached):
    file, right, read = cached
    whole = file.read_bytes()
    draw = random.Random(0)
    for place in [*draw.sample(range(len(whole)), 40), 8, len(whole) - 1]:
        file.write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :]
        )
        assert torch.equal(read()["gram"], right["gram"])
        assert file.read_bytes() == whole


@pytest.mark.parametrize("kind", ["zeroed", "other", "cut", "empty", "garbage"])
def test_wrong_cached_file_is_made_again(cached, kind):
    file, right, read = cached
    whole = file.read_bytes()
    if kind == "other":
        other = StatisticsCache().file_of("gram", [("g", "t")])
        StatisticsCache().load_or_make(other, lambda: {"gram": right["gram"] + 1})
        other.replace(file)
    else:
        length = 8 + int.from_bytes(whole[:8], "little")
        file.write_bytes(
            {
                "zeroed": whole[:length] + bytes(len(whole) - length),
                "cut": whole[:-9],
                "empty": b"",
                "garbage": b"no statistic",
            }[kind]
        )
    assert torch.equal(read()["gram"], right["gram"])
    assert file.read_bytes() == whole


def test_cached_file_that_is_a_pipe_is_made_again(cached):
    file, *_ = cached
    file.unlink()
    os.mkfifo(file)
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from merge_engine.models.statistics_cache import StatisticsCache\n"
        "StatisticsCache().load_or_make(Path(sys.argv[1]), lambda: {'gram': torch.ones(1)})\n"
    )
    subprocess.run([sys.executable, "-c", code, file], check=True, timeout=30)
    assert file.is_file()


def test_read_only_cache_is_done_without(models, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("MERGESEARCH_CACHE", str(tmp_path / "cache"))
    assert build(models, models / "out") == 0


def test_cache_of_a_user_that_is_none_is_one_line(models, monkeypatch, capsys):
    monkeypatch.setenv("MERGESEARCH_CACHE", "~nosuchuser")
    assert build(models, models / "out") == 2
    one_line(capsys, "MERGESEARCH_CACHE")


# Weights that change


@pytest.fixture
def big(tmp_path, make_model, make_study):
    """A study whose base is larger than what used to be sampled of it."""
    zoo = tmp_path / "zoo"
    make_model(zoo / "base", seed=0)
    for seed, name in enumerate("ab", 1):
        make_model(zoo / name, seed=seed, base=zoo / "base")
    for name in ("base", "a", "b"):
        path = zoo / name / "model.safetensors"
        tensors = load_file(path)
        tensors["model.extra.weight"] = torch.zeros(2_000_000)
        save_file(tensors, path, metadata={"format": "pt"})
    return zoo


def test_change_of_one_byte_anywhere_in_a_donor_is_another_fingerprint(big):
    from merge_engine.models.checkpoint import Checkpoint

    path = big / "a" / "model.safetensors"
    before, status = Checkpoint(str(big / "a")).fingerprint, path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2 + 70_001)
        file.write(b"\x01")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Checkpoint(str(big / "a")).fingerprint != before


def test_run_is_refused_when_a_donor_has_changed(done, run, capsys):
    path = done / "zoo" / "b" / "model.safetensors"
    whole, status = path.read_bytes(), path.stat()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    try:
        assert again(done, run) == 2
        one_line(capsys, "have changed since the run began")
    finally:
        path.write_bytes(whole)


# Finished checkpoints


@pytest.mark.parametrize("kind", ["cut", "flipped", "gone", "config", "link"])
def test_checkpoint_that_is_no_longer_whole_is_made_again_and_not_pushed(
    done, run, kind, capsys, monkeypatch
):
    from search.commands import runs

    weights = run / "checkpoint" / "model.safetensors"
    whole = weights.read_bytes()
    if kind == "cut":
        weights.write_bytes(whole[:-100])
    elif kind == "flipped":
        weights.write_bytes(whole[:-100] + bytes(50) + whole[-50:])
    elif kind == "gone":
        weights.unlink()
    elif kind == "link":
        weights.unlink()
        weights.symlink_to(done / "zoo" / "a" / "model.safetensors")
    else:
        (run / "checkpoint" / "config.json").write_text("{}")
    pushed = []
    monkeypatch.setattr(runs, "push_to_hub", lambda *a, **k: pushed.append(a) or "url")
    assert main(["push", str(run), "org/name"]) == 2
    one_line(capsys, str(run / "checkpoint"))
    assert not pushed
    assert again(done, run) == 0
    assert weights.read_bytes() == whole
    assert not weights.is_symlink()
    assert main(["push", str(run), "org/name"]) == 0
    assert pushed


def test_other_files_in_a_checkpoint_are_neither_pushed_nor_deleted(done, run, monkeypatch):
    from search.showing import hub

    (run / "checkpoint" / "passwords.txt").write_text("mine")
    (run / "checkpoint" / "key.json").symlink_to(done / "study" / "study.yaml")
    sent = []

    class Api:
        endpoint = "hub"

        def create_repo(self, repo, **_):
            return type("Url", (str,), {"repo_id": repo})(f"https://hub/{repo}")

        def create_commit(self, repo, additions, **_):
            sent.extend(one.path_in_repo for one in additions)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "get_token", lambda: "t")
    assert main(["push", str(run), "org/name"]) == 0
    assert {"passwords.txt", "key.json"}.isdisjoint(sent)
    assert {"model.safetensors", "README.md", "recipe.yaml"} <= {*sent}
    (run / "checkpoint" / "model.safetensors").write_bytes(b"cut")
    assert again(done, run) == 0
    assert [file.read_text() for file in run.glob("**/passwords.txt")] == ["mine"]


# Cards

FRONT = {
    "tags int": "tags: 5",
    "eval_results key": "eval_results: [x]",
    "eval_results and name": "model_name: x\neval_results: [5]",
    "null name": "model_name: null\neval_results: [{a: 1}]",
    "self": "self: 1",
    "int key": "5: x",
    "null key": "null: x",
    "date key": "2020-01-01: x",
    "to_dict": "to_dict: 5",
    "timestamp": "a: !!timestamp zz",
    "deep": "a: " + "[" * 3000,
    "int": "a: !!int zz",
    "bool": "a: !!bool zz",
    "date": "a: 2020-02-31",
    "duplicate": "license: mit\nlicense: apache",
    "model-index": "model-index: 5",
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "\n".join(
        f"{c}: &{c} [{','.join(['*' + b] * 9)}]"
        for b, c in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "control": 'license: "mit\\x1b[2J"',
    "huge": "license: " + "x" * 1_000_000,
}


@pytest.mark.parametrize("front", FRONT.values(), ids=FRONT)
def test_no_front_matter_of_a_donor_stops_a_card(front, models):
    from search.showing.card import _licence

    (models / "a" / "README.md").write_text(f"---\n{front}\n---\ntext\n")
    licence = _licence(str(models / "a"))
    assert all(len(text) < 1000 and text.isprintable() for text in licence.values())


@pytest.mark.parametrize("kind", ["folder", "pipe", "latin", "huge"])
def test_no_readme_of_a_donor_stops_a_card(kind, models):
    from search.showing.card import _licence

    readme = models / "a" / "README.md"
    {
        "folder": readme.mkdir,
        "pipe": lambda: os.mkfifo(readme),
        "latin": lambda: readme.write_bytes(b"---\nlicense: \xff\n---\n"),
        "huge": lambda: readme.write_bytes(b"---\n" + bytes(80_000_000)),
    }[kind]()
    thread = threading.Thread(target=lambda: _licence(str(models / "a")), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_failing_card_leaves_result_and_checkpoint(done, tmp_path, monkeypatch, capsys):
    import search.pipeline

    def broken(*_, **__):
        raise TypeError("card")

    monkeypatch.setattr(search.pipeline, "model_card", broken)
    assert again(done, tmp_path / "run") == 0
    assert (tmp_path / "run" / "result.json").is_file()
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()
    assert "card" in capsys.readouterr().out


# Code in task files

CODE = "from pathlib import Path\nPath({!r}).touch()\ndef f(*a, **k):\n    return a[0]\n"
CARRIERS = {
    "process_docs": {"process_docs": "!function evil.f"},
    "doc_to_text": {"doc_to_text": "!function evil.f"},
    "process_results": {"process_results": "!function evil.f"},
    "metric": {"metric_list": "[{metric: !function evil.f}]"},
    "class": {"class": "!function evil.f"},
    "custom_dataset": {"custom_dataset": "!function evil.f"},
    "filter": {
        "filter_list": "[{name: x, filter: [{function: custom, filter_fn: !function evil.f}]}]"
    },
    "include": {"include": "evil_base.yaml"},
}


def _set_keys(task, values):
    """Give a task file these keys, written as they are, in place of its own."""
    kept = {key: own for key, own in yaml.safe_load(task.read_text()).items() if key not in values}
    lines = [f"{key}: {value}\n" for key, value in values.items()]
    task.write_text(yaml.safe_dump(kept) + "".join(lines))


@pytest.mark.parametrize("command", ["check", "run", "score"])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_code_of_a_task_file_is_run_only_where_the_study_says_so(
    make_study, zoo, tmp_path, carrier, command, capsys
):
    if command != "check" and carrier not in ("process_docs", "class"):
        pytest.skip("one of each is enough")
    study = make_study(tmp_path / "study")
    tasks, ran = tmp_path / "study" / "tasks", tmp_path / "ran"
    (tasks / "evil.py").write_text(CODE.format(str(ran)))
    (tasks / "evil_base.yaml").write_text("process_docs: !function evil.f\n")
    _set_keys(tasks / "pick.yaml", CARRIERS[carrier])
    arguments = {
        "check": ["check", str(study)],
        "run": ["run", str(study), "--out", str(tmp_path / "run")],
        "score": ["score", str(zoo / "a"), str(study)],
    }[command]
    assert main([*arguments, "--device", "cpu"]) == 2
    assert not ran.exists()
    one_line(capsys, "pick", "trust_task_code")
    assert not (tmp_path / "run").exists()
    spec = yaml.safe_load(study.read_text())
    spec["objective"]["trust_task_code"] = True
    study.write_text(yaml.safe_dump(spec))
    main(["check", str(study), "--device", "cpu"])
    assert ran.exists()


TEMPLATES = (
    "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ question|attr('__class__') }}",
)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("key", ["doc_to_text", "description"])
def test_template_of_a_task_reaches_no_python(make_study, tmp_path, template, key, capsys):
    study = make_study(tmp_path / "study")
    file, ran = tmp_path / "study" / "tasks" / "pick.yaml", tmp_path / "ran"
    task = yaml.safe_load(file.read_text()) | {key: template.replace("RAN", str(ran))}
    file.write_text(yaml.safe_dump(task))
    code = main(["check", str(study), "--device", "cpu"])
    assert not ran.exists()
    if key == "doc_to_text":
        assert code == 2
        one_line(capsys, "pick")


def test_metric_that_is_a_script_beside_a_task_is_not_run(make_study, tmp_path, capsys):
    study = make_study(tmp_path / "study")
    tasks, ran = tmp_path / "study" / "tasks", tmp_path / "ran"
    (tasks / "mymetric").mkdir()
    (tasks / "mymetric" / "mymetric.py").write_text(CODE.format(str(ran)))
    task = yaml.safe_load((tasks / "pick.yaml").read_text())
    task["metric_list"] = [{"metric": "mymetric", "aggregation": "mean", "higher_is_better": True}]
    (tasks / "pick.yaml").write_text(yaml.safe_dump(task))
    assert main(["check", str(study), "--device", "cpu"]) == 2
    assert not ran.exists()
    one_line(capsys, "pick")


# Links in a run folder that somebody else has made


@pytest.mark.parametrize(
    "name",
    ["lock", "report.html.partial", "recipe.yaml", "result.json", "study.db", "samples.json"],
)
def test_link_in_a_run_folder_is_not_written_through(done, run, tmp_path, name):
    target = tmp_path / "precious"
    target.write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    again(done, run)
    assert target.read_text() == "mine"


def test_checkpoint_that_is_a_link_is_not_written_through(done, run, tmp_path, capsys):
    shutil.move(run / "checkpoint", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("mine")
    (run / "checkpoint").symlink_to(tmp_path / "elsewhere")
    again(done, run)
    assert (tmp_path / "elsewhere" / "README.md").read_text() == "mine"
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()


def test_report_beside_a_file_of_the_users_leaves_it(done, tmp_path):
    (tmp_path / "page.html.partial").write_text("mine")
    assert main(["report", str(done / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html.partial").read_text() == "mine"


def test_report_does_not_take_the_place_of_what_is_no_file(done, tmp_path, capsys):
    os.mkfifo(tmp_path / "page.html")
    assert main(["report", str(done / "run"), "--out", str(tmp_path / "page.html")]) == 2
    one_line(capsys, "page.html is a named pipe", "name a file")
    assert (tmp_path / "page.html").is_fifo()


# Secrets

URLS = (
    "postgresql+psycopg://u:hunter2@127.0.0.1:1/db",
    "postgresql+psycopg://u@127.0.0.1:1/db?password=hunter2",
    "postgresql+psycopg://u@127.0.0.1:1/db?passwd=hunter2",
    "postgresql+psycopg://u@127.0.0.1:1/db?token=hunter2",
    "postgresql+psycopg://u@127.0.0.1:1/db?api_key=hunter2",
    "postgresql+psycopg://u:x@hunter2@127.0.0.1:1/db",
    "postgresql+psycopg://u:x@a/hunter2@127.0.0.1:1/db",
    "mysql://u:x@hunter2@127.0.0.1:1/db",
    "postgresql+psycopg://u:hunter2/@127.0.0.1:x/db",
    "hunter2://u:hunter2@h/db",
    "sqlite://u:hunter2@h/db",
)


@pytest.mark.parametrize("url", URLS)
def test_no_password_of_a_database_is_printed(make_study, tmp_path, url, capfd):
    study = make_study(tmp_path / "study")
    code = main(["run", str(study), "--out", str(tmp_path / "run"), "--storage", url])
    out, error = capfd.readouterr()
    assert code in (1, 2)
    assert "hunter2" not in out + error
    assert error.count("\n") == 1


def test_run_folder_and_database_are_private(done):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (done / "run").iterdir()}
    assert stat.S_IMODE((done / "run").stat().st_mode) == 0o700
    assert modes[DATABASE] == modes["samples.json"] == 0o600


@pytest.mark.parametrize(
    "file", ["result.json", "report.html", "checkpoint/README.md", "checkpoint/mergekit_config.yml"]
)
def test_nothing_for_others_has_a_path_of_this_machine(done, file):
    text = (done / "run" / file).read_text()
    assert str(done) not in text
    assert str(Path.home()) not in text.replace(str(Path.home()) + "/.", "")


# Damaged run folders and databases

STORAGES = {
    "garbage": b"garbage",
    "empty": b"",
    "list": b"[]",
    "no keys": b"{}",
    "bad url": b'{"url": "::", "study": "x"}',
    "binary": b"\xff\x00\xfe",
    "numbers": b'{"url": 5, "study": 5}',
    "deep": b"[" * 100_000,
}
COMMANDS = {
    "report": lambda done, run: main(["report", str(run)]),
    "run": again,
    "export": lambda done, run: main(["export", str(run), str(run.parent / "out")]),
    "sample": lambda done, run: main(["sample", str(run), "--prompt", "x"]),
    "push": lambda done, run: main(["push", str(run), "org/name"]),
}


@pytest.mark.parametrize("command", ["report", "run"])
@pytest.mark.parametrize("text", STORAGES.values(), ids=STORAGES)
def test_damaged_storage_json_is_one_line(done, run, text, command, capsys):
    (run / "storage.json").write_bytes(text)
    assert COMMANDS[command](done, run) == 2
    one_line(capsys, "storage.json")


def edit_result(run, edit):
    file = run / "result.json"
    result = json.loads(file.read_text())
    edit(result)
    file.write_text(json.dumps(result))


RESULTS = {
    "other kind": lambda run: edit_result(run, lambda r: r["winner"].update(recipe={"a": 1})),
    "recipe text": lambda run: edit_result(
        run, lambda r: r["winner"]["recipe"].update(merge_method="nothing")
    ),
    "no donor": lambda run: edit_result(
        run, lambda r: r["difference_to_best_donor"].update(donor="nobody")
    ),
    "trial": lambda run: edit_result(run, lambda r: r["winner"].update(trial=99)),
    "folder": lambda run: ((run / "result.json").unlink(), (run / "result.json").mkdir()),
    "garbage": lambda run: (run / "result.json").write_bytes(b"\xff{"),
    "recipe gone": lambda run: (run / "recipe.yaml").unlink(),
    "samples": lambda run: (run / "samples.json").write_text("[]"),
}


@pytest.mark.parametrize("command", ["report", "push"])
@pytest.mark.parametrize("damage", RESULTS.values(), ids=RESULTS)
def test_damaged_result_is_one_line_or_done_without(done, run, damage, command, capsys):
    damage(run)
    code = COMMANDS[command](done, run)
    error = capsys.readouterr().err
    assert code in (0, 2)
    assert code == 0 or (error.startswith("mergesearch: ") and error.count("\n") == 1)


@pytest.mark.parametrize("damage", RESULTS.values(), ids=RESULTS)
def test_damaged_result_is_made_again_by_the_run(done, run, damage, capsys):
    damage(run)
    code = again(done, run)
    error = capsys.readouterr().err
    assert code in (0, 2)
    assert code == 0 or (error.startswith("mergesearch: ") and error.count("\n") == 1)


@pytest.mark.parametrize("paths", ["{}", "[", None])
def test_result_whose_paths_are_lost_is_not_taken_for_other_folders(
    done, run, tmp_path, monkeypatch, paths, capsys
):
    if paths is None:
        (run / "paths.json").unlink()
    else:
        (run / "paths.json").write_text(paths)
    shutil.copytree(done / "zoo", tmp_path, dirs_exist_ok=True)  # of the same names
    monkeypatch.chdir(tmp_path)
    for command in ("export", "sample"):
        assert COMMANDS[command](done, run) == 2
        one_line(capsys, "paths.json", "run the study again")
    assert again(done, run) == 0
    assert COMMANDS["sample"](done, run) == 0


def test_result_of_another_run_is_refused_until_the_run_writes_its_own(done, run, capsys):
    whole = (run / "result.json").read_text()
    edit_result(run, lambda r: r["winner"]["recipe"].update(seed=77, out_dtype="float16"))
    for command in ("report", "export", "sample"):
        assert COMMANDS[command](done, run) == 2
        one_line(capsys, "result.json", "run the study again")
    assert again(done, run) == 0
    mine, theirs = (json.loads(text) for text in ((run / "result.json").read_text(), whole))
    assert mine["winner"] == theirs["winner"]


@pytest.mark.parametrize("kind", ["checksums.txt", "model.safetensors", "recipe", "all"])
def test_pipe_in_a_checkpoint_is_not_opened(done, run, kind, capsys):
    checkpoint = run / "checkpoint"
    if kind == "all":
        shutil.rmtree(checkpoint)
        checkpoint.write_text("no folder")
    else:
        file = checkpoint / ("mergekit_config.yml" if kind == "recipe" else kind)
        file.unlink()
        os.mkfifo(file)
    assert main(["push", str(run), "org/name"]) == 2
    one_line(capsys, str(checkpoint))
    assert again(done, run) == 0
    assert (checkpoint / "model.safetensors").is_file()


OTHER_DATABASES = {
    "empty": lambda file: file.write_bytes(b""),
    "of something else": lambda file: (file.unlink(), make_table(file)),
    "gone": lambda file: remember(file),
}


def make_table(file):
    with sqlite3.connect(file) as database:
        database.execute("create table cats (name text)")
    database.close()


def remember(file):
    url = f"sqlite:///{file.parent / 'gone.db'}"
    (file.parent / "storage.json").write_text(json.dumps({"url": url, "study": "x"}))


@pytest.mark.parametrize("command", ["report", "export", "sample"])
@pytest.mark.parametrize("damage", OTHER_DATABASES.values(), ids=OTHER_DATABASES)
def test_database_of_no_run_is_refused_and_nothing_is_made_in_it(
    done, run, damage, command, capsys
):
    damage(run / DATABASE)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert COMMANDS[command](done, run) == 2
    one_line(capsys, "sqlite:////", "restore it")
    after = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert after == before


@pytest.mark.parametrize("kind", ["empty", "of something else"])
def test_run_does_not_begin_anew_in_a_database_that_has_lost_its_tables(done, run, kind, capsys):
    OTHER_DATABASES[kind](run / DATABASE)
    assert again(done, run) == 2
    one_line(capsys, DATABASE, "not a run's database", "--force-new")
    assert again(done, run, "--force-new") == 0


DATABASES = {
    "spec garbage": "update study_user_attributes set value_json = '{' where key = 'spec'",
    "spec list": "update study_user_attributes set value_json = '[5]' where key = 'spec'",
    "spec number": "update study_user_attributes set value_json = '5' where key = 'spec'",
    "weights gone": "delete from study_user_attributes where key = 'weights'",
    "baselines gone": "delete from study_user_attributes where key = 'baselines'",
    "items gone": "delete from mergesearch_items",
    "item changed": "update mergesearch_items set gold = 'x' where place = 3",
    "item of bytes": "update mergesearch_items set key = x'ff' where place = 3",
    "answers of bytes": "update mergesearch_answers set margins = x'ff' where block = 0",
    "answers gone": "delete from mergesearch_answers",
    "block gone": "delete from mergesearch_answers where block = 0 and split = 'test'",
    "answers nan": "update mergesearch_answers set answers = replace(answers, '0.0', 'NaN')",
    "answers short": "update mergesearch_answers set answers = '[1.0]'",
    "answers garbage": "update mergesearch_answers set answers = 'x['",
    "answer changed": "update mergesearch_answers set answers = replace(answers, '[0.0', '[1.0') "
    "where split = 'test'",
    "parameters gone": "delete from trial_params",
    "parameter changed": "update trial_params set param_value = param_value * 0.5",
    "values gone": "delete from trial_values",
    "value changed": "update trial_values set value = value + 0.25 where trial_id = 1",
    "split no text": "update mergesearch_answers set split = cast(x'73ff' as text) where rowid = 1",
    "rules no text": "update mergesearch_items set rules = cast(x'73ff' as text) where place = 1",
    "value null": "update trial_values set value = null where trial_id = 2",
    "value nan": "update trial_values set value = null, value_type = 'INF_POS'",
    "recipe changed": "update trial_user_attributes set value_json = '\"x\"' where key = 'recipe'",
    "state none": "update trials set state = 'x'",
    "variance text": "update trial_user_attributes set value_json = '\"x\"' where key = 'variance'",
    "other version": "update version_info set schema_version = 99",
    "table gone": "drop table trial_values",
    "answers table gone": "drop table mergesearch_answers",
    "trials gone": "delete from trials",
    "study gone": "delete from studies",
}


def damage_database(run, statement):
    with sqlite3.connect(run / DATABASE) as database:
        assert database.execute(statement) is not None
    database.close()


@pytest.mark.parametrize("command", ["report", "run"])
@pytest.mark.parametrize("statement", DATABASES.values(), ids=DATABASES)
def test_damaged_database_is_one_line_or_harmless(done, run, statement, command, capsys):
    before = json.loads((run / "result.json").read_text())
    damage_database(run, statement)
    code = COMMANDS[command](done, run)
    error = capsys.readouterr().err
    assert code in (0, 2)
    assert code == 0 or (error.startswith("mergesearch: ") and error.count("\n") == 1)
    after = json.loads((run / "result.json").read_text())
    for each in (before, after):
        del (
            each["seconds"],
            each["item_evaluations"],
            each["split_evaluations"],
            each["times_tested"],
        )
    assert after == before


# Faults as users have them


@pytest.mark.parametrize("statement", [1, 4, 12, 18])
def test_kill_while_tables_are_made_is_gone_on_from(done, tmp_path, statement):
    code = (
        "import os, signal, sys\n"
        "from sqlalchemy import event\n"
        "from sqlalchemy.engine import Engine\n"
        "seen = []\n"
        "@event.listens_for(Engine, 'after_cursor_execute')\n"
        "def kill(conn, cursor, statement, *rest):\n"
        "    if statement.lstrip().upper().startswith(('CREATE', 'INSERT')):\n"
        "        seen.append(statement)\n"
        "        if len(seen) == int(sys.argv[1]):\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "from pathlib import Path\n"
        "from search.storing.folder import locked\n"
        "from search.storing.store import Store\n"
        "with locked(Path(sys.argv[2])):\n"
        "    Store(Path(sys.argv[2]) / 'study.db')\n"
    )
    run = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", code, str(statement), str(run)])
    assert killed.returncode == -9
    assert again(done, run) == 0


def test_sigterm_stops_a_run_like_ctrl_c(done, tmp_path, make_study):
    study = make_study(tmp_path / "study", search__trials=200)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "search.cli", "run", str(study), "--out", str(run)]
    process = subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(told_answers(run)):
        time.sleep(0.05)
    process.terminate()
    error = process.communicate(timeout=60)[1]
    assert process.returncode in (130, 143)
    assert "repeat the command to continue" in error


def told_answers(run):
    try:
        with sqlite3.connect(f"file:{run / DATABASE}?mode=ro", uri=True) as database:
            return database.execute("select block from mergesearch_answers").fetchall()
    except sqlite3.Error:
        return []


def test_closed_standard_output_is_no_traceback(models):
    command = f"{sys.executable} -m search.cli check {models / 'recipe.yaml'} --device cpu >&-"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1)


def test_reader_that_goes_away_is_no_traceback(models):
    command = f"{sys.executable} -m search.cli check {models / 'recipe.yaml'} --device cpu | true"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("before", "code", "says"),
    [
        ("ulimit -f 20", 1, "File too large; when there is space"),
        ("mkdir gone; cd gone; rmdir ../gone", 2, "current folder has been removed"),
    ],
)
def test_fault_of_the_surroundings_is_one_line(models, before, code, says):
    command = f"{before}; {sys.executable} -m search.cli build recipe.yaml out"
    done = subprocess.run(["bash", "-c", command], cwd=models, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert says in done.stderr


def test_letters_that_the_terminal_lacks_are_escaped(models):
    command = [sys.executable, "-m", "search.cli", "build", "recipe.yaml", "out±"]
    surroundings = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=models, capture_output=True, text=True, env=surroundings)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(r"out\xb1: ")


@pytest.mark.parametrize("megabytes", [300, 1200])
def test_too_little_memory_is_one_line(models, megabytes):
    command = f"ulimit -v {megabytes * 1024}; {sys.executable} -m search.cli build recipe.yaml out"
    done = subprocess.run(
        ["bash", "-c", command], cwd=models, capture_output=True, text=True, timeout=100
    )
    if done.returncode:
        assert "Traceback" not in done.stderr
        assert done.returncode in (1, 2)
    assert not list(models.glob("out.*"))


def test_clock_that_runs_backwards_ends_nothing(done, tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    thread = threading.Thread(target=again, args=(done, tmp_path / "run"), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert (tmp_path / "run" / "result.json").is_file()


def test_donor_cut_short_while_it_is_mapped_is_one_line_and_leaves_nothing_half(models):
    code = (
        "import os, sys, search.cli as c, merge_engine.building.merging as b\n"
        "merge, count = b.merge_tensor, iter(range(999))\n"
        "def cut(*a):\n"
        "    if next(count) == 3:\n"
        "        os.truncate('a/model.safetensors', 100)\n"
        "    return merge(*a)\n"
        "b.merge_tensor = cut\n"
        "sys.exit(c.main(['build', 'recipe.yaml', 'out', '--device', 'cpu']))\n"
    )
    whole = (models / "a" / "model.safetensors").read_bytes()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=models, capture_output=True, text=True)
    assert done.returncode == 2, done  # not by SIGBUS
    assert done.stderr.count("\n") == 1
    assert "a/model.safetensors: was cut short or removed while it was read" in done.stderr
    assert not list(models.glob("out*"))
    (models / "a" / "model.safetensors").write_bytes(whole)
    assert build(models, models / "out") == 0
    assert [path.name for path in models.glob("out*")] == ["out"]


def cut_short(path):
    os.truncate(path, 100)


def treble(path):
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 3
    save_file(tensors, path, metadata={"format": "pt"})


def answers_of(run):
    with sqlite3.connect(run / DATABASE) as database:
        columns = "recipe, split, block, answers"
        return {*database.execute(f"select {columns} from mergesearch_answers")}


@pytest.mark.parametrize(("change", "on_disk"), [(cut_short, True), (treble, False)])
def test_donor_changed_while_a_run_goes_on_stops_it_and_restored_it_goes_on(
    make_study, models, monkeypatch, capsys, change, on_disk
):
    from search.running.workers import LocalWorker

    donor = models / "a" / "model.safetensors"
    whole = donor.read_bytes()
    study = make_study(
        models / "study",
        models=[str(models / "a"), str(models / "b")],
        search__trials=4,
        search__methods=["task_arithmetic"],
    )
    ask, asked = LocalWorker.next, []

    def next_of(worker):
        asked.append(0)
        if len(asked) == 5:
            change(donor)
        return ask(worker)

    if on_disk:
        place = ModelSet.place
        monkeypatch.setattr(ModelSet, "place", lambda own, device, _: place(own, device, ON_DISK))
    monkeypatch.setattr(LocalWorker, "next", next_of)
    command = ["run", str(study), "--out", str(models / "run"), "--device", "cpu"]
    assert main(command) == 2
    one_line(capsys, "a have changed", "restore them")
    assert not (models / "run" / "result.json").exists()
    before = answers_of(models / "run")
    donor.write_bytes(whole)
    assert main(command) == 0
    assert before
    assert before <= answers_of(models / "run")


# Names in a terminal and on the page


@pytest.mark.parametrize("name", ["m[/b]", "m[bold red]x", "m\x1b[2Jx", "m\u202ex", "~nosuchuser"])
def test_no_name_of_a_model_is_markup_or_moves_a_cursor(make_study, zoo, tmp_path, name, capsys):
    study = make_study(tmp_path / "study", objective__items={"search": 8, "select": 8, "test": 8})
    shutil.copytree(zoo / "a", tmp_path / name)
    code = main(["score", str(tmp_path / name), str(study), "--device", "cpu"])
    out, error = capsys.readouterr()
    assert code == 0
    assert "\x1b" not in out + error
    assert "\u202e" not in out + error
    if "[" in name:
        assert name.split("m", 1)[1].removeprefix("\x1b") in (out + error).replace("\n", "")


def test_page_has_a_policy_that_lets_nothing_in(done):
    page = (done / "run" / "report.html").read_text()
    assert 'http-equiv="Content-Security-Policy"' in page
    assert "default-src 'none'" in page
    assert "script-src 'sha256-" in page
