"""The memory of this machine, and what Linux says is free."""

from __future__ import annotations

import pytest

from paroquant_stream.model import memory
from paroquant_stream.model.memory import available_memory, physical_memory


def test_less_is_free_than_there_is():
    free = available_memory()
    assert 1 << 20 < physical_memory() < 64 << 40
    assert free is None or 1 << 20 < free < physical_memory()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MemTotal: 9 kB\nMemAvailable:   5 kB\n", 5 << 10),
        ("MemTotal: 9 kB\n", 0),
        ("MemAvailable: much\n", 0),
        ("no colon\n", 0),
        (None, None),
    ],
)
def test_memory_that_is_not_known_is_not_free(tmp_path, monkeypatch, text, expected):
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")  # private: Linux's file
    assert available_memory() == expected
