"""Read a directory that `export` wrote: its tensors have the model's own names already."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..checkpoint.checkpoint import open_checkpoint
from ..checkpoint.config import EXPORTED, ModelConfig
from ..checkpoint.quantization import read_quantization
from ..checkpoint.shard import Shard
from ..errors import AssemblyError, CheckpointError, ParoquantStreamError
from ..files.descriptor import closing, path_of
from ..files.tensor_header import read_header
from ..model.tensor_source import TensorSource

FORMAT = 1
"""The number of the directory's form; another one is for another version of this package."""


def stored_in_export(config: ModelConfig, force_text: bool) -> TensorSource:
    """Open the tensors of an exported directory; no code in it is run.

    Raises:
        CheckpointError: It is damaged; MalformedFileError or LayoutError where that is the reason.
            Or the text part is wanted of one with a tower, whose names are mlx-vlm's.
    """
    directory, checkpoint = config.directory, open_checkpoint(config)
    _check_format(config.values[EXPORTED], directory)
    if force_text and config.values.get("vision_config"):
        raise CheckpointError(
            f"{directory}: was exported with its tower; load it without force_text, or export the "
            "text part of its original, without --vision"
        )
    found = read_quantization(config.values, str(config.path))
    headers = checkpoint.headers()
    tensors = [t for header in headers.values() for t in header.tensors]

    def read(wanted: Callable[[str], bool]) -> dict[str, mx.array]:
        weights: dict[str, mx.array] = {}
        for shard in checkpoint.shards:
            names = [t.name for t in headers[shard.name].tensors if wanted(t.name)]
            arrays = _read(shard) if names else {}
            weights |= {name: arrays[name] for name in names}
        return weights

    def check(_wanted: Callable[[str], bool]) -> None:
        for shard in checkpoint.shards:  # MLX before 0.32.4 gives zeros for what was cut off
            size = os.path.getsize(shard.path) if os.path.exists(shard.path) else None
            if size not in (None, headers[shard.name].size):
                raise AssemblyError(
                    f"{shard.path}: its size changed while it was read; load it again"
                )

    return TensorSource(
        tensors, read, lambda _: _guard(directory), check, found.bits, found.group_size, True
    )


@contextlib.contextmanager
def _guard(directory: Path) -> Iterator[None]:
    try:
        yield
    except ParoquantStreamError:
        raise
    except Exception as error:
        raise AssemblyError(f"{directory}: MLX could not read it: {error}") from error


def _check_format(mark: Any, directory: Path) -> None:
    found = mark.get("format") if type(mark) is dict else mark
    if found != FORMAT:
        raise CheckpointError(
            f"{directory}: exported in format {found!r}, this version reads {FORMAT}; "
            "upgrade paroquant_stream or export the model again"
        )


def _read(shard: Shard) -> dict[str, mx.array]:
    """Open a shard's lazy arrays through the descriptor whose header was checked."""
    with closing(shard.open()) as fd:
        read_header(fd, str(shard.path))
        return cast("dict[str, mx.array]", mx.load(path_of(fd), format="safetensors"))
