"""A ParoQuant vision model for stock mlx-vlm: with paroquant_model.py beside it, this file needs
neither `paroquant_stream` nor `paroquant`.

mlx-vlm 0.6.16 and later run it as the `model_file` of the config.json beside it. They do not ask
before they run it: read it first. It takes the model class of mlx-vlm and puts rotated layers where
config.json says that there are some.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

MARK = "paroquant_stream"
"""The key of config.json with what this file needs to know."""
LAYERS = "paroquant_model.py"
"""The file with the rotated layers."""
_HERE = Path(__file__).parent


class ModelConfig:
    """Makes the config of mlx-vlm's class."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Any:
        """The config of mlx-vlm's class; mlx-vlm takes `quantization` from it too."""
        mark = config[MARK]
        quantization = {name: config["quantization"][name] for name in ("group_size", "bits")}
        made = _library().ModelConfig.from_dict({**config, "quantization": quantization})
        made.quantization = quantization
        setattr(made, MARK, mark)
        return made


class ModelArgs:
    """Where mlx-lm would look for the arguments of a text model."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Any:
        """Raises ValueError: mlx-lm has no class with a tower."""
        raise ValueError(
            "this is a vision model for mlx-vlm (mlx_vlm.generate); mlx-lm runs its text part, "
            "exported with --self-contained"
        )


def Model(config: Any) -> nn.Module:  # noqa: N802  # mlx-vlm calls it as a class
    """mlx-vlm's model with its rotated layers, before its weights are loaded."""
    model: nn.Module = _library().Model(config)
    settings = {"quantization": config.quantization, MARK: getattr(config, MARK)}
    _layers()._put_rotated_layers(model, settings)
    model.sanitize = partial(_sanitize, model, getattr(model, "sanitize", None))
    return model


def _sanitize(model: nn.Module, stock: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The weights as they are: they have the model's own names and values."""
    if stock and not dict(tree_flatten(model.parameters())).keys() <= weights.keys():
        # some classes take a tied head away here
        stock({name: mx.zeros(array.shape, array.dtype) for name, array in weights.items()})
    return weights


def __getattr__(name: str) -> Any:
    """The configs of the model's parts, which mlx-vlm looks for here."""
    if name.startswith("_") or not name.endswith("Config"):
        raise AttributeError(name)
    return getattr(_library(), name)


@cache
def _library() -> Any:
    """mlx-vlm's module of the model."""
    config = json.loads((_HERE / "config.json").read_text(encoding="utf-8"))
    module, _ = importlib.import_module("mlx_vlm.utils").get_model_and_args(config=config)
    return module


@cache
def _layers() -> Any:
    spec = importlib.util.spec_from_file_location("paroquant_model", _HERE / LAYERS)
    if spec is None or spec.loader is None:
        raise ImportError(f"{_HERE / LAYERS} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
