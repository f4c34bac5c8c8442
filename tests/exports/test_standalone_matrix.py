"""Every family's self-contained export in stock mlx-lm, tied and untied, from every layout.

pytest -m long tests/exports/test_standalone_matrix.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paroquant_stream import export_model, load
from paroquant_stream.errors import AssemblyError
from tests.helpers.paths import FIXTURES
from tests.helpers.stock import answers, stock_answers_of
from tests.helpers.variants import LAYOUTS, variant

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("on_the_cpu"),
]
ROWS = json.loads((FIXTURES / "catalog.json").read_text())
NAMES = {row["family"]: row["name"] for row in ROWS if row["layout"] == "AUTOAWQ"}
NO_HEAD = {family for family in NAMES if family.startswith("gemma4")}
"""mlx-lm's class drops their head, so `load` refuses an untied one."""


def cases() -> dict[str, tuple[str, str, bool]]:
    """The name of each case and what it is made of."""
    return {
        f"{family}-{layout}-{'tied' if tied else 'untied'}": (family, layout, tied)
        for family in NAMES
        for layout in LAYOUTS
        for tied in (True, False)
        if family != "qwen3_bias"  # refused: mlx-lm's class has no place for its biases
    }


def test_stock_mlx_lm_gives_our_bits_of_every_family(tmp_path):
    exports: dict[str, Path] = {}
    expected: dict[str, list] = {}
    for name, (family, layout, tied) in cases().items():
        model = variant(NAMES[family], tmp_path / "models" / name, layout=layout, tied=tied)
        if family in NO_HEAD and not tied:
            with pytest.raises(AssemblyError, match="lm_head"):
                load(model, force_text=True)
            continue
        expected[name] = answers(load(model, force_text=True)[0])
        export = export_model(model, tmp_path / name, self_contained=True)
        exports[name] = export.directory
    found = stock_answers_of(list(exports.values()))
    assert len(exports) == 88
    for name, directory in exports.items():
        assert found[str(directory)] == expected[name], name
