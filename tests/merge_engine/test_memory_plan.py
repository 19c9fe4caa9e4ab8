import pytest
import torch
from transformers import AutoModelForCausalLM

from merge_engine.errors import MergeError
from merge_engine.models import memory_plan as memory
from merge_engine.models.memory_plan import Allowance, parse_size, plan_memory
from merge_engine.models.model_set import ModelSet
from search.cli import main


@pytest.fixture
def models(zoo):
    return ModelSet.open(str(zoo / name) for name in ("base", "a", "b"))


def planned(models, device, limit=None):
    return plan_memory(models.tensors, 3, torch.bfloat16, device, Allowance(limit))


@pytest.fixture
def free(monkeypatch):
    """Let the test set the bytes free on each device."""
    amounts = {"cpu": 10**9, "cuda": 10**9}
    monkeypatch.setattr(
        memory, "free_bytes", lambda device, share=1.0: amounts[torch.device(device).type]
    )
    return amounts


def test_plan_counts_the_bytes(models, free):
    plan = planned(models, "cpu")
    parameters = sum(
        p.numel() for p in AutoModelForCausalLM.from_config(config(models)).parameters()
    )
    assert plan.live == 2 * parameters
    assert plan.donors == 3 * 4 * parameters
    assert plan.work == 4 * 5 * max(torch.Size(i.shape).numel() for i in models.tensors.values())
    assert "of models kept there" in str(plan)
    free["cpu"] = plan.live + plan.work + plan.donors // 2
    assert "of models mapped from disk" in str(planned(models, "cpu"))


def config(models):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(models.reference.folder)


def test_donors_live_on_the_gpu_if_they_fit_else_pinned_else_on_disk(models, free):
    plan = planned(models, "cuda")
    assert plan.tier == "device"
    free["cuda"] = plan.live + plan.work + plan.donors // 2
    assert planned(models, "cuda").tier == "pinned"
    free["cpu"] = plan.donors // 2
    assert planned(models, "cuda").tier == "disk"
    assert planned(models, "cuda", limit=plan.live + plan.work).tier == "disk"


def test_what_cannot_fit_is_refused_with_the_numbers(models, free):
    free["cpu"] = 10_000
    with pytest.raises(MergeError, match=r"the live model takes 60.4 KiB and .* free on cpu"):
        planned(models, "cpu")


@pytest.mark.usefixtures("free")
def test_limit_of_the_user_counts_before_anything_is_loaded(make_study, tmp_path, capsys):
    study, run = make_study(tmp_path), tmp_path / "run"
    assert main(["run", str(study), "--out", str(run), "--memory", "10kB", "--device", "cpu"]) == 2
    assert "choose another --device or --memory" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("512 MiB", 512 * 2**20),
        (" 2 GiB ", 2 * 2**30),
        ("2t", 2 * 10**12),
        ("7b", 7),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "12 apples", "1.2.3GB", "5xb", "1e9", "24GB!"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="write it like 24GB"):
        parse_size(text)


def test_spare_memory_is_what_model_merging_and_kept_donors_leave(models, free):
    kept = planned(models, "cuda")
    assert kept.tier == "device"
    assert kept.spare == free["cuda"] - kept.live - kept.work - kept.donors
    free["cuda"] = kept.live + kept.work + kept.donors // 2
    elsewhere = planned(models, "cuda")
    assert elsewhere.tier == "pinned"
    assert elsewhere.spare == kept.donors // 2
