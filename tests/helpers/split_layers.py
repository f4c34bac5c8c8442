"""Modules with rotated layers that can be split, as in an mlx-lm model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.distributed import shard_inplace, shard_linear
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU

from paroquant_stream.rotation.layers import RotateQuantizedLinear, RotateSwitchGLU
from tests.helpers.rotations import make_rotation


class Block(nn.Module):
    """Two linears as in an mlx-lm model, `first` split by outputs, `second` by inputs."""

    def __init__(self, make, segments=1) -> None:
        super().__init__()
        self.first, self.second = make(64 * 8, 64 * 12), make(64 * 8, 64 * 12)
        self.heads = 8
        self._segments = segments

    def shard(self, group) -> None:
        options = {"segments": self._segments, "group": group}
        self.first = shard_linear(self.first, "all-to-sharded", **options)
        self.heads //= group.size()
        self.second = shard_linear(self.second, "sharded-to-all", group=group)


def linear(inputs, outputs, *, group=64, krot=4, bits=4, bias=False) -> RotateQuantizedLinear:
    rng = np.random.default_rng(inputs + outputs)
    layer = RotateQuantizedLinear(
        inputs, outputs, bias=bias, group_size=group, bits=bits, krot=krot
    )
    names = ("theta", "pairs", "channel_scales")
    values = dict(zip(names, make_rotation(inputs, group, krot), strict=True))
    values["weight"] = rng.integers(0, 2**32, layer.weight.shape, np.uint32)
    for name in ("scales", "biases", "bias") if bias else ("scales", "biases"):
        values[name] = rng.normal(0, 0.01, layer[name].shape).astype(np.float32)
    layer.update({name: mx.array(array) for name, array in values.items()})
    return layer


class Experts(nn.Module):
    """The experts of an mlx-lm model, whose class sums over the ranks itself."""

    def __init__(self) -> None:
        super().__init__()
        glu = RotateSwitchGLU.from_switch_glu(SwitchGLU(256, 512, 6), 64, 4, 4)
        rng = np.random.default_rng(0)
        for name, array in tree_flatten(glu.parameters()):
            module = glu[name.split(".")[0]] if "." in name else glu
            leaf = name.rpartition(".")[2]
            if leaf == "weight":
                module[leaf] = mx.array(rng.integers(0, 2**32, array.shape, np.uint32))
            elif leaf in ("scales", "biases"):
                module[leaf] = mx.array(rng.normal(0, 0.01, array.shape).astype(np.float32))
        for prefix, dims in (("gate_up_rot_", 256), ("down_rot_", 512)):
            names = ("theta", "pairs", "channel_scales")
            for name, value in zip(names, make_rotation(dims, 64, 4), strict=True):
                glu[prefix + name] = mx.array(value)
        self.switch_mlp = glu

    def shard(self, group) -> None:
        for name, how in (
            ("gate_proj", "all-to-sharded"),
            ("up_proj", "all-to-sharded"),
            ("down_proj", "sharded-to-all"),
        ):
            shard_inplace(self.switch_mlp[name], how, group=group)
