"""Memory that begins on a page, private, in huge pages where there are any."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import sys

import pytest

from paroquant_stream.files import page_memory
from paroquant_stream.files.page_memory import page_aligned

PAGE = 4096


def address_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 5 << 20])
def test_new_memory_begins_on_a_page_and_is_zero(size):
    memory = page_aligned(size)
    assert (len(memory), memory.format, memory.readonly) == (size, "B", False)
    assert not any(memory[: 3 * PAGE])
    if size:
        assert address_of(memory) % mmap.PAGESIZE == 0
        memory[-1] = 7
        assert not page_aligned(size)[-1]  # of another piece


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists the mappings of a process")
def test_new_memory_is_private_and_may_have_huge_pages():
    """Shared memory is that of a tmpfs, which gets huge pages hardly anywhere."""
    memory = page_aligned(4 << 20)
    address, found = address_of(memory), []
    with open("/proc/self/smaps") as file:
        for line in file:
            if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+)", line):
                start, stop = (int(each, 16) for each in bounds.groups()[:2])
                inside = start <= address < stop
                found += [bounds.groups()[2:]] if inside else []
            elif inside and line.startswith("VmFlags:"):
                flags = line.split()[1:]
    assert found == [("rw-p", "0")]  # neither shared nor of a file
    if os.path.exists("/sys/kernel/mm/transparent_hugepage"):
        assert "hg" in flags


def test_a_system_without_huge_pages_has_memory(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(page_memory.mmap, "mmap", Refusing)
    assert len(page_aligned(PAGE)) == PAGE
    monkeypatch.delattr(page_memory.mmap, "MADV_HUGEPAGE", raising=False)
    assert len(page_aligned(PAGE)) == PAGE


def test_memory_that_is_refused_is_no_error_of_a_file(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(page_memory.mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match="4,096 bytes: Cannot allocate memory"):
        page_aligned(4096)
