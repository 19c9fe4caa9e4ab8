"""Cached statistics of donors: equal to computed ones, and never those of other weights."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors.torch import save_file

from merge_engine.models import statistics_cache
from merge_engine.models.model_set import ModelSet
from merge_engine.models.statistics_cache import CHECKS, StatisticsCache, default_folder
from merge_engine.numerics.order_statistics import Magnitudes, Variances
from merge_engine.numerics.packing import TensorPack
from search.cli import main

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGESEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two donors with one tensor of 90,000 elements, enough to be kept on disk."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for name in ("base", "a", "b"):
        path = tmp_path_factory.mktemp("models") / name
        path.mkdir()
        (path / "config.json").write_text("{}")
        save_file({NAME: torch.randn(300, 300, generator=generator)}, path / "model.safetensors")
        paths.append(str(path))
    return paths


def files(folder):
    """Files of the cache and others, without the notes of checksums."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return [path for path in found if path.parent != folder / "checksums"]


def replace(file, contents):
    file.unlink()  # what has the old one mapped keeps it
    file.write_bytes(contents)


def forbidden(*_):
    raise AssertionError("measured again")


def measured(models):
    model_set = ModelSet.open(models)
    base, *donors = models
    return {
        "magnitudes": model_set.measurements.magnitudes(NAME, donors[0], base).tensors(),
        "variances": model_set.measurements.variances(NAME, tuple(donors), base).tensors(),
        "gram": {"": model_set.measurements.gram(NAME, tuple(donors), base)},
        "gram of rows": {"": model_set.measurements.gram(NAME, tuple(donors), None, dim=-1)},
    }


def assert_same(one, other):
    for kind, tensors in one.items():
        assert tensors.keys() == other[kind].keys()
        assert all(torch.equal(tensor, other[kind][name]) for name, tensor in tensors.items())


def test_second_model_set_measures_nothing(models, folder, monkeypatch):
    first = measured(models)
    assert len(files(folder)) == 4
    assert all(file.suffix == ".safetensors" for file in files(folder))
    monkeypatch.setattr(Magnitudes, "of", forbidden)
    monkeypatch.setattr(Variances, "of", forbidden)
    monkeypatch.setattr("merge_engine.models.measurements.gram_by_row", forbidden)
    assert_same(first, measured(models))


def test_each_statistic_has_its_own_file(models, folder):
    model_set = ModelSet.open(models)
    base, one, other = models
    model_set.measurements.magnitudes(NAME, one, base)
    model_set.measurements.magnitudes(NAME, other, base)
    model_set.measurements.gram(NAME, (one, other), base)
    model_set.measurements.gram(NAME, (other, one), base)
    model_set.measurements.gram(NAME, (one, other, base), None)
    assert len(files(folder)) == 5


def test_what_is_as_large_as_the_weights_is_kept_for_studies_alone(models, folder, monkeypatch):
    base, donor, _ = models
    delta = ModelSet.open(models).read(donor, NAME) - ModelSet.open(models).read(base, NAME)
    order = delta.abs().argsort(dim=1, stable=True).argsort(dim=1)
    pack = TensorPack({NAME: tuple(delta.shape)})
    kinds = ("rank_share", "salience_mask")
    first = [ModelSet.open(models).measurements.elementwise(k, pack, donor, base) for k in kinds]
    assert not files(folder)
    study = ModelSet.open(models, candidates=2).measurements
    for kind, once in zip(kinds, first, strict=True):
        assert torch.equal(study.elementwise(kind, pack, donor, base), once)
    assert len(files(folder)) == 2
    monkeypatch.setattr("merge_engine.models.measurements.row_ranks", forbidden)
    study = ModelSet.open(models, candidates=2).measurements
    again = study.elementwise("rank_share", pack, donor, base)
    assert torch.equal(again, (255 * order / (delta.shape[1] - 1)).round().byte())


def test_small_tensors_are_measured_each_time(zoo, folder):
    model_set = ModelSet.open([str(zoo / "base"), str(zoo / "a")])
    model_set.measurements.magnitudes(NAME, str(zoo / "a"), str(zoo / "base"))
    assert not files(folder)


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"\x10" * 5000])
def test_damaged_file_is_measured_again(models, folder, damage):
    first = measured(models)
    for file in files(folder):
        replace(file, damage)
    assert_same(first, measured(models))
    assert all(file.read_bytes() != damage for file in files(folder))


def test_file_cut_short_is_measured_again(models, folder):
    first = measured(models)
    for file in files(folder):
        replace(file, file.read_bytes()[:-4])
    assert_same(first, measured(models))


def test_folder_that_cannot_be_written_is_harmless(models, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MERGESEARCH_CACHE", str(tmp_path / "file" / "cache"))
    first = measured(models)
    assert_same(first, measured(models))


def test_failed_write_leaves_nothing(models, folder, monkeypatch):
    def full(_tensors, file, _metadata):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(statistics_cache, "save_file", full)
    measured(models)
    assert not files(folder)


def test_folder_is_the_users_cache_unless_named(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_folder() != Path("/x/mergesearch")
    monkeypatch.delenv("MERGESEARCH_CACHE")
    assert default_folder() == Path("/x/mergesearch")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "mergesearch"


# The limit

DIGESTS = [f"{number:x}" * 40 for number in range(6)]


def stored(folder, names, size=1000):
    """Files of the cache of so many bytes, each older than the next."""
    cached = []
    for age, name in enumerate(reversed(names)):
        file = folder / name[:2] / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))
        os.utime(file, (1e9 - age, 1e9 - age))
        cached.append(file)
    return cached[::-1]


