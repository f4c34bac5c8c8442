"""Sizes and ages as people write them."""

from __future__ import annotations

import pytest

from paroquant_stream.text import age_text, bytes_text, parse_age, parse_size


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
def test_an_age_is_told_in_its_largest_whole_unit(seconds, text):
    assert age_text(seconds) == text


def test_what_is_printed_as_a_size_can_be_given_as_one():
    for count in (0, 999, 1000, 1_500_000, 37_600_000_000):
        assert parse_size(bytes_text(count)) == count
