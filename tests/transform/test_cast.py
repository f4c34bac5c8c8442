"""Casting rounds every value once, and a cast model has one dtype for its activations."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from paroquant_stream import convert_checkpoint, load
from paroquant_stream.checkpoint.model_source import ModelSource
from paroquant_stream.cli.convert import main
from paroquant_stream.conversion.request import Target
from paroquant_stream.errors import OutOfRangeError
from paroquant_stream.store.format import VARIANTS
from paroquant_stream.store.store import Store
from paroquant_stream.transform.cast import cast
from tests.helpers.builders import llama_tensors, write_checkpoint
from tests.helpers.paths import FIXTURES

HALVES = np.arange(65536, dtype=np.uint16)
MIXED = FIXTURES / "qwen3-awq-size"  # float16 scales, bfloat16 norms and embeddings
MLX = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
WIDTHS = {"float16": "F16", "bfloat16": "BF16"}


def value_of(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Decode 16-bit floats to float64 by their definition: sign, exponent, fraction."""
    exponent_bits, fraction_bits = {"F16": (5, 10), "BF16": (8, 7)}[dtype]
    words = bits.astype(np.int64)
    exponent = (words >> fraction_bits) & (2**exponent_bits - 1)
    fraction = (words & (2**fraction_bits - 1)).astype(np.float64)
    bias = 2 ** (exponent_bits - 1) - 1
    scaled = np.where(
        exponent == 0,
        np.ldexp(fraction, 1 - bias - fraction_bits),
        np.ldexp(fraction + 2**fraction_bits, (exponent - bias - fraction_bits).astype(int)),
    )
    special = np.where(fraction == 0, np.inf, np.nan)
    size = np.where(exponent == 2**exponent_bits - 1, special, scaled)
    return np.where(words >> 15, -1, 1) * size


def nearest(values: np.ndarray, dtype: str) -> np.ndarray:
    """Find the 16-bit float nearest to each finite value, ties to even, by search."""
    table = HALVES[:32768]
    table = table[np.isfinite(value_of(table, dtype))]
    grid = value_of(table, dtype)
    size = np.abs(values)
    above = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
    low, high = size - grid[above - 1], grid[above] - size
    word = np.where((low < high) | ((low == high) & (table[above] % 2 == 1)), above - 1, above)
    limit = grid[-1] + (grid[-1] - grid[-2]) / 2  # halfway to the next value beyond the largest
    return np.where(size >= limit, len(grid), word) | np.where(np.signbit(values), 0x8000, 0)


@pytest.mark.parametrize(("found", "expected"), [("F16", "BF16"), ("BF16", "F16")])
def test_every_half_is_rounded_to_nearest(found, expected):
    data, lost = cast(memoryview(HALVES.tobytes()), found, expected)
    result, values = np.frombuffer(data, np.uint16), value_of(HALVES, found)
    finite = np.isfinite(values)
    assert np.array_equal(result[finite], nearest(values[finite], expected))
    assert np.array_equal(value_of(result, expected)[np.isinf(values)], values[np.isinf(values)])
    assert np.isnan(value_of(result, expected)[np.isnan(values)]).all()
    assert np.array_equal(result >> 15, HALVES >> 15)
    assert lost == int(np.isinf(value_of(result, expected)[finite]).sum())
    assert (lost > 0) == (found == "BF16")


@pytest.mark.parametrize("expected", ["F16", "BF16"])
@pytest.mark.parametrize("found", ["F16", "BF16", "F32"])
def test_mlx_casts_to_the_same_bits(found, expected):
    if found == "F32":  # below, at and above the midpoint of every two consecutive values
        upper = (HALVES.astype(np.uint32) << 16)[:, None]
        words = (upper + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).reshape(-1)
        array = mx.array(words).view(mx.float32)
    else:
        words, array = HALVES, mx.array(HALVES).view(MLX[found])
    data, _ = cast(memoryview(words.tobytes()), found, expected)
    theirs = np.array(array.astype(MLX[expected], stream=mx.cpu).view(mx.uint16))
    ours = np.frombuffer(data, np.uint16)
    numbers = ~np.isnan(value_of(ours, expected))
    assert np.array_equal(ours[numbers], theirs[numbers])
    assert np.array_equal(numbers, ~np.isnan(value_of(theirs, expected)))


def test_a_finite_value_that_becomes_infinite_is_counted():
    wide = np.array([65504, 65519.9, 65520, -1e6, np.inf, np.nan, 3.4e38], np.float32)
    assert cast(memoryview(wide.tobytes()), "F32", "F16")[1] == 3
    assert cast(memoryview(wide.tobytes()), "F32", "BF16")[1] == 1


