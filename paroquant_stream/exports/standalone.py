"""A ParoQuant model for stock mlx-lm: in an export, this one file needs neither `paroquant_stream`
nor `paroquant`.

mlx-lm runs it as the `model_file` of the config.json beside it, and only when told to trust the
directory (`trust_remote_code=True`, `--trust-remote-code`). It takes the model class of mlx-lm that
config.json names, puts rotated layers where config.json says that there are some, and is done: the
parameters have their names in the model.safetensors files already.

On a row x, first multiplied by `channel_scales`, inside each group of `group_size` channels, for
k = 0 .. krot - 1 and for each pair (i, j) of round k:

    x_i' = x_i cos(theta) + x_j sin(theta)
    x_j' = x_j cos(theta) - x_i sin(theta)

On an NVIDIA GPU and on Apple silicon a kernel does that, elsewhere plain MLX: the second part of
this file, which has the same text as the modules of `paroquant_stream.rotation`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers import distributed
from mlx.utils import tree_flatten, tree_unflatten

from ..rotation import kernels

MARK = "paroquant_stream"
"""The key of config.json with what this file needs to know."""
_SORT_FROM = 64
"""Routed rows from which experts are visited in order, as mlx-lm does."""


class _Rotated(nn.Module):
    """A module with rotations among its parameters, each under a prefix."""

    def __init__(self, group_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # mlx has no annotation here
        self.group_size = group_size

    def _add_rotation(self, prefix: str, dims: int, krot: int) -> None:
        pairs = (mx.arange(dims) % self.group_size).astype(mx.int16)
        self._krot = krot
        self[f"{prefix}theta"] = mx.zeros((krot, dims // 2))
        self[f"{prefix}pairs"] = mx.broadcast_to(pairs, (krot, dims))
        self[f"{prefix}channel_scales"] = mx.ones((1, dims))

    def _readers(self) -> dict[str, nn.Module]:
        """Prefix -> the layer that reads what this rotation gives."""
        return {"": self}

    def keep_part(self, group: Any) -> None:
        """Keeps of each rotation the channels that this rank's weights read."""
        for prefix, reader in self._readers().items():
            inputs = reader.scales.shape[-1] * self.group_size
            count = group.size() if inputs != self[f"{prefix}pairs"].shape[1] else 1
            for name in ("theta", "pairs", "channel_scales"):
                parts = mx.split(self[f"{prefix}{name}"], count, axis=-1)
                self[f"{prefix}{name}"] = mx.contiguous(parts[group.rank() % count])
            krot, dims = self[f"{prefix}pairs"].shape
            if dims != inputs or krot != self._krot:
                raise ValueError(
                    f"rotated layers cannot be split over {group.size()} ranks: fewer groups of "
                    f"{self.group_size} channels, or fewer key heads, than that"
                )

    def _rotate(self, x: mx.array, prefix: str = "") -> mx.array:
        theta, pairs = self[f"{prefix}theta"], self[f"{prefix}pairs"]
        source = (theta, pairs, self[f"{prefix}channel_scales"])
        tables: kernels.RotationTables | None = getattr(self, f"_{prefix}tables", None)
        if tables is None or not tables.built_from(*source):
            tables = kernels.RotationTables(*source, self.group_size)
            setattr(self, f"_{prefix}tables", tables)
        return kernels.rotate(x, tables)


class RotatedLinear(_Rotated):
    """y = quantized_matmul(rotated x) + bias: (..., inputs) to (..., outputs)."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, *, group_size: int, bits: int, krot: int
    ) -> None:
        super().__init__(group_size)
        self.bits = bits
        self._group: Any = None  # the ranks that hold the other inputs
        self._add_rotation("", inputs, krot)
        self.weight = mx.zeros((outputs, inputs * bits // 32), dtype=mx.uint32)
        self.scales = mx.zeros((outputs, inputs // group_size))
        self.biases = mx.zeros((outputs, inputs // group_size))
        if bias:
            self.bias = mx.zeros((outputs,))
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """The layer's output."""
        stored = self.weight, self.scales, self.biases, True, self.group_size, self.bits
        y = mx.quantized_matmul(self._rotate(x), *stored)
        if self._group is not None:
            y = mx.distributed.all_sum(y, group=self._group)
        return y + self.bias if "bias" in self else y


