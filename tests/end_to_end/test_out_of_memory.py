"""Memory that runs out in any phase: one sentence, nothing left half, and work goes on."""

import pytest

from memory_faults import PHASES, run_limited
from merge_engine.building.checksums import is_whole
from search.storing.result import read_result
from tiny_models import make_llama

SHAPE = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32}


@pytest.fixture(scope="module")
def write_study(make_study, tmp_path_factory):
    """Write a study of models whose tensors are larger than what an allocator keeps."""
    folder = tmp_path_factory.mktemp("larger")
    base = make_llama(folder / "base", seed=0, **SHAPE)
    for seed, name in enumerate("ab", start=1):
        make_llama(folder / name, seed=seed, base=base)

    def write(to, phase):
        items = {"search": 8, "select": 8, "test": 8}
        tuned = phase == "differentiate"
        return make_study(
            to,
            base_model=str(base),
            models=[str(folder / name) for name in "ab"],
            search__methods=["task_arithmetic"] if tuned else ["ties"],
            search__trials=4,
            search__tune=tuned,
            objective__items=items | {"tune": 8} if tuned else items,
        )

    return write


@pytest.mark.parametrize("kilobytes", [100, 250])
@pytest.mark.parametrize("phase", PHASES)
def test_run_out_of_memory_says_so_leaves_nothing_half_and_goes_on(
    write_study, tmp_path, phase, kilobytes
):
    run = tmp_path / "run"
    words = ["run", str(write_study(tmp_path / "study", phase)), "--out", str(run)]
    words += ["--device", "cpu"]
    ended = run_limited(words, tmp_path, phase, kilobytes)
    assert ended.failure, "there was enough memory"
    assert "Traceback" not in ended.said
    if ended.code:
        assert ended.code in (1, 2)
        assert ended.said.splitlines()[-1].startswith("mergesearch: ")
        assert not list(run.glob("checkpoint*"))
        assert run_limited(words, tmp_path, None).code == 0
    assert is_whole(run / "checkpoint")
    assert read_result(run) is not None
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]
