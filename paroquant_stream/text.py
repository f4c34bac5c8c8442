"""Sizes and ages as text, such as `100GB`, `30d` and `3 days ago`, and text for terminals."""

from __future__ import annotations

import re

SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
AGES = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
MAX_LISTED = 50  # lines of a list in an error message
MAX_ERROR = 500  # characters of an error in one line
_NAMES = ((604_800, "week"), (86_400, "day"), (3600, "hour"), (60, "minute"))
_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]+)"  # text: most runs parse no size


def parse_size(text: str) -> int:
    """Return the bytes in a size like `100GB` or `1.5 TB`.

    Args:
        text: A number and a unit: B, kB, MB, GB or TB, in powers of 1000.

    Raises:
        ValueError: It is anything else, such as a number without a unit.
    """
    units = {unit.lower(): factor for unit, factor in SIZES.items()}
    return int(_parse(text, units, "a size", "a number and B, kB, MB, GB or TB, like 100GB"))


def parse_age(text: str) -> float:
    """Return the seconds in an age like `30d`.

    Args:
        text: A number and a unit: s, m (minutes), h, d or w.

    Raises:
        ValueError: It is anything else.
    """
    return _parse(text, AGES, "an age", "a number and s, m, h, d or w, like 30d")


def _parse(text: str, units: dict[str, int], what: str, expected: str) -> float:
    """Return a number times the factor of its unit."""
    match = re.fullmatch(_NUMBER, text.strip())
    factor = units.get(match[2].lower()) if match else None
    if not match or factor is None:
        raise ValueError(f"{text!r} is not {what}: expected {expected}")
    return float(match[1]) * factor


def age_text(seconds: float) -> str:
    """Format an age in its largest whole unit, such as `3 days ago`.

    Args:
        seconds: The age. Less than a minute, or a time in the future, is `just now`.
    """
    for factor, name in _NAMES:
        if seconds >= factor:
            count = int(seconds // factor)
            return f"{count} {name}{'s' * (count > 1)} ago"
    return "just now"


def one_line(error: BaseException) -> str:
    """Format an error's type and message in one line of at most `MAX_ERROR` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text if len(text) <= MAX_ERROR else f"{text[: MAX_ERROR - 3]}..."


def listed(lines: list[str]) -> str:
    """Format lines as a sorted, indented list that starts with a newline.

    Args:
        lines: One line per item; after `MAX_LISTED` of them only the number of the rest is shown.
    """
    lines = sorted(lines)
    hidden = len(lines) - MAX_LISTED
    more = [f"... and {hidden} more"] if hidden > 0 else []
    return "".join(f"\n  {line}" for line in lines[:MAX_LISTED] + more)


def install_text(packages: str, extra: str) -> str:
    """Format how packages are installed, right for a clone and for an index alike.

    Args:
        packages: What `pip install` takes, such as `mlx-lm`.
        extra: The extra of this package that installs them too.
    """
    return f"pip install {packages} (the extra `{extra}` of paroquant_stream)"


def bytes_text(count: int) -> str:
    """Format a size in powers of 1000, such as `950 B`, `1.5 kB` or `37.6 GB`."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def counted(count: int, noun: str) -> str:
    """Format a count and its noun, such as `1 shard` or `1,200 entries`."""
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else many}"


def without_start(text: str, width: int) -> str:
    """Cut a path or a file name at its start, as its end identifies it; keep its indentation.

    Args:
        text: One line.
        width: The most characters of the result.
    """
    if len(text) <= width:
        return text
    indent = len(text) - len(text.lstrip())
    return text[:indent] + "..." + text[len(text) - width + indent + 3 :]


def shown(text: object, keep: str = "") -> str:
    """Escape what a terminal must not get: control characters and invalid UTF-8 from paths.

    Args:
        text: Converted by `str`.
        keep: Characters that are not escaped, like the newlines of a list of defects.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()
        for c in str(text)
    )
