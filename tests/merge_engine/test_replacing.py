"""Files and folders that are put in place whole."""

import os
import shutil
import stat

import pytest

from merge_engine.errors import MergeError
from merge_engine.replacing import create_text, new_folder, remove_partials, replace_text


def test_text_takes_the_place_of_a_link_and_not_of_its_target(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "page").symlink_to(tmp_path / "target")
    replace_text(tmp_path / "page", "new")
    assert (tmp_path / "target").read_text() == "mine"
    assert (tmp_path / "page").read_text() == "new"
    assert not (tmp_path / "page").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_private_text_is_nobody_elses_to_read(tmp_path):
    before = os.umask(0)
    try:
        replace_text(tmp_path / "answers", "x", private=True)
        replace_text(tmp_path / "page", "x")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("answers", "page")]
    assert modes == [0o600, 0o666]


def test_failed_writing_leaves_what_was_there(tmp_path, monkeypatch):
    replace_text(tmp_path / "page", "old")

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(tmp_path / "page", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_file_is_created_once(tmp_path):
    create_text(tmp_path / "study.yaml", "first")
    with pytest.raises(FileExistsError):
        create_text(tmp_path / "study.yaml", "second")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]


def test_only_what_a_kill_has_left_is_removed(tmp_path):
    names = [".page.0123abcd.partial", ".db.0123abcd.partial-journal", "page.partial", ".x.partial"]
    for name in names:
        (tmp_path / name).touch()
    remove_partials(tmp_path, "other")
    assert len(list(tmp_path.iterdir())) == 4
    remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])


def test_folder_is_there_when_it_is_whole_and_gone_when_it_fails(tmp_path):
    out = tmp_path / "a" / "out"
    with pytest.raises(FileNotFoundError), new_folder(out) as partial:
        (partial / "half" / "a file").touch()
    assert not list(tmp_path.iterdir())
    with new_folder(out) as partial:
        (partial / "whole").touch()
        assert not out.exists()
        with pytest.raises(MergeError, match="written by another process"), new_folder(out):
            pass
    assert [path.name for path in out.iterdir()] == ["whole"]
    with pytest.raises(MergeError, match="exists"), new_folder(out):
        pass


def test_folder_that_appears_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "theirs").touch()
    with pytest.raises(MergeError, match="exists"), new_folder(out):
        shutil.copytree(tmp_path / "other", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
    assert [path.name for path in out.iterdir()] == ["theirs"]
