"""Processes of one host share one copy of a pack, for as long as one of them lives."""

import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_engine.models.model_set import ModelSet
from merge_engine.models.placement import Budget
from merge_engine.models.shared_packs import can_share, share
from pack_holder import SIZE, holder, mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shares nothing elsewhere")


@pytest.fixture
def models(zoo, tmp_path):
    """Two models of this test's own: what others share is not theirs."""
    for name in ("base", "a"):
        shutil.copytree(zoo / name, tmp_path / name)
        change(tmp_path / name)
    return [tmp_path / "base", tmp_path / "a"]


def change(model):
    """Store numbers in the first tensor that nobody else has."""
    file, generator = model / "model.safetensors", torch.Generator()
    generator.seed()
    tensors = load_file(file)
    next(iter(tensors.values())).normal_(generator=generator)
    save_file(tensors, file, {"format": "pt"})


def ended(process):
    process.kill()
    process.wait()


def test_two_processes_have_one_copy_and_the_numbers_of_the_files(models):
    with holder(*models) as (_, first), holder(*models) as (second, said):
        assert said["files"] == first["files"]
        assert len(said["files"]) == 2  # a pack of each model
        assert said["digest"] == first["digest"]
        half = said["size"] / 2
        assert said["proportional"] == pytest.approx(half, rel=0.05, abs=1 << 14)
        second.stdin.close()
    with holder("--limited", *models) as (_, private):
        assert private["digest"] == said["digest"]


def test_two_processes_that_start_together_lay_one_copy(models):
    with ThreadPoolExecutor() as threads:
        holders = [holder(*models), holder(*models)]
        found = [*threads.map(lambda each: each.__enter__(), holders)]
        assert found[0][1]["files"] == found[1][1]["files"]
        for each in holders:
            each.__exit__(None, None, None)


def test_copy_outlives_the_process_that_laid_it_and_ends_with_the_last(models):
    with holder(*models) as (first, laid), holder(*models) as (second, _):
        ended(first)
        with holder(*models) as (third, said):
            assert said["files"] == laid["files"]
            ended(second)
            ended(third)
    with holder(*models) as (_, again):
        assert again["digest"] == laid["digest"]
        assert not {*again["files"]} & {*laid["files"]}


def test_pack_of_a_process_killed_while_it_filled_it_is_filled_by_the_next(tmp_path):
    with ThreadPoolExecutor() as threads, holder("--stall", tmp_path) as (process, said):
        assert said == {"filling": True}
        waiting = threads.submit(share, [tmp_path], SIZE, lambda out: out.fill_(7))
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1)
        process.kill()
        assert waiting.result().unique().tolist() == [7]


def test_model_altered_on_disk_has_another_copy(models):
    with holder(*models) as (_, before):
        change(models[1])
        with holder(*models) as (_, after):
            assert len({*before["files"]} & {*after["files"]}) == 1  # the base's
            assert before["digest"] != after["digest"]


def test_where_no_file_may_grow_each_process_has_its_own_packs(models):
    with holder(*models) as (_, shared), holder("--limited", *models) as (_, found):
        assert found["files"] == shared["files"]  # which another has laid
    with holder("--limited", *models) as (_, private):
        assert private["files"] == []
        assert private["digest"] == shared["digest"]


def test_nobody_can_write_to_a_shared_pack(tmp_path):
    with holder("--write", tmp_path) as (process, said):
        assert said == {"first": 1}
        process.stdin.close()
        assert process.wait() == -signal.SIGSEGV


def test_error_while_a_pack_is_filled_is_raised_and_leaves_nothing(tmp_path):
    def fail(_out):
        raise ValueError("not finite")

    with pytest.raises(ValueError, match="not finite"):
        share([tmp_path], SIZE, fail)
    assert share([tmp_path], SIZE, lambda out: out.fill_(3)).unique().tolist() == [3]


def test_single_process_shares_nothing(models):
    assert can_share()
    model_set, before = ModelSet.open(map(str, models)), mapped()
    model_set.place(torch.device("cpu"), Budget(device=1 << 62))
    model_set.check_finite()
    assert mapped() == before
