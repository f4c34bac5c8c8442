"""Lays out safetensors files and writes their headers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .descriptor import file_status, pread_exactly
from .tensor_header import DTYPE_BYTES, TensorInfo, TensorSpec

PAGE = (
    16_384  # bytes; the page of Apple silicon, so that Metal can adopt an entry's memory uncopied
)


def lay_out(
    specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """The header bytes of a file of these tensors, and the tensors in file order with their ranges.

    Tensors whose size is a multiple of `PAGE` come first, each on a page; the rest follow by
    falling item size, so that each is aligned to its items and no hole is needed. Equal specs in an
    equal order, and equal `metadata`, give equal bytes on every system.
    """
    ordered = sorted(specs, key=lambda s: 0 if s.nbytes % PAGE == 0 else 16 - DTYPE_BYTES[s.dtype])
    table: dict[str, Any] = {"__metadata__": {"format": "mlx"} | dict(metadata or {})}
    offset = 0
    for spec in ordered:
        offsets = [offset, offset + spec.nbytes]
        table[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    start = 8 + len(text)
    infos = []
    for spec in ordered:
        infos.append(TensorInfo(spec.name, spec.dtype, spec.shape, start, start + spec.nbytes))
        start += spec.nbytes
    return len(text).to_bytes(8, "little") + text, tuple(infos)


def file_size(specs: Iterable[TensorSpec]) -> int:
    """Bytes of the file that `lay_out` describes."""
    return end_of(*lay_out(specs))


def end_of(header: bytes, tensors: Sequence[TensorInfo]) -> int:
    """Bytes of the file with this header and these tensors."""
    return tensors[-1].stop if tensors else len(header)


def layout_defect(fd: int, specs: Iterable[TensorSpec], label: str) -> str | None:
    """How size or header of the file at `fd` differ from what `lay_out` gives for `specs`."""
    header, tensors = lay_out(specs)
    size, found = end_of(header, tensors), file_status(fd, label).st_size
    if found != size:
        return f"expected {size:,} bytes, found {found:,}"
    if pread_exactly(fd, 0, len(header), label) != header:
        return "the header is not the one that was written"
    return None


class TensorWriter:
    """Writes the file that `lay_out` described front to back through `sink`, header first.

    A tensor out of turn, cut short or overrun is a programming error and raises AssertionError, so
    that no file of the wrong form is ever published.
    """

    def __init__(self, sink: Callable[[memoryview], None], header: bytes) -> None:
        self._sink = sink
        self._position = len(header)
        sink(memoryview(header))

    def write(self, tensor: TensorInfo, chunk: memoryview) -> None:
        """Appends `chunk`, the next bytes of `tensor`."""
        if not tensor.start <= self._position <= tensor.stop - chunk.nbytes:
            raise AssertionError(
                f"{tensor.name}: bytes at {self._position:,} lie outside of its range"
            )
        self._sink(chunk)
        self._position += chunk.nbytes

    def finish(self, size: int) -> None:
        """Checks that all `size` bytes were written."""
        if self._position != size:
            raise AssertionError(f"{self._position:,} of {size:,} bytes were written")
