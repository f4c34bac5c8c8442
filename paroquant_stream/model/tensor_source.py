"""Where the tensors of a model are read from: cache entries, a single file or an export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..distributed.tensor_parallel import SliceReader
from ..files.tensor_header import TensorSpec


@dataclass(frozen=True)
class TensorSource:
    """The tensors of a converted model, and how they are read."""

    tensors: Sequence[TensorSpec]
    """Name, dtype and shape of every tensor."""
    read: Callable[[Callable[[str], bool]], dict[str, mx.array]]
    """Returns the arrays of the wanted names, as `read_weights` does."""
    guard: Callable[[Callable[[str], bool]], contextlib.AbstractContextManager[None]]
    """Guards a block in which MLX reads the wanted names, as `guard_reads` does."""
    check: Callable[[Callable[[str], bool]], None]
    """Raises if a file with wanted names changed its size since it was opened."""
    bits: int
    """Bits per quantized weight."""
    group_size: int
    """Channels per group."""
    model_names: bool = False
    """Whether the names are the model's parameters: then `sanitize` must not run again."""
    slices: Callable[
        [dict[str, mx.array]], contextlib.AbstractContextManager[SliceReader | None]
    ] = lambda _: contextlib.nullcontext()
    """Opens the arrays' files to read slices of them; yields None where arrays are read whole."""
