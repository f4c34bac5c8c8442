"""Files as they are found: regular ones only, no link followed."""

from __future__ import annotations

import os

from paroquant_stream.maintenance.scan import regular_files


def test_only_regular_files_are_found_and_by_name(tmp_path):
    (tmp_path / "b").write_bytes(b"12")
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert [(f.path.name, f.size) for f in regular_files(tmp_path)] == [("a", 1), ("b", 2)]


def test_a_file_is_as_old_as_its_ctime_whatever_its_mtime(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    os.utime(tmp_path / "a", (0, 0))
    (found,) = regular_files(tmp_path)
    assert found.mtime_ns == 0
    assert found.changed > 1e9


def test_an_absent_directory_has_no_files(tmp_path):
    assert list(regular_files(tmp_path / "absent")) == []
