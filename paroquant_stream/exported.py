"""A directory that `export` wrote, read back: its tensors already have the model's own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from .checkpoint import EXPORTED, Shard, open_checkpoint
from .descriptor import closing
from .errors import AssemblyError, CheckpointError
from .layout import read_quantization
from .model import check, check_memory, swap_layers
from .model_class import build, load_config, load_tokenizer
from .tensorfile import read_header

FORMAT = 1
"""The number of the directory's form; another one is for another version of this package."""


def load_exported(directory: Path, *, lazy: bool) -> tuple[nn.Module, Any, bool]:
    """`(model, tokenizer, False)` of an exported directory; no code in it is run.

    Raises CheckpointError, MalformedFile or LayoutError when it is damaged, AssemblyError when its
    tensors and the model's parameters do not match one to one.
    """
    checkpoint = open_checkpoint(directory)
    _check_format(checkpoint.config[EXPORTED], directory)
    quantization = read_quantization(checkpoint.config)
    headers = checkpoint.headers()
    if not lazy:
        check_memory(sum(t.nbytes for header in headers.values() for t in header.tensors))
    weights: dict[str, mx.array] = {}
    for shard in checkpoint.shards:
        weights |= _read(shard)
    config = load_config(directory)
    model = build(config, is_vlm=False)
    tokenizer = load_tokenizer(directory, config, is_vlm=False)
    try:
        swap_layers(model, weights, quantization.bits, quantization.group_size)
    except (ValueError, LookupError, ArithmeticError, AttributeError, TypeError) as error:
        raise AssemblyError(  # what the shapes and names of tensors that no export has lead to
            f"{directory}: its tensors are no rotated layers of this model: {error}"
        ) from error
    check(model, weights)
    model.load_weights(list(weights.items()))
    if not lazy:
        try:
            mx.eval(model.parameters())
        except Exception as error:
            raise AssemblyError(f"{directory}: MLX could not read it: {error}") from error
    model.eval()
    return model, tokenizer, False


def _check_format(mark: Any, directory: Path) -> None:
    found = mark.get("format") if type(mark) is dict else mark
    if found != FORMAT:
        raise CheckpointError(
            f"{directory}: exported in format {found!r}, this version reads {FORMAT}; "
            "upgrade paroquant_stream or export the model again"
        )


def _read(shard: Shard) -> dict[str, mx.array]:
    """A shard's lazy arrays, through the very descriptor whose header was checked."""
    with closing(shard.open()) as fd:
        read_header(fd, str(shard.path))
        return cast("dict[str, mx.array]", mx.load(f"/dev/fd/{fd}", format="safetensors"))
