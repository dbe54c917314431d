"""SHA256SUMS: what changed is named, and what it does not list is nobody's fault."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flap_fast.checks import ConfigError
from flap_fast.checksums import SUMS, delete_listed, read_sums, verified, write_sums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "text").mkdir(parents=True)
    for name in ("a", "b c", "text/d"):
        (folder / name).write_text(name)
    write_sums(folder)
    return folder


def check(folder: Path, **given: Any) -> None:
    with verified(folder, **given):
        pass


def test_the_command_sha256sum_reads_it(folder):
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["a: OK", "b c: OK", "text/d: OK"]


def test_a_folder_may_be_copied_renamed_and_added_to(folder, tmp_path):
    check(shutil.copytree(folder, tmp_path / "copy"))
    moved = folder.rename(tmp_path / "moved")
    (moved / "README.md").write_text("mine")
    check(moved)


@pytest.mark.parametrize("name", ["a", "b c", "text/d"])
def test_a_file_that_changed_or_is_missing_is_named(folder, name):
    file = folder / name
    file.write_text(name.upper())
    with pytest.raises(ConfigError, match=f"{name} must be the file .*got another SHA-256: .*line"):
        check(folder)
    file.unlink()
    with pytest.raises(ConfigError, match=f"{name} must be the file .*got no such file"):
        check(folder)
    check(folder, skip=(name,))
    check(folder, on=False)
    (folder / SUMS).unlink()
    check(folder)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "text/../../a"])
def test_files_outside_of_the_folder_are_refused(folder, name):
    (folder / SUMS).write_text(f"{64 * '0'}  {name}\n")
    for read in (check, delete_listed):
        with pytest.raises(ConfigError, match="must have lines of a SHA-256 and a file of the fol"):
            read(folder)


@pytest.mark.parametrize("line", [b"half", b"\xff", 63 * b"0" + b"  a"])
def test_a_broken_list_is_named(folder, line):
    (folder / SUMS).write_bytes(line)
    with pytest.raises(ConfigError, match=rf"{SUMS} .*or delete it|{SUMS} .*delete it to"):
        check(folder)


def test_only_what_it_lists_is_deleted_and_nothing_behind_a_link(folder, tmp_path):
    listed = read_sums(folder)
    (folder / "notes").write_text("mine")
    text = (folder / "text").rename(tmp_path / "text")
    (folder / "text").symlink_to(text)
    (folder / "a").unlink()
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("mine")
    delete_listed(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["notes", "text"]
    assert (text / "d").is_file()
    assert (tmp_path / "elsewhere").is_file()
    assert sorted(listed) == ["a", "b c", "text/d"]


def test_a_folder_of_nothing_else_is_deleted_whole(folder):
    delete_listed(folder)
    assert not folder.exists()


def test_a_changed_file_is_named_before_what_came_of_reading_it(folder):
    (folder / "a").write_text("other")
    with pytest.raises(ConfigError, match="another SHA-256"), verified(folder):
        raise ValueError("no weights for text.inner")
    write_sums(folder)
    with pytest.raises(ValueError, match="no weights"), verified(folder):
        raise ValueError("no weights for text.inner")


def test_a_small_file_that_changed_is_named_before_anything_is_done(folder, monkeypatch):
    (folder / "a").write_text("other")
    with pytest.raises(ConfigError, match="another SHA-256"), verified(folder):
        pytest.fail("the body ran")
    # A large one is read beside the body.
    monkeypatch.setattr("flap_fast.checksums._SMALL", 0)
    ran = []
    with pytest.raises(ConfigError, match="another SHA-256"), verified(folder):
        ran.append(1)
    assert ran


def test_a_list_of_nothing_is_named(folder):
    (folder / SUMS).write_text("\n")
    with pytest.raises(ConfigError, match=f"{SUMS} must list files, got 'none'; copy it again, or"):
        check(folder)
