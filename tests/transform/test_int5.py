"""Checkpoints with five bits: the codes that were packed are those of the model, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from paroquant_stream import load
from paroquant_stream.cli import export
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import PlanError
from paroquant_stream.transform import int5
from tests.helpers.builders import (
    CONFIG,
    GROUP,
    LINEARS,
    cut_apart,
    cut_evenly,
    llama_tensors,
    write_checkpoint,
)
from tests.helpers.parameters import bits, parameters

pytestmark = pytest.mark.usefixtures("on_the_cpu")
BLOCK = CONFIG["quantization_config"] | {"bits": 5, "format": "int5-bitplane"}
INT5 = CONFIG | {"quantization_config": BLOCK}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(codes: np.ndarray) -> np.ndarray:
    """Low four bits as AutoAWQ packs them: nibble i of a word is output ORDER[i] of its eight."""
    nibbles = (codes & 15).astype(np.int64).reshape(len(codes), -1, 8)[:, :, ORDER]
    words = sum(nibbles[:, :, place] << (4 * place) for place in range(8))
    return words.astype(np.uint32).view(np.int32)


def plane(codes: np.ndarray) -> np.ndarray:
    """Fifth bits: bit n % 32 of word n // 32."""
    fifth = (codes >> 4).astype(np.int64).reshape(len(codes), -1, 32)
    words = sum(fifth[:, :, place] << place for place in range(32))
    return words.astype(np.uint32).view(np.int32)


def five_bits(seed: int = 0) -> tuple[dict, dict]:
    """Give the tensors of a llama, and the codes (N, K) and zeros (N, K/G) of each linear."""
    rng = np.random.default_rng(seed)
    tensors, codes = llama_tensors(), {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        outputs, inputs = LINEARS[module.split(".", 3)[3]]
        weight = rng.integers(0, 32, (inputs, outputs), np.uint8)
        zeros = rng.integers(0, 32, (inputs // GROUP, outputs), np.uint8)
        zeros[:, 0] = 0
        tensors |= {name: packed(weight), f"{module}.qzeros": packed(zeros)}
        tensors |= {f"{name}_hi": plane(weight), f"{module}.qzeros_hi": plane(zeros)}
        codes[module] = weight.T, zeros.T
    return tensors, codes


@pytest.mark.parametrize("cut", [None, cut_evenly(3), cut_apart(4)])
def test_the_model_has_the_codes_that_were_packed(tmp_path, cut, monkeypatch):
    monkeypatch.setattr(int5, "_STRIPE_ELEMENTS", 32 * 64)  # several stripes of a linear
    tensors, codes = five_bits()
    model, _, _ = load(write_checkpoint(tmp_path / "m", tensors, cut, INT5))
    found = parameters(model)
    assert codes
    for module, (weight, zeros) in codes.items():
        stored = np.array(found[f"{module}.weight"]).view(np.uint8)
        stream = np.unpackbits(stored, axis=1, bitorder="little").reshape(*weight.shape, 5)
        assert np.array_equal(stream @ (1 << np.arange(5)), weight)
        scales = tensors[f"{module}.scales"].T
        assert bits(found[f"{module}.scales"]) == bits(mx.array(scales))
        biases = -(scales.astype(np.float32) * zeros)
        assert bits(found[f"{module}.biases"]) == bits(mx.array(biases.astype(np.float16)))
        layer = [found[f"{module}.{leaf}"] for leaf in ("weight", "scales", "biases")]
        values = np.array(mx.dequantize(*layer, GROUP, 5)).astype(np.float32)
        exact = (weight - zeros.repeat(GROUP, 1).astype(np.float32)) * scales.repeat(GROUP, 1)
        assert np.abs(values - exact).max() < 1e-3
    embedding = mx.array(tensors["model.embed_tokens.weight"])
    expected = mx.quantize(embedding, GROUP, 5, stream=mx.cpu)  # the config's bits
    assert bits(found["model.embed_tokens.weight"]) == bits(expected[0])
    assert mx.isfinite(model(mx.array([[5, 9, 17]]))).all()


def test_an_export_of_five_bits_gives_the_same_logits(tmp_path):
    directory = write_checkpoint(tmp_path / "m", five_bits()[0], None, INT5)
    tokens = mx.array([[5, 9, 17]])
    expected = load(directory)[0](tokens)
    assert export.main([str(directory), str(tmp_path / "out"), "--quiet"]) == 0
    assert mx.array_equal(load(tmp_path / "out")[0](tokens), expected)


def test_a_head_of_8_bits_beside_linears_of_five(tmp_path):
    directory = write_checkpoint(tmp_path / "m", five_bits()[0], None, INT5)
    model, _, _ = load(directory, io_bits=8)
    assert (model.lm_head.bits, model.model.layers[0].mlp.up_proj.bits) == (8, 5)


@pytest.mark.parametrize("missing", ["qweight_hi", "qzeros_hi"])
def test_a_missing_plane_is_an_error(tmp_path, missing):
    name = f"model.layers.1.mlp.up_proj.{missing}"
    tensors = {key: array for key, array in five_bits()[0].items() if key != name}
    directory = write_checkpoint(tmp_path / "m", tensors, None, INT5)
    with pytest.raises(PlanError, match=f"{name}: missing"):
        convert(make_request(directory))


def test_planes_of_a_config_with_4_bits_are_left_over(tmp_path):
    directory = write_checkpoint(tmp_path / "m", five_bits()[0])
    with pytest.raises(PlanError, match=r"qweight_hi .*: not a part that layout AUTOAWQ has"):
        convert(make_request(directory))


@pytest.mark.parametrize(
    ("module", "outputs"), [("x.proj", 40), ("x.experts.0.up_proj", 32)], ids=["width", "expert"]
)
def test_a_form_that_is_not_known_is_refused(tmp_path, module, outputs):
    codes = np.zeros((64, outputs), np.uint8)
    parts = {
        f"{module}.qweight": packed(codes), f"{module}.qzeros": packed(codes[:2]),
        f"{module}.qweight_hi": np.zeros((64, 1), np.int32),
        f"{module}.qzeros_hi": np.zeros((2, 1), np.int32),
        f"{module}.scales": np.ones((2, outputs), np.float16),
    }  # fmt: skip
    if "experts" not in module:
        parts |= {
            f"{module}.theta": np.zeros((1, 32), np.float16),
            f"{module}.pairs": np.zeros((1, 64), np.int16),
            f"{module}.channel_scales": np.ones((1, 64), np.float16),
        }
    directory = write_checkpoint(tmp_path / "m", parts, None, INT5)
    with pytest.raises(PlanError, match="int5-bitplane is known for linears of a multiple of 32"):
        convert(make_request(directory))
