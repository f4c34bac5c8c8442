"""The cache command's options."""

from __future__ import annotations

import pytest

from paroquant_stream import cache


@pytest.mark.parametrize(
    "wrong", [[], ["nonsense"], ["verify", "--sources"], ["verify", "--in-place"]]
)
def test_wrong_usage_exits_with_2(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        cache.main(wrong)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prune", "--max-size", "100"], "'100' is not a size: expected a number and B, kB"),
        (["prune", "--older-than", "30"], "'30' is not an age: expected"),
        (["ls", "--filter", "color=red"], "'color=red' is not a filter: expected one of size, age"),
        (["ls", "--filter", "size>5"], "'5' is not a size"),
        (["ls", "--sort", "weight"], "'weight' is not an order: expected one of name, size"),
        (["ls", "--json", "-q"], "not allowed with"),
        (["rm"], "required: MODEL"),
    ],
)
def test_a_wrong_option_says_what_is_expected(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        cache.main([*words])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["ls"], ["size"], ["path"], ["rm"], ["prune"], ["verify"]])
def test_every_help_stands_alone(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cache.main([*command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: paroquant-stream cache")
    assert len(out.splitlines()) > 5
