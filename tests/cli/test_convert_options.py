"""The convert command's options."""

from __future__ import annotations

import pytest

from paroquant_stream.cli.convert import main


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["--jobs", "0", "x"],
        ["--jobs", "many", "x"],
        ["x", "--in-place", "--cache-dir", "y"],
        ["x", "--nope"],
        ["x", "--tree"],
    ],
)
def test_wrong_usage_exits_with_2(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        main(wrong)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
