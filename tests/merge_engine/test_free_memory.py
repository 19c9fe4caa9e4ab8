import psutil
import pytest
import torch

from merge_engine.models import free_memory
from merge_engine.models.free_memory import free_bytes, parse_size

GIB = 1 << 30


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file under a root that stands in for the machine's."""
    monkeypatch.setattr(free_memory, "ROOT", tmp_path)

    def write(path: str, text: object) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    return write


def test_without_a_limit_what_the_machine_has_is_free(write):
    write("proc/self/cgroup", "0::/user")
    write("sys/fs/cgroup/user/memory.max", "max")
    assert free_bytes("cpu") == pytest.approx(psutil.virtual_memory().available, rel=0.1)


def test_limit_of_a_container_counts_less_what_its_page_cache_gives_up(write):
    write("proc/self/cgroup", "0::/pod/box")
    write("sys/fs/cgroup/pod/memory.max", GIB)  # the group around it
    write("sys/fs/cgroup/pod/memory.current", GIB // 2)
    write("sys/fs/cgroup/pod/memory.stat", f"anon 1\ninactive_file {GIB // 8}")
    write("sys/fs/cgroup/pod/box/memory.max", "max")
    assert free_bytes("cpu") == GIB // 2 + GIB // 8


def test_limit_counts_where_the_container_sees_its_own_group_at_the_root(write):
    write("proc/self/cgroup", "0::/../../somewhere/else")
    write("sys/fs/cgroup/memory.max", GIB)
    write("sys/fs/cgroup/memory.current", GIB // 4)
    write("sys/fs/cgroup/memory.stat", "active_file 4096")
    assert free_bytes("cpu") == 3 * GIB // 4 + 4096


def test_limit_of_version_1_counts(write):
    write("proc/self/cgroup", "9:cpu:/x\n4:memory:/job\n0::/")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", (1 << 63) - 4096)
    write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", GIB)
    write("sys/fs/cgroup/memory/job/memory.usage_in_bytes", 2 * GIB)
    write("sys/fs/cgroup/memory/job/memory.stat", "total_inactive_file 0")
    assert free_bytes("cpu") == 0


def test_share_of_a_gpu_is_of_all_of_it_whatever_others_have_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * GIB, 80 * GIB))
    assert free_bytes("cuda:0") == 60 * GIB
    assert free_bytes("cuda:0", 0.5) == 40 * GIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30 * GIB, 80 * GIB))
    assert free_bytes("cuda:0", 0.5) == 30 * GIB


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
