"""A directory that `export` wrote, read back: its tensors already have the model's own names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from .checkpoint import EXPORTED, Shard, open_checkpoint
from .descriptor import closing
from .errors import AssemblyError, CheckpointError
from .tensorfile import read_header
from .weights import Stored

FORMAT = 1
"""The number of the directory's form; another one is for another version of this package."""


def stored_in_export(directory: Path) -> Stored:
    """The tensors of an exported directory; no code in it is run.

    Raises CheckpointError or MalformedFile when it is damaged.
    """
    checkpoint = open_checkpoint(directory)
    bits, group_size = _quantization(checkpoint.config, directory)
    tensors = [t for header in checkpoint.headers().values() for t in header.tensors]

    def read(_: object) -> dict[str, mx.array]:
        weights: dict[str, mx.array] = {}
        for shard in checkpoint.shards:
            weights |= _read(shard)
        return weights

    return Stored(tensors, read, lambda: _guard(directory), bits, group_size, model_names=True)


@contextlib.contextmanager
def _guard(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssemblyError(f"{directory}: MLX could not read it: {error}") from error


def _quantization(config: Mapping[str, Any], directory: Path) -> tuple[int, int]:
    """Bits and group size. Raises CheckpointError for a form that this version cannot read."""
    mark, sizes = config[EXPORTED], config.get("quantization")
    found = mark.get("format") if type(mark) is dict else mark
    if found != FORMAT:
        raise CheckpointError(
            f"{directory}: exported in format {found!r}, this version reads {FORMAT}; "
            "upgrade paroquant_stream or export the model again"
        )
    if type(sizes) is not dict or not all(
        type(sizes.get(key)) is int for key in ("bits", "group_size")
    ):
        raise CheckpointError(
            f"{directory}: config.json lacks quantization bits and group_size; export it again"
        )
    return sizes["bits"], sizes["group_size"]


def _read(shard: Shard) -> dict[str, mx.array]:
    """A shard's lazy arrays, through the very descriptor whose header was checked."""
    with closing(shard.open()) as fd:
        read_header(fd, str(shard.path))
        return cast("dict[str, mx.array]", mx.load(f"/dev/fd/{fd}", format="safetensors"))