KEYS = {
    "llama-awq-adversarial": "6cae3d903b6faa70 2b576a7e6cb4e543 03158fb02e5b4ab7 6a4903ed8ba55273",
    "llama-native-size": "50fcb23949dcad8d 909587d8754325de 20bdbc0b2e6742db",
    "llama-legacy-size": "fbc74c0a51ee9d34 eac4a7446cf82613 1076a25f178f7e11",
    "qwen3_5_moe-awq-adversarial": (
        "4be61e9147e28db6 26066f79b4650de6 5c24e2831b2bb36d 73e279f6b5747613"
    ),
}
"""The first 16 digits of each entry's key, as before `dtype` existed."""


@pytest.mark.parametrize("name", KEYS)
def test_keys_without_a_cast_never_change(name, tmp_path):
    manifest = convert_checkpoint(FIXTURES / name, cache_dir=tmp_path)
    assert " ".join(record.key[:16] for record in manifest.entries) == KEYS[name]


def test_the_name_of_a_manifest_changes_with_the_variant():
    source, target = ModelSource("m", Path("/nowhere/model")), Target(Store(Path("/nowhere/c")))
    assert target.manifest_name(source) == (
        "9844b94985e8fec619c10bebf7eacf786d3b4111d63da9488f48b43d05c36a89"
    )
    assert replace(target, in_place=True).manifest_name(source) == "model-a0a1c83eca430d48"
    names = {replace(target, variant=v).manifest_name(source) for v in VARIANTS.values()}
    assert len(names) == 6


def tensors_of(manifest) -> dict[str, str]:
    return {tensor.name: tensor.dtype for record in manifest.entries for tensor in record.tensors}


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("name", ["qwen3-awq-size", "qwen3_5_moe-awq-adversarial"])
def test_tensors_have_the_requested_dtype(name, dtype, tmp_path):
    source = tensors_of(convert_checkpoint(FIXTURES / name, cache_dir=tmp_path))
    found = tensors_of(convert_checkpoint(FIXTURES / name, cache_dir=tmp_path, dtype=dtype))
    assert found.keys() == source.keys()
    kept = ("theta", "channel_scales", "A_log", "dt_bias")
    for tensor, was in source.items():
        free = was in MLX and not tensor.endswith(kept)
        assert found[tensor] == (WIDTHS[dtype] if free else was), tensor


def test_conversions_of_two_dtypes_share_a_cache(tmp_path):
    source = convert_checkpoint(MIXED, cache_dir=tmp_path)
    narrow = convert_checkpoint(MIXED, cache_dir=tmp_path, dtype="bfloat16")
    keys = [{record.key for record in manifest.entries} for manifest in (source, narrow)]
    assert not keys[0] & keys[1]
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(source.entries + narrow.entries)
    assert convert_checkpoint(MIXED, cache_dir=tmp_path) == source
    assert len(list(tmp_path.rglob("*.msgpack"))) == 2


def test_entries_are_shared_where_no_value_is_cast(tmp_path):
    model = FIXTURES / "llama-awq-adversarial"  # all float16
    source = convert_checkpoint(model, cache_dir=tmp_path)
    same = convert_checkpoint(model, cache_dir=tmp_path, dtype="float16")
    assert [record.key for record in same.entries] == [record.key for record in source.entries]


def test_an_in_place_conversion_has_one_dtype(tmp_path):
    model = write_checkpoint(tmp_path / "model")
    convert_checkpoint(model, in_place=True, dtype="bfloat16")
    load(model, cache_dir=tmp_path / "c", dtype="bfloat16")
    assert not (tmp_path / "c").exists()
    load(model, cache_dir=tmp_path / "c")
    assert (tmp_path / "c").exists()


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("dtype", WIDTHS)
def test_a_cast_model_computes_in_its_dtype(dtype, tmp_path):
    tokens = mx.array([[5, 9, 17, 42, 3]])
    mixed, _, _ = load(MIXED, cache_dir=tmp_path)
    uniform, _, _ = load(MIXED, cache_dir=tmp_path, dtype=dtype)
    wide, narrow = mixed(tokens), uniform(tokens)
    assert (wide.dtype, narrow.dtype) == (mx.float32, MLX[WIDTHS[dtype]])
    gap = np.linalg.norm(np.array(narrow.astype(mx.float32)) - np.array(wide))
    assert gap / np.linalg.norm(np.array(wide)) < (0.06 if dtype == "bfloat16" else 0.015)


@pytest.mark.usefixtures("on_the_cpu")
def test_every_parameter_is_rounded_once(tmp_path):
    """An embedding is quantized first, then its scales and biases are cast."""
    before, after = (
        dict(tree_flatten(load(MIXED, cache_dir=tmp_path, dtype=dtype)[0].parameters()))
        for dtype in ("source", "bfloat16")
    )
    assert before.keys() == after.keys()
    for name, array in after.items():
        assert mx.array_equal(before[name].astype(array.dtype), array), name


