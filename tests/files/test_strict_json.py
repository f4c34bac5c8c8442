"""Strict JSON: what parsers read differently is refused, in time proportional to the text."""

from __future__ import annotations

import time

import pytest

from paroquant_stream.errors import MalformedFileError
from paroquant_stream.files.strict_json import strict_json


def keys(count: int, last: str) -> bytes:
    """Return an object of `count` keys, the last one named `last`."""
    return ("{" + "".join(f'"k{i}":0,' for i in range(count - 1)) + f'"{last}":1}}').encode()


def seconds(text: bytes, words: str | None = None) -> float:
    """Time the fastest of three parses; `words` must be in the refusal, if there is one."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        if words:
            with pytest.raises(MalformedFileError, match=words):
                strict_json(text, "x")
        else:
            strict_json(text, "x")
        times.append(time.perf_counter() - started)
    return min(times)


def test_a_duplicate_key_is_found_in_linear_time():
    whole = seconds(keys(20_000, "other"))
    assert seconds(keys(20_000, "k19998"), "duplicate key 'k19998'") < 5 * whole + 0.01


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 400 + ".0", "NaN", "-Infinity"])
def test_a_number_that_is_not_finite_is_refused(number):
    with pytest.raises(MalformedFileError, match=r"not a finite number|not a JSON number"):
        strict_json(f'{{"a": [{number}]}}'.encode(), "x")


def test_finite_numbers_stay_what_they_are():
    text = b"[1.5, -0.0, 1e-999, 1.7976931348623157e308, 3]"
    assert strict_json(text, "x") == [1.5, -0.0, 0.0, 1.7976931348623157e308, 3]


def test_a_long_number_takes_no_longer_than_its_digits():
    short, long = (seconds(f"[1.{'1' * count}]".encode()) for count in (100_000, 1_000_000))
    assert long < 40 * short + 0.02


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf{}", b"{} {}", b'{"a": 1, "a": 1}', b"1" * 21,
                                  b"[" * 100_000, b"\xff", b""])  # fmt: skip
def test_what_parsers_disagree_on_is_refused(text):
    with pytest.raises(MalformedFileError, match="x: not valid JSON"):
        strict_json(text, "x")


@pytest.mark.parametrize(("digits", "refused"), [(20, False), (21, True)])
def test_an_integer_may_have_twenty_digits(digits, refused):
    text = ("-" + "9" * (digits - 1)).encode()
    if refused:
        with pytest.raises(MalformedFileError, match="more than 20 digits"):
            strict_json(text, "x")
    else:
        assert strict_json(text, "x") == int(text)
    assert strict_json(text, "x", digits=21) == int(text)


def test_only_the_duplicate_key_is_named():
    with pytest.raises(MalformedFileError, match="duplicate key 'b'"):
        strict_json(b'{"a": {"b": 1, "c": {"b": 2}, "b": 3}}', "x")
