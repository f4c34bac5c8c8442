"""Regular files by descriptor: opening, exact reads, stamps."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from paroquant_stream.errors import MalformedFileError, UnreadableFileError
from paroquant_stream.files.descriptor import (
    RACY_SECONDS,
    TICK_SECONDS,
    WIDE_SECONDS,
    FileStamp,
    closing,
    file_status,
    open_regular,
    pread_exactly,
)

SECOND = 10**9
NOW = 1_700_000_000 * SECOND
STAMP = FileStamp(device=1, inode=2, size=3, mtime_ns=NOW, ctime_ns=NOW)


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def fail(*_arguments, **_options):
    raise OSError(5, "Input/output error")


def test_a_stamp_has_every_field_that_shows_a_change(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    os.utime(tmp_path / "x", ns=(1, 2))
    status = (tmp_path / "x").stat()
    expected = (status.st_dev, status.st_ino, 3, 2, status.st_ctime_ns)
    assert tuple(vars(FileStamp.of(status)).values()) == expected
    with (tmp_path / "x").open() as file:
        assert FileStamp.of_fd(file.fileno(), "x") == FileStamp.of(status)


@pytest.mark.parametrize("field", ["device", "inode", "size", "mtime_ns"])
def test_another_content_has_another_stamp(field):
    assert not STAMP.has_content_of(replace(STAMP, **{field: 7}))


def test_a_renamed_file_has_the_same_content():
    assert STAMP.has_content_of(replace(STAMP, ctime_ns=7))


@pytest.mark.parametrize(("ctime", "whole"), [(0, True), (NOW, True), (NOW + 1, False)])
def test_a_ctime_without_fraction_is_in_whole_seconds(ctime, whole):
    assert replace(STAMP, ctime_ns=ctime).in_whole_seconds is whole


@pytest.mark.parametrize("margin", [TICK_SECONDS, RACY_SECONDS, WIDE_SECONDS])
@pytest.mark.parametrize("field", ["mtime_ns", "ctime_ns"])
def test_a_file_is_settled_when_both_its_times_are_old(field, margin):
    old = NOW - int(margin * SECOND)
    settled = replace(STAMP, mtime_ns=old, ctime_ns=old)
    assert settled.is_settled(NOW, margin)
    younger = replace(settled, **{field: old + SECOND // 100})
    assert not younger.is_settled(NOW, margin)


def test_times_in_the_future_are_never_settled():
    assert not replace(STAMP, mtime_ns=NOW + 10**15).is_settled(NOW, TICK_SECONDS)


@pytest.mark.parametrize("follow", [True, False])
def test_a_pipe_is_refused_without_blocking(tmp_path, follow):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(MalformedFileError, match="regular file"):
        open_regular(tmp_path / "x", follow=follow)


def test_a_directory_and_a_device_are_refused(tmp_path):
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(MalformedFileError, match="regular file"):
            open_regular(path)


def test_a_device_is_not_even_opened(monkeypatch):
    monkeypatch.setattr(os, "open", lambda *_, **__: pytest.fail("the device was opened"))
    with pytest.raises(MalformedFileError, match="regular file"):
        open_regular(Path(os.devnull))


def test_a_pipe_in_place_of_a_checked_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"x")
    status = os.stat(tmp_path / "x")
    (tmp_path / "x").unlink()
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(os, "stat", lambda *_, **__: status)
    before = open_descriptors()
    with pytest.raises(MalformedFileError, match="regular file"):
        open_regular(tmp_path / "x")
    assert open_descriptors() == before


def test_a_link_is_followed_unless_it_is_refused(tmp_path):
    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / "link").symlink_to("target")
    with closing(open_regular(tmp_path / "link")) as fd:
        assert os.read(fd, 9) == b"x"
    with pytest.raises(OSError, match="link"):
        open_regular(tmp_path / "link", follow=False)


def test_with_a_directory_only_the_last_name_counts(tmp_path):
    (tmp_path / "x").write_bytes(b"here")
    with (
        closing(os.open(tmp_path, os.O_RDONLY)) as directory,
        closing(open_regular(tmp_path / "absent" / "x", dir_fd=directory)) as fd,
    ):
        assert os.read(fd, 9) == b"here"


def test_a_descriptor_is_not_inherited_by_programs(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    with closing(open_regular(tmp_path / "x")) as fd:
        assert not os.get_inheritable(fd)


def test_closing_closes_also_after_an_error(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    with pytest.raises(KeyError), closing(fd):
        raise KeyError
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with closing(fd):  # closed before: ignored
        pass


def test_a_short_file_is_an_error(tmp_path):
    (tmp_path / "x").write_bytes(bytes(10))
    with (
        closing(open_regular(tmp_path / "x")) as fd,
        pytest.raises(MalformedFileError, match="x: ends 5 bytes before"),
    ):
        pread_exactly(fd, 5, 10, "x")


def test_short_reads_are_continued(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, at: real(fd, min(length, 7), at))
    with closing(open_regular(tmp_path / "x")) as fd:
        assert pread_exactly(fd, 10, 60, "x") == bytes(range(10, 70))
        assert pread_exactly(fd, 10, 0, "x") == b""


@pytest.mark.parametrize(
    ("call", "read"),
    [("pread", lambda: pread_exactly(0, 0, 1, "x")), ("fstat", lambda: file_status(0, "x"))],
)
def test_a_failed_read_names_the_file_and_the_reason(monkeypatch, call, read):
    with monkeypatch.context() as patch:  # ends before pytest itself calls fstat
        patch.setattr(os, call, fail)
        with pytest.raises(UnreadableFileError, match="x: cannot be read: Input/output error"):
            read()