def test_an_overflow_is_an_error_and_stores_nothing(tmp_path, capsys):
    tensors = llama_tensors()
    norm = "model.layers.1.input_layernorm.weight"
    tensors[norm] = np.full(tensors[norm].shape, 1e5, np.float32)
    model, cache = write_checkpoint(tmp_path / "model", tensors), tmp_path / "c"
    with pytest.raises(
        OutOfRangeError, match=rf"{norm} of model\.safetensors: 64 values are beyond"
    ):
        convert_checkpoint(model, cache_dir=cache, dtype="float16")
    assert main([str(model), "--cache-dir", str(cache), "--dtype", "float16"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {norm} of model.safetensors: 64 values")
    assert [path for path in cache.rglob("*") if path.suffix in (".safetensors", ".msgpack")] == []
    assert main([str(model), "--cache-dir", str(cache), "--dtype", "bfloat16", "--quiet"]) == 0


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="source, float16, bfloat16, not 'int8'"):
        convert_checkpoint(tmp_path, dtype="int8")


# `pytest -m long tests/transform/test_cast.py -s` prints the figures.


def milliseconds(rows: int, x_dtype: str, scales_dtype: str) -> tuple[float, str]:
    """Time one quantized_matmul of 1024 x 1024; return that and the dtype of its result."""
    rng = np.random.default_rng(0)
    weight, scales, biases = mx.quantize(mx.array(rng.normal(size=(1024, 1024))), 128, 4)
    scales, biases = (a.astype(MLX[scales_dtype]) for a in (scales, biases))
    x = mx.array(rng.normal(size=(rows, 1024))).astype(MLX[x_dtype])
    mx.eval(weight, scales, biases, x)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        y = mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=128, bits=4)
        mx.eval(y)
        times.append(time.perf_counter() - start)
    return 1000 * min(times), str(y.dtype).removeprefix("mlx.core.")


def tokens_a_second(model) -> tuple[float, float]:
    """Measure tokens per second of prefill with 32 tokens and of decoding, the best of three."""
    best = [0.0, 0.0]
    for _ in range(3):
        cache = make_prompt_cache(model)
        start = time.perf_counter()
        mx.eval(model(mx.arange(2, 34)[None], cache=cache))
        middle = time.perf_counter()
        for token in range(16):
            mx.eval(model(mx.array([[token]]), cache=cache))
        rates = 32 / (middle - start), 16 / (time.perf_counter() - middle)
        best = [max(pair) for pair in zip(best, rates, strict=True)]
    return best[0], best[1]


def perplexity(model, tokens: np.ndarray) -> float:
    logits = model(mx.array(tokens[None, :-1])).astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.array(tokens[None, 1:, None]), -1)[..., 0]
    return math.exp(float(mx.mean(mx.logsumexp(logits, -1) - chosen)))


def sampled_text(model, count: int) -> np.ndarray:
    """Sample tokens from the model at temperature 0.25, for a perplexity that is meaningful."""
    mx.random.seed(0)
    cache, tokens = make_prompt_cache(model), [5]
    for _ in range(count):
        logits = model(mx.array([tokens[-1:]]), cache=cache)[0, -1].astype(mx.float32)
        tokens.append(int(mx.random.categorical(4 * logits)))
    return np.array(tokens)


@pytest.mark.long
@pytest.mark.usefixtures("on_the_cpu")
def test_the_figures_of_each_dtype(tmp_path):
    print(f"\nMLX {mx.__version__}, CPU; quantized_matmul 1024 x 1024, group 128, milliseconds")
    for x, scales in [("F16", "F16"), ("BF16", "F16"), ("BF16", "BF16"), ("F32", "F16")]:
        (one, out), (many, _) = (milliseconds(rows, x, scales) for rows in (1, 8))
        print(f"x {x:4}  scales {scales:4}  1 row {one:8.2f}  8 rows {many:8.2f}  returns {out}")
    print("fixture, dtype, logits; tokens a second (prefill of 32, decode); perplexity, the same")
    print("with float32 activations: what the stored values alone change")
    for name in ("qwen3-awq-size", "llama-awq-adversarial", "qwen3_5_text-awq-size"):
        text, expected = None, 0.0
        for dtype in ("source", *WIDTHS):
            model, _, _ = load(FIXTURES / name, cache_dir=tmp_path / "c", dtype=dtype)
            text = sampled_text(model, 200) if text is None else text
            found = perplexity(model, text)
            expected = expected or found
            out = str(model(mx.array([[5]])).dtype).removeprefix("mlx.core.")
            prefill, decode = tokens_a_second(model)
            model.set_dtype(mx.float32)
            stored = perplexity(model, text)
            figures = f"{prefill:9.1f} {decode:8.1f} {found:10.4f} {stored:10.4f}"
            print(f"{name:22} {dtype:9} {out:9} {figures}")
            assert abs(found / expected - 1) < 0.1
