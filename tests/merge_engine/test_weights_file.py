import os
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from merge_engine.errors import MergeError
from merge_engine.models.weights_file import OpenFiles, open_weights

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int64)}


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_file_reads_like_safetensors(tmp_path, zipped):
    save_file(TENSORS, tmp_path / "x.safetensors")
    torch.save(OrderedDict(TENSORS), tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    one, other = open_weights(tmp_path / "x.safetensors"), open_weights(tmp_path / "x.bin")
    assert sorted(one.keys()) == sorted(other.keys())
    for name in TENSORS:
        mine, theirs = one.get_slice(name), other.get_slice(name)
        assert mine.get_shape() == theirs.get_shape()
        assert mine.get_dtype() == theirs.get_dtype()
        assert torch.equal(one.get_tensor(name), other.get_tensor(name))


def test_views_shared_tensors_and_parameters_are_read_right(tmp_path):
    whole = torch.randn(6, 4)
    views = {
        "whole": torch.nn.Parameter(whole),
        "tied": whole,
        "part": whole[2:4],
        "transposed": whole.T,
        "column": whole[:, 1],
        "expanded": whole[0].expand(3, 4),
    }
    torch.save(views, tmp_path / "x.bin")
    opened = open_weights(tmp_path / "x.bin")
    for name, expected in views.items():
        read = opened.get_tensor(name)
        assert torch.equal(read, expected)
        assert read.is_contiguous()
        assert not read.requires_grad
        assert type(read) is torch.Tensor


def test_zip_file_that_is_compressed_is_read_right(tmp_path):
    torch.save(TENSORS, tmp_path / "x.bin")
    with (
        zipfile.ZipFile(tmp_path / "x.bin") as source,
        zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for each in source.infolist():
            target.writestr(each.filename, source.read(each))
    opened = open_weights(tmp_path / "y.bin")
    assert all(torch.equal(opened.get_tensor(name), TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_is_refused_and_nothing_in_it_runs(tmp_path, zipped):
    proof = tmp_path / "proof"
    hostile = {"a": TENSORS["a"], "b": Hostile(f"touch {proof}")}
    torch.save(hostile, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        MergeError, match=r"x.bin: asks to run '\w+.system', .* nothing of it was run"
    ):
        open_weights(tmp_path / "x.bin")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([TENSORS["a"]], "holds a list, not tensors by name"),
        ({"state_dict": TENSORS, "epoch": 3}, "'state_dict' in it is a mapping of its own"),
        (TENSORS | {"epoch": 3}, "'epoch' in it is a int, not a tensor"),
        ({0: TENSORS["a"]}, "0 in it is a Tensor"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is torch.sparse_coo on cpu"),
        ({"a": torch.empty(3, device="meta")}, "'a' is torch.strided on meta"),
    ],
)
def test_pickle_of_other_things_is_refused_by_what_it_holds(tmp_path, held, message):
    torch.save(held, tmp_path / "x.bin")
    with pytest.raises(MergeError, match=f"x.bin: {message}"):
        open_weights(tmp_path / "x.bin")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_file_cut_short_is_refused_in_one_line(tmp_path, zipped, share):
    torch.save(TENSORS, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(MergeError, match=r"x\.bin: damaged, cut short") as caught:
        open_weights(tmp_path / "x.bin")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_git_lfs_pointer_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(MergeError, match=f"{name}: is a Git LFS pointer.*git lfs pull"):
        open_weights(tmp_path / name)


@pytest.mark.parametrize("change", [lambda f: os.truncate(f, 100), os.unlink], ids=["cut", "gone"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_open_file_that_is_cut_short_or_gone_is_refused_until_it_is_restored(
    tmp_path, name, change
):
    file, files = tmp_path / name, OpenFiles()
    (save_file if name == "x.safetensors" else torch.save)(TENSORS, file)
    whole = file.read_bytes()
    assert torch.equal(files.open(file).get_tensor("a"), TENSORS["a"])
    change(file)
    with pytest.raises(MergeError, match=rf"{name}: was cut short or removed .*; restore it"):
        files.open(file)
    file.write_bytes(whole)
    assert torch.equal(files.open(file).get_tensor("a"), TENSORS["a"])
