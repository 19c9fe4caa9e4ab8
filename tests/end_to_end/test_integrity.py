"""Nothing silently wrong, nothing let out: outputs, links, caches, databases, cards, task code.

Each row is a thing that has happened to somebody, or that somebody might do to them.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge_engine.models.statistics_cache import StatisticsCache
from search.cli import main

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
    import search.steps

    def broken(*_, **__):
        raise TypeError("card")

    monkeypatch.setattr(search.steps, "model_card", broken)
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
    with (tasks / "pick.yaml").open("a") as file:
        file.writelines(f"{key}: {value}\n" for key, value in CARRIERS[carrier].items())
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
