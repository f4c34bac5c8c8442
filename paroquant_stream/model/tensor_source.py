"""Where the tensors of a model come from: entries, a single file, an export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..distributed.tensor_parallel import SliceReader
from ..files.tensor_header import TensorSpec


@dataclass(frozen=True)
class TensorSource:
    """The tensors of a converted model, wherever they lie."""

    tensors: Sequence[TensorSpec]
    read: Callable[[Callable[[str], bool]], dict[str, mx.array]]
    """The arrays of the wanted names, as `read_weights` gives them."""
    guard: Callable[[Callable[[str], bool]], contextlib.AbstractContextManager[None]]
    """For a body in which MLX reads the wanted names, as `reading` is."""
    check: Callable[[Callable[[str], bool]], None]
    """Raises when a file of the wanted names changed its size since it was opened."""
    bits: int
    group_size: int
    model_names: bool = False
    """Names are the model's, not the checkpoint's: `sanitize` has been there already."""
    slices: Callable[
        [dict[str, mx.array]], contextlib.AbstractContextManager[SliceReader | None]
    ] = lambda _: contextlib.nullcontext()
    """For a body in which slices of the arrays that were read are taken; None: cut them."""
