"""Every family x layout x cut, made on the spot.

    pytest -m long tests/parity/test_matrix.py -s

Needs torch and transformers beside the test extra; fixtures/README.md has the versions.
"""

from __future__ import annotations

import sys
from collections import Counter

import mlx.core as mx
import pytest

from paroquant_stream import load
from paroquant_stream.errors import AssemblyError
from tests.helpers.parameters import bits, parameters
from tests.helpers.paths import FIXTURES

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    pytest.importorskip("torch", reason="making checkpoints needs torch")
    sys.path.insert(0, str(FIXTURES))
    from make import make_matrix

    out = tmp_path_factory.mktemp("matrix")
    return out, make_matrix(out)


def outcome(loader, directory, force_text: bool, wanted) -> str:
    """`right`, `wrong` or `refused`, compared with the parameters wanted."""
    try:
        model, _, is_vlm = loader(str(directory), force_text=force_text)
    except Exception as error:
        return f"refused ({type(error).__name__})"
    found = parameters(model)
    if wanted is None:
        return "loaded"
    missing = wanted.keys() - found.keys()
    unequal = [name for name in wanted if name in found and bits(found[name]) != bits(wanted[name])]
    if not force_text and not is_vlm:
        return "wrong (no vision model)"
    return "right" if not missing and not unequal else f"wrong ({len(missing) + len(unequal)})"


def reference(out, row, force_text: bool):
    """The family's parameters: stored ones of the public loader, else our AUTOAWQ single file's."""
    stored = row["expected_text" if force_text else "expected_vlm"]
    if stored:
        return mx.load(str(out / "expected" / stored))
    if row["family"] == "qwen3_bias":
        return None
    return parameters(load(out / f"{row['family']}-awq-single", force_text=force_text)[0])


def test_every_family_layout_and_cut_gives_the_same_bits(matrix):
    from paroquant.inference.backends.mlx.load import load as public_load

    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    out, rows = matrix
    ours, theirs = Counter(), Counter()
    for row in rows:
        for force_text in (True, False) if row["vision"] else (True,):
            wanted = reference(out, row, force_text)
            mine = outcome(load, out / row["name"], force_text, wanted)
            public = outcome(public_load, out / row["name"], force_text, wanted)
            print(f"{row['name']:36} {'text' if force_text else 'vision':6} {mine:24} {public}")
            ours[mine.split()[0]] += 1
            theirs[public.split()[0]] += 1
            expected = "right" if wanted is not None else f"refused ({AssemblyError.__name__})"
            assert mine == expected, row["name"]
    mx.set_default_device(before)
    print("ours:", dict(ours), " public loader:", dict(theirs))
