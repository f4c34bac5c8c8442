"""Which part of a model is loaded: all of it, a range of its layers, or a pipeline rank's.

What a part needs is told by the names of stored tensors, before any of them is read: a layer's have
its number. Tensors of no layer (embeddings, final norm, head, towers) belong to every part, as each
rank of mlx-lm's pipelines embeds the tokens, for their shape, and computes the logits.
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
from .tensor_parallel import Take, split_tensors

_LAYER = re.compile(r"(?:(?:model|language_model)\.)*layers\.(\d+)\.")
"""In checkpoints, mlx-lm and mlx-vlm; layers of towers and of token prediction are called
otherwise."""


@dataclass(frozen=True)
class Part:
    """What is loaded of one model."""

    backend: Backend
    layers: range | None
    """None: all."""

    def has(self, name: str) -> bool:
        """Whether a stored tensor is of this model at all; a text model has no towers."""
        return self.backend.is_vlm or not name.startswith(TOWER_PREFIXES)

    def reads(self, name: str) -> bool:
        """Whether a stored tensor is read, by its name in the checkpoint or in the model."""
        number = _layer_of(name)
        return self.has(name) and (self.layers is None or number is None or number in self.layers)


def part_of(
    split: Split,
    config: ModelConfig,
    tensors: Sequence[TensorSpec],
    force_text: bool,
    class_config: Callable[[], Mapping[str, Any]],
) -> Part:
    """Find the part of a model that is loaded.

    Args:
        split: What is asked for.
        config: Of the model.
        tensors: All that is stored of it.
        force_text: Load the text part of a vision model.
        class_config: Gives the config for the model's class; called for a pipeline alone.

    Raises:
        MissingPartError: The model has not these layers, its class has no pipeline, or there are
            more ranks than layers.
        AssemblyError: The config has larger numbers than the tensors allow.
    """
    names = [tensor.name for tensor in tensors]
    check_config(config.values, tensors, str(config.directory / CONFIG_NAME))  # before any class
    backend = select_backend(config.values, names, force_text)
    layers = split.layers
    if split.by_layers and split.group is not None:  # unevaluated, a model costs little
        layers = keep_pipeline_layers(backend.build(class_config()), split.group)
    if layers is not None:
        count = 1 + max((n for n in map(_layer_of, names) if n is not None), default=-1)
        if layers.stop > count:
            raise MissingPartError(
                f"{config.directory}: layers {layers.start} to {layers.stop - 1} were asked for, "
                f"the model has {count}, numbered from 0"
            )
    return Part(backend, layers)


def check_placed(part: Part, weights: dict[str, mx.array], unread: dict[str, mx.array]) -> None:
    """Raises AssemblyError when a class takes a parameter of the part from a tensor of another:
    the placeholder in its place would be zeros.
    """
    absent = {id(array) for array in unread.values()}
    for name, array in weights.items():
        if part.reads(name) and id(array) in absent:
            raise AssemblyError(
                f"{name}: the model class takes it from another layer's tensor, so it cannot be "
                "loaded in parts"
            )


def cut(model: nn.Module, split: Split, part: Part, take: Take | None) -> None:
    """Leaves an assembled, unevaluated model its part; what goes was never read.

    The parameters have been checked against the whole model, and only what is left now is read;
    `take` gives the parts of tensors. Raises SplitError.
    """
    if split.by_tensors:
        split_tensors(model, split.group, take)
    elif split.group is not None:
        keep_pipeline_layers(model, split.group)
    elif part.layers is not None:
        for path, module in model.named_modules():
            layers = module.get("layers")
            if isinstance(layers, list) and _LAYER.match(f"{path}.layers.0.".lstrip(".")):
                module["layers"] = [
                    layer if number in part.layers else AbsentLayer(layer, number, part.layers)
                    for number, layer in enumerate(layers)
                ]


def meet(group: Any) -> None:
    """Returns when every rank of the group is here: on a GPU, a kernel that waits for a rank which
    is still loading would run into the driver's time limit.
    """
    mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group, stream=mx.cpu))


class AbsentLayer(nn.Module):
    """In the place of a layer that was not loaded: no parameters, and calling it is an error.

    It keeps the numbers and words of the layer (`is_linear`, `use_sliding`, ...), by which classes
    make masks and caches.
    """

    def __init__(self, layer: nn.Module, number: int, loaded: range) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # mlx has no annotation here
        plain = (bool, int, float, str)
        vars(self).update({k: v for k, v in vars(layer).items() if isinstance(v, plain)})
        self._number, self._loaded = number, loaded

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Raises MissingPartError."""
        raise MissingPartError(
            f"layer {self._number} was not loaded, only {self._loaded.start} to "
            f"{self._loaded.stop - 1}: call those layers one by one, not the whole model"
        )


def _layer_of(name: str) -> int | None:
    match = _LAYER.match(name)
    return int(match[1]) if match else None
