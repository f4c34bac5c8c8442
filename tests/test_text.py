"""Sizes, ages, errors and paths as text."""

from __future__ import annotations

import pytest

from paroquant_stream.text import (
    age_text,
    bytes_text,
    listed,
    one_line,
    parse_age,
    parse_size,
    shown,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("100GB", 100 * 10**9),
        ("1.5 TB", 15 * 10**11),
        ("0B", 0),
        ("7kb", 7000),
        (" 2mB ", 2 * 10**6),
    ],
)
def test_a_size_is_a_number_and_a_unit_of_1000(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "100", "GB", "-1GB", "1GiB", "1e3GB", "1,5GB", "1GB 2MB", "nan GB", "٣GB", "1" * 40 + "B"],
)
def test_any_other_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="expected a number and B, kB, MB, GB or TB, like 100GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 30 * 86_400), ("90s", 90), ("5m", 300), ("1.5h", 5400), ("2w", 1_209_600)],
)
def test_an_age_is_a_number_and_a_unit(text, seconds):
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["30", "d", "30 days", "-1d", "1mo", "1y", "tomorrow"])
def test_any_other_age_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="like 30d"):
        parse_age(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "just now"),
        (59, "just now"),
        (60, "1 minute ago"),
        (7300, "2 hours ago"),
        (86_400, "1 day ago"),
        (6 * 86_400, "6 days ago"),
        (70 * 86_400, "10 weeks ago"),
    ],
)
def test_an_age_is_shown_in_its_largest_whole_unit(seconds, text):
    assert age_text(seconds) == text


def test_what_is_printed_as_a_size_can_be_given_as_one():
    for count in (0, 999, 1000, 1_500_000, 37_600_000_000):
        assert parse_size(bytes_text(count)) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (37_600_000_000, "37.6 GB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_a_size_is_shown_in_powers_of_1000(count, text):
    assert bytes_text(count) == text


def test_an_error_is_shown_in_one_line():
    assert one_line(ValueError("two\n  lines")) == "ValueError: two lines"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize(("count", "cut"), [(488, False), (489, True)])
def test_an_error_has_at_most_500_characters(count, cut):
    line = one_line(ValueError("x" * count))
    assert len(line) == 500
    assert line.endswith("...") is cut


def test_a_list_is_sorted_and_indented():
    assert listed(["b", "a"]) == "\n  a\n  b"
    assert listed([]) == ""


@pytest.mark.parametrize(("count", "last"), [(50, "\n  49"), (52, "\n  ... and 2 more")])
def test_a_list_has_at_most_50_items(count, last):
    text = listed([f"{number:02}" for number in range(count)])
    assert text.endswith(last)
    assert text.count("\n") == 50 + (count > 50)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain name", "plain name"),
        ("größe", "größe"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\udcff", "\\udcff"),
        ("\u202egnp", "\\u202egnp"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, escaped):
    assert shown(text) == escaped


def test_characters_can_be_kept():
    assert shown("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert shown(ValueError("x")) == "x"
