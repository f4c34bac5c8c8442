"""The generated file of a self-contained export: its rotation is the package's own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from paroquant_stream.exports.standalone_code import model_code, names_of
from paroquant_stream.rotation import cuda, cuda_rows, kernels, metal
from tests.helpers.rotation_kernels import simulate_cuda, simulate_metal, simulated_kernel
from tests.helpers.rotations import BOUNDS, error, make_rotation, make_x, rotate_float64, to_float64


@pytest.fixture
def generated(tmp_path):
    """The file as mlx-lm runs it: its module is not in sys.modules."""
    path = tmp_path / "paroquant_model.py"
    path.write_text(model_code())
    spec = importlib.util.spec_from_file_location("custom_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "custom_model" not in sys.modules
    return module


def test_it_is_readable_and_names_nothing_twice():
    text = model_code()
    assert text.startswith('"""A ParoQuant model for stock mlx-lm')
    assert max(map(len, text.splitlines())) <= 110
    assert "paroquant_stream import" not in text
    assert "from ." not in text
    names = names_of()
    assert {"_CUDA_SOURCE", "ROWS_SOURCE", "PackedTables", "metal_rotate"} <= set(names)
    assert len(set(names)) == len(names)


def test_no_name_in_it_is_unknown_or_unused():
    """Also in functions that run on a GPU alone."""
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "-"]
    done = subprocess.run(command, input=model_code(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_holds_the_sources_of_the_kernels(generated):
    assert generated._METAL_SOURCE == metal._SOURCE
    assert generated._METAL_HEADER == metal._HEADER
    assert generated._CUDA_SOURCE == cuda._SOURCE
    assert generated.ROWS_SOURCE == cuda_rows.ROWS_SOURCE


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("group_size", "krot"), [(32, 1), (64, 8), (128, 3)])
def test_on_a_cpu_it_rotates_with_the_packages_bits(generated, dtype, group_size, krot):
    parameters = [mx.array(values) for values in make_rotation(256, group_size, krot)]
    tables = generated.kernels.RotationTables(*parameters, group_size)
    for rows in (1, 32, 33, 100):
        x = make_x((rows, 256), dtype)
        expected = kernels.rotate(x, kernels.RotationTables(*parameters, group_size))
        assert mx.array_equal(generated.kernels.rotate(x, tables), expected)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("gpu", ["metal", "cuda"])
def test_on_a_gpu_it_launches_what_the_package_launches(generated, monkeypatch, gpu):
    """Simulated: the same tiles and grids from the same tables."""
    ours, theirs = [], []
    {"metal": simulate_metal, "cuda": simulate_cuda}[gpu](monkeypatch, ours)
    kernel = simulated_kernel(theirs, {"metal": "SIMD_GROUPS", "cuda": "WARPS"}[gpu])
    monkeypatch.setattr(generated, f"_{gpu}_kernel", lambda *_: kernel)
    monkeypatch.setattr(generated, f"{gpu}_on_{gpu}", lambda: True)
    parameters = make_rotation(512, 128, 8)
    arrays = [mx.array(values) for values in parameters]
    tables, own = (k.RotationTables(*arrays, 128) for k in (generated.kernels, kernels))
    for rows in (1, 7, 64, 200):
        x = make_x((rows, 512), mx.float16)
        expected = rotate_float64(to_float64(x), *parameters, 128)
        y = generated.kernels.rotate(x, tables)
        assert error(y, expected) < BOUNDS[mx.float16]
        assert mx.array_equal(y, kernels.rotate(x, own))
    assert theirs[-4:] == ours  # on Metal it is tried once before
    assert len(theirs) == {"metal": 6, "cuda": 4}[gpu]


@pytest.mark.skipif(not cuda.on_cuda(), reason="needs an NVIDIA GPU as MLX's default device")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_on_an_nvidia_gpu_it_has_the_packages_bits(generated, dtype):
    arrays = [mx.array(values) for values in make_rotation(512, 128, 8)]
    tables, own = (k.RotationTables(*arrays, 128) for k in (generated.kernels, kernels))
    for rows in (1, 7, 31, 32, 64, 500):
        x = make_x((rows, 512), dtype)
        y = generated.kernels.rotate(x, tables)
        assert mx.array_equal(y, kernels.rotate(x, own))
        assert tables.nbytes == 512 * 52


def test_a_round_that_names_a_channel_twice_is_refused(generated):
    theta, pairs, scales = make_rotation(64, 32, 2)
    pairs[1, 0] = pairs[1, 1]
    tables = generated.kernels.RotationTables(*map(mx.array, (theta, pairs, scales)), 32)
    with pytest.raises(ValueError, match="each of 32 channels once"):
        generated.kernels.rotate(mx.array(np.ones((1, 64), np.float32)), tables)
