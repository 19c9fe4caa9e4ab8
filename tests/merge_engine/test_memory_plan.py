import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from merge_engine.errors import MergeError
from merge_engine.models import memory_plan as memory
from merge_engine.models.memory_plan import (
    COMPILING,
    LATER,
    USABLE,
    Allowance,
    ForwardPasses,
    Models,
    plan_memory,
)
from merge_engine.models.model_set import ModelSet
from search.cli import main
from search.preparing.context import plan_study
from search.preparing.models import Hardware
from search.study.reading import load_study


@pytest.fixture
def models(zoo):
    return ModelSet.open(str(zoo / name) for name in ("base", "a", "b"))


def planned(models, device, limit=None, methods=(), **passes):
    merged = Models(models.tensors, 3, torch.bfloat16, methods)
    return plan_memory(merged, device, passes=ForwardPasses(**passes), allowed=Allowance(limit))


@pytest.fixture
def free(monkeypatch):
    """Let the test set the bytes free on each device, beside what this process has."""
    amounts = {"cpu": 10**10, "cuda": 10**10}
    monkeypatch.setattr(
        memory, "free_bytes", lambda device, share=1.0: amounts[torch.device(device).type]
    )
    monkeypatch.setattr(memory, "_resident", lambda: 0)
    return amounts


