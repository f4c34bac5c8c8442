"""The model generates what dense weights with the rotation multiplied in generate."""

from __future__ import annotations

import socket
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm import generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from paroquant_stream import load
from paroquant_stream.rotation import kernels
from paroquant_stream.rotation.layers import RotateQuantizedLinear, RotateSwitchGLU
from tests.helpers.paths import FIXTURES
from tests.helpers.server import PROMPT, ask

DENSE, MOE = FIXTURES / "llama-awq-adversarial", FIXTURES / "qwen3_moe-awq-adversarial"
HYBRID_MOE, GEMMA = FIXTURES / "qwen3_5_moe_text-awq-size", FIXTURES / "gemma4_moe-awq-adversarial"
# slow: models generate text, some in processes of their own
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_the_cpu")]


def rotation_matrix(theta, pairs, channel_scales, group: int) -> np.ndarray:
    """Compute the (K, K) matrix of channel scales and rotation in float64, pair by pair."""
    theta, pairs, scales = (np.array(a, np.float64) for a in (theta, pairs, channel_scales))
    size = scales.size
    matrix = np.diag(scales.reshape(-1))
    for angles, order in zip(theta, pairs.astype(int), strict=True):
        offsets = np.repeat(np.arange(0, size, group), group // 2)
        i, j = order[0::2] + offsets, order[1::2] + offsets
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        matrix[i], matrix[j] = matrix[i] * cos + matrix[j] * sin, matrix[j] * cos - matrix[i] * sin
    return matrix


def folded_weight(layer, matrix: np.ndarray, group: int) -> mx.array:
    """Multiply a layer's dense weight (..., N, K) by its rotation, to float32."""
    dense = mx.dequantize(
        layer.weight,
        layer.scales.astype(mx.float32),
        layer.biases.astype(mx.float32),
        group_size=group,
        bits=4,
    )
    return mx.array((np.array(dense, np.float64) @ matrix).astype(np.float32))


def folded_linear(layer: RotateQuantizedLinear) -> nn.Linear:
    matrix = rotation_matrix(layer.theta, layer.pairs, layer.channel_scales, layer.group_size)
    outputs, inputs = layer.weight.shape[0], layer.scales.shape[1] * layer.group_size
    linear = nn.Linear(inputs, outputs, bias="bias" in layer)
    linear.weight = folded_weight(layer, matrix, layer.group_size)
    if "bias" in layer:
        linear.bias = layer.bias
    return linear


def folded_experts(layer: RotateSwitchGLU) -> SwitchGLU:
    group = layer.group_size
    matrices = {
        which: rotation_matrix(
            layer[f"{which}_rot_theta"],
            layer[f"{which}_rot_pairs"],
            layer[f"{which}_rot_channel_scales"],
            group,
        )
        for which in ("gate_up", "down")
    }
    glu = SwitchGLU(8, 8, 1, activation=layer._activation)
    for name, which in (("gate_proj", "gate_up"), ("up_proj", "gate_up"), ("down_proj", "down")):
        linear = SwitchLinear(8, 8, 1, bias=False)
        linear.weight = folded_weight(layer[name], matrices[which], group)
        glu[name] = linear
    return glu


def folded(model: nn.Module) -> nn.Module:
    """Replace the rotated layers of a model by dense float32 ones."""
    swaps = []
    for path, module in model.named_modules():
        if isinstance(module, RotateQuantizedLinear):
            swaps.append((path, folded_linear(module)))
        elif isinstance(module, RotateSwitchGLU):
            swaps.append((path, folded_experts(module)))
    assert swaps
    model.update_modules(tree_unflatten(swaps))
    return model


def logits_of(model, tokens: list[int]) -> np.ndarray:
    return np.array(model(mx.array([tokens])).astype(mx.float32))[0]


def greedy(model, tokens: list[int], count: int) -> list[int]:
    """Decode `count` tokens without sampling, one by one with a cache, as a server does."""
    cache = make_prompt_cache(model)
    out, step = [], mx.array([tokens])
    for _ in range(count):
        token = int(mx.argmax(model(step, cache=cache)[0, -1]).item())
        out.append(token)
        step = mx.array([[token]])
    return out


@pytest.mark.parametrize("directory", [DENSE, MOE, HYBRID_MOE, GEMMA], ids=lambda d: d.name)
def test_tokens_equal_those_of_dense_weights_with_the_rotation(directory):
    model, _, _ = load(directory, force_text=True)
    tokens = [5, 9, 17, 42, 3]
    model.set_dtype(mx.float32)
    ours, written = logits_of(model, tokens), greedy(model, tokens, 24)
    reference = folded(load(directory, force_text=True)[0])
    reference.set_dtype(mx.float32)
    correct = logits_of(reference, tokens)
    assert np.linalg.norm(ours - correct) / np.linalg.norm(correct) < 1e-4
    assert written == greedy(reference, tokens, 24)


@pytest.mark.parametrize("directory", [DENSE, MOE], ids=lambda d: d.name)
def test_a_wrong_rotation_changes_the_logits(directory):
    """So the comparison with dense weights can fail."""
    model, tokenizer, _ = load(directory)
    tokens = tokenizer.encode(PROMPT)
    right = logits_of(model, tokens)
    for _, module in model.named_modules():
        for name in [name for name in module if name.endswith("theta")]:
            module[name] = -module[name]
    wrong = logits_of(model, tokens)
    assert np.linalg.norm(wrong - right) / np.linalg.norm(right) > 0.1


@pytest.mark.parametrize("directory", [DENSE, MOE], ids=lambda d: d.name)
def test_mlx_lm_generates_with_the_model(directory):
    model, tokenizer, _ = load(directory)
    text = generate(model, tokenizer, PROMPT, max_tokens=8)
    tokens = greedy(model, tokenizer.encode(PROMPT), 8)
    assert text.split() == tokenizer.decode(tokens).split()


SERVE = """
import sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
import mlx_lm.server
from mlx_lm.utils import load_config
from pathlib import Path
from paroquant_stream import load
def load_model(path, **_):
    model, tokenizer, _ = load(path)
    return model, tokenizer, load_config(Path(path))
mlx_lm.server.load = load_model
mlx_lm.server.main()
"""


def test_mlx_lm_serves_the_model():
    directory = MOE
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "--model", str(directory), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server:
        try:
            answer = ask(port, {"prompt": PROMPT, "max_tokens": 8, "temperature": 0})
        finally:
            server.terminate()
            errors = server.stderr.read()
    model, tokenizer, _ = load(directory)
    assert answer is not None, errors.decode()
    assert answer.split() == generate(model, tokenizer, PROMPT, max_tokens=8).split()


@pytest.mark.parametrize("name", ["qwen3_5_moe-awq-adversarial", "gemma4_moe-awq-adversarial"])
def test_text_logits_of_mlx_vlm_equal_those_of_mlx_lm(name):
    """The two libraries have their own classes of experts; the entries are the same."""
    tokens = mx.array([[5, 9, 17, 42, 3]])
    vision, _, is_vlm = load(FIXTURES / name)
    text, _, _ = load(FIXTURES / name, force_text=True)
    assert is_vlm
    vision.set_dtype(mx.float32)
    text.set_dtype(mx.float32)
    found = np.array(vision.language_model(tokens).logits)
    correct = np.array(text(tokens))
    assert np.linalg.norm(found - correct) / np.linalg.norm(correct) < 1e-5


@pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU and MLX's CUDA backend")
@pytest.mark.parametrize(
    "family",
    [
        *("llama", "qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_5_moe_text"),
        *("gemma4", "gemma4_moe", "gemma4_e2b"),
        pytest.param(
            "qwen2",
            marks=pytest.mark.xfail(
                strict=True,
                reason="MLX 0.32.4's quantized_matmul on CUDA, several rows of one group of 128",
            ),
        ),
    ],
)
def test_an_nvidia_gpu_has_the_logits_of_the_cpu(family, monkeypatch):
    """Within the error of float16; the fixture `on_the_cpu` restores the default device."""
    directory = min(FIXTURES.glob(f"{family}-awq-*"))

    def logits_on(device) -> np.ndarray:
        mx.set_default_device(device)
        model, _, _ = load(directory, force_text=True)
        return np.array(model(mx.array([[5, 9, 17, 42, 3]])).astype(mx.float32), np.float64)

    def error(logits) -> float:
        return np.linalg.norm(logits - expected) / np.linalg.norm(expected)

    expected = logits_on(mx.cpu)
    assert error(logits_on(mx.gpu)) < 0.05
    monkeypatch.setattr(kernels, "rotate", lambda x, tables: x)
    assert error(logits_on(mx.gpu)) > 0.5
