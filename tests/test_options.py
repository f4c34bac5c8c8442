"""Options of public functions: each value that is not allowed is named before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paroquant_stream.options import check_choice, check_count, check_flags, check_path


def test_flags_are_true_or_false_alone():
    check_flags(one=True, other=False)
    for value in ("no", 0, 1, None):
        with pytest.raises(ValueError, match=f"force is True or False, not {value!r}"):
            check_flags(lazy=True, force=value)


def test_a_choice_is_one_of_its_texts():
    check_choice("x", "a", ("a", "b"))
    for value in ("", "ab", None, True, []):
        with pytest.raises(ValueError, match="x is one of a, b, not "):
            check_choice("x", value, ("a", "b"))


def test_a_count_is_a_whole_number_from_1():
    check_count("x", 1)
    check_count("x", None)
    for value in (0, -1, 1.0, True, "2"):
        with pytest.raises(ValueError, match=f"x is a whole .*, or None, not {value!r}"):
            check_count("x", value)
    with pytest.raises(ValueError, match="x is a whole number, 1 or more, not None"):
        check_count("x", None, optional=False)


def test_a_path_is_text_or_a_path_of_text(tmp_path):
    for value in ("a", Path("a"), None):
        check_path("x", value)
    with os.scandir(os.fsencode(tmp_path.parent)) as entries:
        of_bytes = next(entries)
    for value in (5, b"a", ["a"], of_bytes):
        with pytest.raises(ValueError, match="x is a path or None, not "):
            check_path("x", value)
    with pytest.raises(ValueError, match="x is a path, not None"):
        check_path("x", None, optional=False)