def test_plan_counts_the_bytes(models, free):
    plan = planned(models, "cpu")
    parameters = sum(
        p.numel() for p in AutoModelForCausalLM.from_config(config(models)).parameters()
    )
    assert plan.live == 2 * parameters
    assert plan.donors == plan.placed.device == 3 * 4 * parameters
    assert plan.merging == 4 * parameters  # one model's pack is read
    assert plan.process == LATER  # beside what it has, here nothing
    assert plan.peak == plan.process + plan.live + plan.donors + plan.merging
    free["cpu"] = int((plan.peak - plan.donors // 2) / USABLE)
    assert planned(models, "cpu").placed.disk == pytest.approx(plan.donors / 2, abs=8)
    assert "of models mapped from disk" in str(planned(models, "cpu"))


@pytest.mark.usefixtures("free")
def test_plan_counts_what_the_methods_may_need(models):
    plain = planned(models, "cpu", methods=["linear", "ties"])
    ranked = planned(models, "cpu", methods=["linear", "ties", "della", "della_linear"])
    masked = planned(models, "cpu", methods=["arcee_fusion", "della"])
    elements = plain.live // 2
    assert not plain.elementwise
    assert plain.statistics
    assert ranked.elementwise == 2 * elements  # a byte for each element of a donor
    assert masked.elementwise == 2 * ranked.elementwise
    assert ranked.budget.per_element == 1
    assert planned(models, "cpu", methods=["dare_ties"]).statistics > plain.statistics
    largest = max(math.prod(info.shape) for info in models.tensors.values())
    assert plain.merging == 4 * largest + 16 * elements  # float32, and small pieces in float64
    assert ", ranks and masks 60.4 KiB (once della or della_linear is tried), " in str(ranked)
    assert "once" not in str(plain)


@pytest.mark.usefixtures("free")
def test_plan_counts_a_compiler_and_a_file_that_is_read_whole(models):
    merged = Models(models.tensors, 3, torch.bfloat16, compiled=True, unmapped=5000)
    plain, plan = planned(models, "cpu"), plan_memory(merged, "cpu")
    assert plan.process == plain.process + COMPILING
    assert plan.merging == plain.merging + 5000


def test_engine_beside_the_live_model_has_its_share_before_the_donors(models, free, monkeypatch):
    monkeypatch.setattr(memory, "total_bytes", lambda _device: 10**6)
    merged = Models(models.tensors, 3, torch.bfloat16)
    plan = plan_memory(merged, "cuda", allowed=Allowance(engine=0.4))
    assert plan.engine == plan.components()["text engine"] == 400_000
    assert plan.held == plan.live + 400_000 + plan.placed.device
    free["cuda"] = plan.live + plan.merging + 399_999
    with pytest.raises(MergeError, match="free on cuda"):
        plan_memory(merged, "cuda", allowed=Allowance(engine=0.4))


@pytest.mark.usefixtures("free")
def test_only_one_kind_of_work_is_in_memory_at_a_time(models):
    plan = planned(models, "cpu", scoring=5000, tuning=10**6)
    assert plan.peak == plan.held + 10**6
    assert "scoring 4.9 KiB, tuning 976.6 KiB" in str(plan)


def config(models):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(models.reference.folder)


def test_donors_live_on_the_gpu_while_there_is_room_then_pinned_then_on_disk(models, free):
    plan = planned(models, "cuda")
    assert plan.placed.device == plan.donors
    assert plan.peak == plan.live + plan.donors + plan.merging  # the process is on the host
    free["cuda"] = int((plan.peak - plan.donors // 2) / USABLE)
    half = plan.donors / 2
    placed = planned(models, "cuda").placed
    assert (placed.device, placed.pinned) == (
        pytest.approx(half, abs=8),
        pytest.approx(half, abs=8),
    )
    free["cpu"] = int((plan.process + plan.donors // 4) / USABLE)
    placed = planned(models, "cuda").placed
    assert placed.disk == pytest.approx(plan.donors / 4, abs=8)
    bare = plan.live + plan.merging
    assert planned(models, "cuda", limit=bare).placed.disk == plan.donors


def test_workers_of_a_host_count_the_donors_once(models, free):
    merged, passes = Models(models.tensors, 3, torch.bfloat16), ForwardPasses()

    def plan_of(device="cpu", **allowed):
        return plan_memory(merged, device, passes=passes, allowed=Allowance(**allowed))

    alone, four = plan_of(), plan_of(sharers=4)
    assert four.placed.device == four.components()["donors"] == alone.donors // 4
    assert alone.peak - four.peak == alone.donors - alone.donors // 4
    assert "; 4 workers share one copy of the donors on the host, 1/4 each" in str(four)
    free["cpu"] = int(4 * (four.peak - four.placed.device // 2) / USABLE)
    assert plan_of(sharers=4).placed.disk == pytest.approx(alone.donors / 2, abs=32)
    free |= {"cuda": alone.live + plan_of("cuda").merging, "cpu": 10**10}
    assert plan_of("cuda", sharers=4).placed.pinned == alone.donors // 4


def test_worker_that_takes_the_place_of_another_may_use_all_that_is_free(models, free):
    merged = Models(models.tensors, 3, torch.bfloat16)
    first = plan_memory(merged, "cpu", allowed=Allowance(sharers=8))
    free["cpu"] = int(first.peak / USABLE) + 1  # what the seven others have left
    later = plan_memory(merged, "cpu", allowed=Allowance(sharers=8, joins=True))
    assert later.placed == first.placed
    with pytest.raises(MergeError, match="free on cpu"):
        plan_memory(merged, "cpu", allowed=Allowance(sharers=8))


def test_what_cannot_fit_is_refused_with_the_numbers(models, free):
    free["cpu"] = 10_000
    with pytest.raises(MergeError, match=r"the live model takes 60.4 KiB, .* free on cpu"):
        planned(models, "cpu")


@pytest.mark.usefixtures("free")
def test_limit_of_the_user_counts_before_anything_is_loaded(make_study, tmp_path, capsys):
    study, run = make_study(tmp_path), tmp_path / "run"
    assert main(["run", str(study), "--out", str(run), "--memory", "10kB", "--device", "cpu"]) == 2
    assert "choose another --device or --memory" in capsys.readouterr().err
    assert not run.exists()


def test_spare_memory_is_what_model_merging_and_kept_donors_leave(models, free):
    kept = planned(models, "cuda")
    assert kept.spare == free["cuda"] - kept.live - kept.merging - kept.donors
    free["cuda"] = kept.live + kept.merging
    assert planned(models, "cuda").spare == 0


def test_study_is_told_of_whole_packs_not_of_parts_that_would_fit(make_study, tmp_path, free):
    plan = plan_study(load_study(make_study(tmp_path)))
    whole = plan.place_donors(Hardware("cpu"))
    (pack,) = plan.model_set.placement.packs
    assert whole.placed == plan.model_set.placement.placed
    assert whole.placed.device >= 3 * 4 * pack.size
    assert whole.placed.disk == 0
    free["cpu"] = int((whole.peak - whole.donors // 2) / USABLE)
    half = plan.place_donors(Hardware("cpu"))
    assert (half.placed.device, half.placed.disk) == (0, whole.placed.device)
    assert "donors" not in half.components()