def test_least_recently_used_files_are_removed_until_the_limit_holds(folder, monkeypatch):
    cached = stored(folder, DIGESTS)
    monkeypatch.setenv("MERGESEARCH_CACHE_LIMIT", "3500")
    assert StatisticsCache().trim() == 3500
    assert [file.exists() for file in cached] == [False, False, False, True, True, True]
    StatisticsCache().trim()
    assert len(files(folder)) == 3


def test_hit_makes_a_file_the_last_to_go(folder, monkeypatch):
    cached = stored(folder, DIGESTS)
    cached[0].unlink()
    tensor = {"x": torch.ones(3)}
    monkeypatch.setenv("MERGESEARCH_CACHE_LIMIT", "10000")
    StatisticsCache().load_or_make(cached[0], lambda: tensor)
    os.utime(cached[0], (1, 1))
    assert torch.equal(StatisticsCache().load_or_make(cached[0], forbidden)["x"], tensor["x"])
    monkeypatch.setenv("MERGESEARCH_CACHE_LIMIT", "999")
    StatisticsCache().trim()
    assert files(folder) == [cached[0]]


def test_nothing_but_the_caches_own_files_is_counted_or_removed(folder, monkeypatch):
    (file,) = stored(folder, DIGESTS[:1])
    left = file.with_name(f"{file.name}.x1y2.partial")  # of a process that was killed
    file.rename(left)
    others = [folder / "notes.txt", folder / "00" / "model.safetensors"]
    for other in others:
        other.write_bytes(bytes(5000))
    monkeypatch.setenv("MERGESEARCH_CACHE_LIMIT", "1000")
    StatisticsCache().trim()
    assert left.exists()
    monkeypatch.setenv("MERGESEARCH_CACHE_LIMIT", "999")
    StatisticsCache().trim()
    assert sorted(files(folder)) == sorted(others)


@pytest.mark.parametrize(
    ("free", "held", "expected"),
    [(10**13, 0, 20 << 30), (10**9, 10**9, 2 * 10**8), (0, 0, 0), (0, 10**9, 10**8)],
)
def test_limit_is_a_tenth_of_the_space_and_20_gib_at_most(
    folder, monkeypatch, free, held, expected
):
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage)
    assert StatisticsCache().limit(held) == expected
    monkeypatch.setenv("MERGESEARCH_CACHE_LIMIT", "2GiB")
    assert StatisticsCache().limit(held) == 2 << 30


@pytest.mark.parametrize("wrong", ["lots", "-1GB", "inf", "nan", "5XB"])
def test_wrong_limit_is_refused_before_any_work(monkeypatch, capsys, tmp_path, wrong):
    monkeypatch.setenv("MERGESEARCH_CACHE_LIMIT", wrong)
    assert main(["check", str(tmp_path / "no.yaml")]) == 2
    assert f"$MERGESEARCH_CACHE_LIMIT: {wrong!r} is not a size" in capsys.readouterr().err


def test_folder_is_measured_at_first_and_once_in_a_64th_of_the_limit(folder, monkeypatch):
    measured_at, trim = [], StatisticsCache.trim
    monkeypatch.setattr(
        StatisticsCache, "trim", lambda self: measured_at.append(len(files(folder))) or trim(self)
    )
    tensor = {"x": torch.zeros(1000, dtype=torch.uint8)}
    digests = [f"{number:040x}" for number in range(30)]
    cached = [folder / digest[:2] / f"{digest}.safetensors" for digest in digests]
    StatisticsCache().load_or_make(cached[0], lambda: tensor)
    size = cached[0].stat().st_size
    monkeypatch.setenv("MERGESEARCH_CACHE_LIMIT", str(10 * size * CHECKS))
    cache = StatisticsCache()
    for file in cached[1:]:
        cache.load_or_make(file, lambda: tensor)
    assert measured_at == [1, 2, 12, 22]


def test_statistics_stay_within_the_limit_and_are_right_without_their_files(
    models, folder, monkeypatch
):
    first = measured(models)
    sizes = [file.stat().st_size for file in files(folder)]
    shutil.rmtree(folder)
    monkeypatch.setenv("MERGESEARCH_CACHE_LIMIT", str(max(sizes)))
    assert_same(first, measured(models))
    assert 0 < sum(file.stat().st_size for file in files(folder)) <= max(sizes) * (1 + 1 / CHECKS)
    monkeypatch.setenv("MERGESEARCH_CACHE_LIMIT", "0")
    shutil.rmtree(folder)
    assert_same(first, measured(models))
    assert not files(folder)


def test_files_that_others_remove_meanwhile_are_no_error(folder, monkeypatch):
    cached = stored(folder, DIGESTS)
    stat, gone = Path.stat, set(cached[:2])

    def raced(path, **options):
        if path in gone:
            path.unlink()
            gone.remove(path)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", raced)
    monkeypatch.setenv("MERGESEARCH_CACHE_LIMIT", "2000")
    StatisticsCache().trim()
    assert sorted(files(folder)) == sorted(cached[4:])


def test_one_of_several_workers_measures_what_all_of_them_lack(folder):
    file, made = StatisticsCache().file_of("kind", [("print", "x")]), []
    both_began = Barrier(2)

    def work(_):
        both_began.wait()
        return StatisticsCache().load_or_make(file, make)["x"]

    def make():
        made.append(1)
        time.sleep(0.2)
        return {"x": torch.arange(5)}

    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(work, range(2))]
    assert [tensor.tolist() for tensor in found] == [[0, 1, 2, 3, 4]] * 2
    assert len(made) == 1
