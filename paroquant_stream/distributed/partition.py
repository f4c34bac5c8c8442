"""Which part of a model is loaded: all of it, a range of its layers, or a pipeline rank's layers.

The names of the stored tensors decide which of them a part needs, before any is read: those of a
layer have its number. Tensors of no layer (embeddings, final norm, head, towers) belong to every
part, as each rank of mlx-lm's pipelines embeds the tokens, for their shape, and computes the
logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..backends.backend import Backend, keep_pipeline_layers
from ..backends.selection import TOWER_PREFIXES, select_backend
from ..checkpoint.config import CONFIG_NAME, ModelConfig
from ..checkpoint.config_bounds import check_config
from ..errors import AssemblyError, MissingPartError
from ..files.tensor_header import TensorSpec
from .split import Split
from .tensor_parallel import SliceReader, split_tensors

_LAYER = re.compile(r"(?:(?:model|language_model)\.)*layers\.(\d+)\.")
"""The layers of a text model, in checkpoints, mlx-lm and mlx-vlm; those of towers and of token
prediction have other names."""


@dataclass(frozen=True)
class Partition:
    """The part of one model that is loaded."""

    backend: Backend
    """Builds the model class."""
    layers: range | None
    """The numbers of the layers; None for all."""

    def has(self, name: str) -> bool:
        """Tell whether a stored tensor belongs to the model; a text model has no towers."""
        return self.backend.is_vlm or not name.startswith(TOWER_PREFIXES)

    def reads(self, name: str) -> bool:
        """Tell whether a tensor is read, by its name in the checkpoint or in the model."""
        number = _layer_of(name)
        return self.has(name) and (self.layers is None or number is None or number in self.layers)


def find_partition(
    split: Split,
    config: ModelConfig,
    tensors: Sequence[TensorSpec],
    force_text: bool,
    class_config: Callable[[], Mapping[str, Any]],
) -> Partition:
    """Find the part of a model that is loaded.

    Args:
        split: The requested part.
        config: Of the model.
        tensors: All stored tensors of the model.
        force_text: Load the text part of a vision model.
        class_config: Returns the config for the model's class; called only for a pipeline.

    Raises:
        MissingPartError: The model has not these layers, its class has no pipeline, or there are
            more ranks than layers.
        AssemblyError: The config has larger numbers than the tensors allow.
    """
    names = [tensor.name for tensor in tensors]
    # before the model class allocates what the config says
    check_config(config.values, tensors, str(config.directory / CONFIG_NAME))
    backend = select_backend(config.values, names, force_text)
    layers = split.layers
    if split.by_layers and split.group is not None:  # an unevaluated model takes little memory
        layers = keep_pipeline_layers(backend.build(class_config()), split.group)
    if layers is not None:
        count = 1 + max((n for n in map(_layer_of, names) if n is not None), default=-1)
        if layers.stop > count:
            raise MissingPartError(
                f"{config.directory}: layers {layers.start} to {layers.stop - 1} were requested, "
                f"the model has {count}, numbered from 0"
            )
    return Partition(backend, layers)


def check_placed(
    partition: Partition, weights: dict[str, mx.array], unread: dict[str, mx.array]
) -> None:
    """Check that no placeholder became a parameter of the part; it would be zeros.

    Args:
        partition: The part that is loaded.
        weights: Parameter name -> array, as the model class assigned them.
        unread: Tensor name -> placeholder, of the tensors of other parts.

    Raises:
        AssemblyError: The class takes a parameter of the part from a tensor of another part.
    """
    absent = {id(array) for array in unread.values()}
    for name, array in weights.items():
        if partition.reads(name) and id(array) in absent:
            raise AssemblyError(
                f"{name}: the model class takes it from another layer's tensor, so it cannot be "
                "loaded in parts"
            )


def apply_partition(
    model: nn.Module, split: Split, partition: Partition, reader: SliceReader | None
) -> None:
    """Remove from an assembled, unevaluated model all but the requested part.

    The parameters were checked against the whole model; what is removed is never read.

    Args:
        model: The whole model.
        split: The requested part.
        partition: The part that is loaded.
        reader: Reads the slices of tensors that are split; None to slice the model's own arrays.

    Raises:
        SplitError: The tensors cannot be split over the ranks.
    """
    if split.by_tensors:
        split_tensors(model, split.group, reader)
    elif split.group is not None:
        keep_pipeline_layers(model, split.group)
    elif partition.layers is not None:
        for path, module in model.named_modules():
            layers = module.get("layers")
            if isinstance(layers, list) and _LAYER.match(f"{path}.layers.0.".lstrip(".")):
                module["layers"] = [
                    layer
                    if number in partition.layers
                    else AbsentLayer(layer, number, partition.layers)
                    for number, layer in enumerate(layers)
                ]


def barrier(group: Any) -> None:
    """Wait until every rank of the group calls this.

    On a GPU, a kernel that waits for a rank which is still loading would exceed the driver's time
    limit.
    """
    mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group, stream=mx.cpu))


class AbsentLayer(nn.Module):
    """Replaces a layer that was not loaded: it has no parameters, and calling it is an error.

    It has the plain attributes of the layer (`is_linear`, `use_sliding`, ...), from which model
    classes create masks and caches.
    """

    def __init__(self, layer: nn.Module, number: int, loaded: range) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # mlx has no annotation
        plain = (bool, int, float, str)
        vars(self).update({k: v for k, v in vars(layer).items() if isinstance(v, plain)})
        self._number, self._loaded = number, loaded

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Raise MissingPartError."""
        raise MissingPartError(
            f"layer {self._number} was not loaded, only {self._loaded.start} to "
            f"{self._loaded.stop - 1}: call those layers one by one, not the whole model"
        )


def _layer_of(name: str) -> int | None:
    match = _LAYER.match(name)
    return int(match[1]) if match else None