class RotatedSwitchGLU(_Rotated):
    """The routed experts of a layer, x rotated before gate and up, their product before down."""

    def __init__(self, glu: nn.Module, *, group_size: int, bits: int, krot: int) -> None:
        super().__init__(group_size)
        self._add_rotation("gate_up_rot_", glu.gate_proj.input_dims, krot)
        self._add_rotation("down_rot_", glu.down_proj.input_dims, krot)
        self.freeze()
        for name in ("gate_proj", "up_proj", "down_proj"):
            self[name] = _quantized(glu[name], group_size, bits)
        self._activation = glu.activation

    def _readers(self) -> dict[str, nn.Module]:
        return {"gate_up_rot_": self.gate_proj, "down_rot_": self.down_proj}

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """From x (..., dims) and expert numbers (..., k) to (..., k, dims), not yet weighted."""
        x = self._rotate(x, "gate_up_rot_")
        chosen, in_order = indices, indices.size >= _SORT_FROM
        if in_order:
            chosen = indices.reshape(-1)
            order = mx.argsort(chosen)
            x = x.reshape(-1, 1, x.shape[-1])[order // indices.shape[-1]]
            chosen = chosen[order]
        else:
            x = mx.expand_dims(x, (-2, -3))
        up = self.up_proj(x, chosen, sorted_indices=in_order)
        gate = self.gate_proj(x, chosen, sorted_indices=in_order)
        hidden = self._rotate(self._activation(up, gate), "down_rot_")
        y: mx.array = self.down_proj(hidden, chosen, sorted_indices=in_order).squeeze(-2)
        return y[mx.argsort(order)].reshape(*indices.shape, -1) if in_order else y


def _quantized(projection: nn.Module, group_size: int, bits: int) -> nn.Module:
    """The library's quantized class for a projection of all experts, its random start replaced."""
    layers = importlib.import_module(type(projection).__module__)
    inputs, outputs = projection.input_dims, projection.output_dims
    experts = projection.num_experts
    layer: nn.Module = layers.QuantizedSwitchLinear(
        inputs, outputs, experts, "bias" in projection, group_size, bits
    )
    layer.weight = mx.zeros((experts, outputs, inputs * bits // 32), dtype=mx.uint32)
    layer.scales = mx.zeros((experts, outputs, inputs // group_size))
    layer.biases = mx.zeros((experts, outputs, inputs // group_size))
    return layer


class ModelArgs:
    """All of config.json. No dataclass: one needs its module in sys.modules, and mlx-lm puts this
    file's there not.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """The arguments that `Model` takes, as mlx-lm asks for them."""
        return cls(config)


def __getattr__(name: str) -> Any:
    """Where mlx-vlm would look for the config of a vision model; it runs this file too."""
    if name == "ModelConfig":
        raise ValueError("a text model, which mlx-vlm cannot load: use mlx-lm (mlx_lm.generate)")
    raise AttributeError(name)


def Model(arguments: ModelArgs) -> nn.Module:  # noqa: N802  # mlx-lm calls it as a class
    """The model of config.json with its rotated layers, before its weights are loaded."""
    config = {**arguments.config, "model_type": arguments.config[MARK]["model_type"]}
    library = importlib.import_module(f"mlx_lm.models.{config[MARK]['module']}")

    class RotatedModel(library.Model):  # type: ignore[misc, name-defined]
        """mlx-lm's model, whose weights need no change."""

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            """The weights as they are: they have the model's own names and values."""
            if not dict(tree_flatten(self.parameters())).keys() <= weights.keys():
                # Gemma 3's own one takes the head away when it is tied.
                super().sanitize({k: mx.zeros(a.shape, a.dtype) for k, a in weights.items()})
            return weights

        if hasattr(library.Model, "shard"):

            def shard(self, group: Any = None) -> None:
                """Leaves this rank's part of each layer: tensor parallelism as mlx-lm does it."""
                _shard(self, super().shard, group or mx.distributed.init())

    model: nn.Module = RotatedModel(library.ModelArgs.from_dict(config))
    _put_rotated_layers(model, config)
    return model


def _put_rotated_layers(model: nn.Module, config: Mapping[str, Any]) -> None:
    sizes = {name: config["quantization"][name] for name in ("group_size", "bits")}
    modules = dict(model.named_modules())
    swaps: list[tuple[str, nn.Module]] = []
    for path, krot in config[MARK]["rotated"].items():
        module = modules[path]
        if "weight" in module:
            outputs, inputs = module.weight.shape
            layer: nn.Module = RotatedLinear(inputs, outputs, "bias" in module, krot=krot, **sizes)
        else:
            layer = RotatedSwitchGLU(module, krot=krot, **sizes)
        swaps.append((path, layer))
    model.update_modules(tree_unflatten(swaps))


def _shard(model: nn.Module, stock_shard: Any, group: Any) -> None:
    """Lets mlx-lm split the weights, then takes of each rotation the part for the inputs left.

    mlx-lm's two functions for splitting a layer know no rotations; for the time of the call ours
    stand in their place. Raises ValueError when a layer cannot be split at its groups.
    """

    def inplace(module: nn.Module, how: Any, *, segments: Any = 1, group: Any = None) -> None:
        if isinstance(module, RotatedLinear):
            how = partial(_axis, how == "all-to-sharded", segments)
        distributed.shard_inplace(module, how, segments=segments, group=group)

    def linear(module: nn.Module, how: str, *, segments: Any = 1, group: Any = None) -> Any:
        if not isinstance(module, RotatedLinear):
            return distributed.shard_linear(module, how, segments=segments, group=group)
        inplace(module, how, segments=segments, group=group)
        module._group = group if how == "sharded-to-all" else None
        return module

    layers = [module for module in model.modules() if isinstance(module, _Rotated)]
    names = stock_shard.__func__.__globals__
    ours = {"shard_linear": linear, "shard_inplace": inplace}
    before = {name: names[name] for name in ours.keys() & names.keys()}
    names.update({name: ours[name] for name in before})
    try:
        stock_shard(group)
    finally:
        names.update(before)
    for layer in layers:
        layer.keep_part(group)


def _axis(columns: bool, segments: Any, name: str, _: mx.array) -> Any:
    """Along which axis a parameter of a rotated linear is split; None: it stays whole."""
    if name in ("theta", "pairs", "channel_scales") or (name == "bias" and not columns):
        return None
    return (0 if columns else -1), segments
