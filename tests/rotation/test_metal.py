"""The Metal kernel of the paroquant package: its tables and launch, and when it is used."""

from __future__ import annotations

import sys
import types

import mlx.core as mx
import pytest

from paroquant_stream.rotation import kernels, metal, reference
from tests.helpers.rotation_kernels import simulate_metal
from tests.helpers.rotations import (
    error,
    make_rotation,
    make_x,
    rotate_float64,
    tables_of,
    to_float64,
)


@pytest.mark.parametrize(("group_size", "krot"), [(32, 1), (64, 8), (128, 16)])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_tables_and_launch_compute_the_rotation(monkeypatch, group_size, krot, batch):
    """Simulated: the words, coefficients and grid are right; the kernel itself needs a Mac."""
    launches = []
    simulate_metal(monkeypatch, launches)
    dims = 3 * group_size
    parameters = make_rotation(dims, group_size, krot)
    x = make_x((batch, dims), mx.float16)
    y = kernels.rotate(x, tables_of(parameters, group_size))
    assert error(y, rotate_float64(to_float64(x), *parameters, group_size)) < 1e-3
    tile = 1 if batch == 1 else 4
    assert launches == [(tile, (-(-batch // tile) * group_size // 2, 3, 1))]


class WithoutSource(types.ModuleType):
    """A build of the package that lacks the kernel's source file."""

    def __getattr__(self, name):
        raise FileNotFoundError(name)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("package", [None, WithoutSource("paroquant.kernels.metal")])
def test_without_the_packages_kernel_the_reference_runs(monkeypatch, package):
    monkeypatch.setattr(metal, "on_metal", lambda: True)
    monkeypatch.setitem(sys.modules, "paroquant.kernels.metal", package)
    metal.package_kernel.cache_clear()
    try:
        tables = tables_of(make_rotation(256, 64, 4), 64)
        assert not metal.usable(tables)
        x = make_x((2, 256))
        assert mx.array_equal(kernels.rotate(x, tables), reference.rotate(x, tables))
    finally:
        metal.package_kernel.cache_clear()


def test_the_installed_package_has_the_kernel_that_is_called(monkeypatch):
    """Its inputs by name and order, and its limits: a release that changes them fails here."""
    package = pytest.importorskip("paroquant.kernels.metal.rotation")
    made = {}
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **options: made.update(options))
    package.get_rotation_kernel.__wrapped__(4)
    assert made["input_names"] == [
        *("x", "packed_pairs", "cos_theta", "sin_theta", "channel_scales", "params")
    ]
    assert made["output_names"] == ["out"]
    limits = (package._MAX_GROUP_SIZE, package._MAX_KROT)
    assert limits == (metal.MAX_GROUP_SIZE, metal.MAX_KROT)
    assert metal.package_kernel() is package.get_rotation_kernel
