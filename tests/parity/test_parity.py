"""Every parameter has the bits and dtype that the public loader returns.

The committed checkpoints come from the public writer's own functions (fixtures/README.md).
"""

from __future__ import annotations

from importlib.metadata import version

import mlx.core as mx
import pytest
from paroquant.inference.backends.mlx.load import load as public_load

from paroquant_stream import load
from paroquant_stream.backends.mlx_lm import MlxLm
from paroquant_stream.backends.mlx_vlm import MlxVlm
from paroquant_stream.backends.selection import TOWER_PREFIXES
from paroquant_stream.errors import AssemblyError
from tests.helpers.parameters import (
    CATALOG,
    EXPECTED,
    VISION,
    assert_same,
    bits,
    parameters,
    where_loadable,
)
from tests.helpers.paths import FIXTURES

pytestmark = pytest.mark.usefixtures("on_the_cpu")
PUBLIC_IS_RIGHT = [
    row
    for row in CATALOG
    if row["layout"] in ("AUTOAWQ", "PARO_NATIVE")
    and row["expected_text"]
    and not row["family"].endswith("5_text")  # it does not know their model types
    and not row["family"].endswith("moe_text")
    and (row["layout"], row["family"]) != ("PARO_NATIVE", "qwen2")  # it drops the biases
]
TEXT = [row for row in CATALOG if row["expected_text"]]


@pytest.mark.parametrize("row", where_loadable(TEXT, MlxLm()))
def test_every_parameter_of_a_text_model_is_the_expected_one(row):
    model, _, is_vlm = load(FIXTURES / row["name"], force_text=True)
    assert not is_vlm
    assert_same(parameters(model), mx.load(str(EXPECTED / row["expected_text"])))


@pytest.mark.parametrize("row", where_loadable(VISION, MlxVlm()))
def test_every_parameter_of_a_vision_model_is_the_expected_one(row):
    """Where the public loader drops tensors, the text part must be the text model's."""
    model, _, is_vlm = load(FIXTURES / row["name"])
    assert is_vlm
    found = parameters(model)
    if row["expected_vlm"]:
        assert_same(found, mx.load(str(EXPECTED / row["expected_vlm"])))
    text = mx.load(str(EXPECTED / row["expected_text"]))
    norms = [name for name in text if "norm" in name]  # mlx-lm and mlx-vlm shift them alike
    assert norms
    assert_same({name: found[name] for name in text}, text)
    assert len(found) > len(text)


@pytest.mark.parametrize("row", where_loadable(VISION, MlxVlm()))
def test_every_value_of_a_tower_is_loaded(row):
    """The class may reorder a tensor of the tower, so sizes and sums are compared."""
    model, _, _ = load(FIXTURES / row["name"])
    text = mx.load(str(EXPECTED / row["expected_text"]))
    tower = {name: array for name, array in parameters(model).items() if name not in text}
    stored = [
        array
        for path in (FIXTURES / row["name"]).glob("*.safetensors")
        for name, array in mx.load(str(path)).items()
        if name.startswith(TOWER_PREFIXES)
    ]
    assert sum(array.size for array in tower.values()) == sum(array.size for array in stored)
    total = sum(array.astype(mx.float32).sum().item() for array in tower.values() if finite(array))
    correct = sum(array.astype(mx.float32).sum().item() for array in stored if finite(array))
    assert total == pytest.approx(correct, rel=1e-3)


def finite(array: mx.array) -> bool:
    """Return whether no value is infinite, as clipping bounds of a tower may be."""
    return bool(mx.all(mx.isfinite(array)).item())


def test_biases_without_a_parameter_are_an_error():
    with pytest.raises(AssemblyError, match=r"self_attn\.q_proj\.bias: no such parameter"):
        load(FIXTURES / "qwen3_bias-awq-single")


@pytest.mark.skipif(MlxVlm().why_unknown({"model_type": "qwen3_5"}) is not None, reason="no class")
def test_loading_twice_gives_the_same_parameters():
    """mlx-vlm's sanitize changes norms in place; the second load must not see it."""
    directory = FIXTURES / "qwen3_5-awq-adversarial"
    first, second = (parameters(load(directory)[0]) for _ in range(2))
    assert_same(first, second)


@pytest.mark.parametrize("row", where_loadable(PUBLIC_IS_RIGHT, MlxLm()))
def test_every_parameter_equals_the_public_loaders(row):
    directory = FIXTURES / row["name"]
    ours, tokenizer, is_vlm = load(directory, force_text=True)
    try:
        theirs, their_tokenizer, their_is_vlm = public_load(str(directory), force_text=True)
    except TypeError as error:
        assert version("mlx-lm") < "0.32"
        pytest.skip(f"the public loader cannot: {error}")  # mlx-lm's class wants a rope_theta
    assert_same(parameters(ours), parameters(theirs))
    assert is_vlm == their_is_vlm
    assert tokenizer.encode("w5 w9") == their_tokenizer.encode("w5 w9")


def test_the_public_loader_still_drops_native_biases():
    """If this fails, that case can join the comparison with the public loader."""
    theirs, _, _ = public_load(str(FIXTURES / "qwen2-native-adversarial"), force_text=True)
    correct = mx.load(str(EXPECTED / "qwen2.safetensors"))
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert bits(parameters(theirs)[bias]) != bits(correct[bias])


def test_the_committed_fixtures_stay_small():
    sizes = {d.name: sum(f.stat().st_size for f in d.rglob("*")) for d in FIXTURES.iterdir()}
    assert max(size for name, size in sizes.items() if name != "expected") <= 2_000_000
    assert sum(sizes.values()) <= 10_000_000
