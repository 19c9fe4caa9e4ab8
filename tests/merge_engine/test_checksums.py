"""The list of a checkpoint's files."""

import pytest

from merge_engine.building.checksums import CHECKSUMS, is_whole, listed_files, write_checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    for name in ("config.json", "sub/tool.jinja"):
        (tmp_path / "out" / name).write_text(name)
    write_checksums(tmp_path / "out")
    return tmp_path / "out"


def test_folder_is_whole_until_a_file_of_it_changes(folder):
    (folder / "README.md").write_text("not of the list")
    assert is_whole(folder)
    assert [*listed_files(folder)] == ["config.json", "sub/tool.jinja"]
    (folder / "sub" / "tool.jinja").write_text("other")
    assert not is_whole(folder)


@pytest.mark.parametrize("line", ["../key", "/etc/passwd", "link", "sub/../../key"])
def test_list_that_leads_elsewhere_is_none(folder, line):
    (folder.parent / "key").write_text("secret")
    (folder / "link").symlink_to(folder.parent / "key")
    with (folder / CHECKSUMS).open("a") as file:
        file.write(f"{'0' * 32}  {line}\n")
    assert not listed_files(folder)
    assert not is_whole(folder)


@pytest.mark.parametrize("text", [b"", b"\xff", b"garbage", b"0  x"])
def test_damaged_list_is_none(folder, text):
    (folder / CHECKSUMS).write_bytes(text)
    assert not is_whole(folder)
