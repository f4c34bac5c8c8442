"""Layout of page-aligned safetensors files, and writing them in one stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .descriptor import file_status, pread_exactly
from .tensor_header import DTYPE_BYTES, TensorInfo, TensorSpec

PAGE = 16_384  # bytes; the page of Apple silicon, by which Metal can use a mapped file in place


def lay_out(
    specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """Return the header of a safetensors file, and its tensors in file order with their ranges.

    Tensors whose size is a multiple of `PAGE` come first, each at a page boundary; the rest follow
    by decreasing item size, so that each is aligned to its items without holes. Equal arguments
    return equal bytes on every system.

    Args:
        specs: The tensors.
        metadata: Strings for `__metadata__`, added to `format: mlx`.
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
    """Return the bytes of the file that `lay_out` describes."""
    return end_of(*lay_out(specs))


def end_of(header: bytes, tensors: Sequence[TensorInfo]) -> int:
    """Return the bytes of the file with a header and tensors from `lay_out`."""
    return tensors[-1].stop if tensors else len(header)


def layout_defect(fd: int, specs: Iterable[TensorSpec], label: str) -> str | None:
    """Compare size and header of a file with the layout of its tensors.

    Args:
        fd: The file.
        specs: The tensors it should hold.
        label: The name of the file in errors.

    Returns:
        The first difference, or None.

    Raises:
        UnreadableFileError: The operating system cannot read it.
    """
    header, tensors = lay_out(specs)
    size, found = end_of(header, tensors), file_status(fd, label).st_size
    if found != size:
        return f"expected {size:,} bytes, found {found:,}"
    if pread_exactly(fd, 0, len(header), label) != header:
        return "the header is not the one that was written"
    return None


class TensorWriter:
    """Writes a file with a layout from `lay_out`, front to back.

    Bytes at a wrong position are a programming error and raise AssertionError, so that no file of a
    wrong layout is published.
    """

    def __init__(self, sink: Callable[[memoryview], None], header: bytes) -> None:
        """Write the header.

        Args:
            sink: Appends bytes to the file.
            header: From `lay_out`.
        """
        self._sink = sink
        self._position = len(header)
        sink(memoryview(header))

    def write(self, tensor: TensorInfo, chunk: memoryview) -> None:
        """Append the next bytes of a tensor.

        Args:
            tensor: From `lay_out`; tensors are written in file order.
            chunk: All or some of its bytes.

        Raises:
            AssertionError: The bytes do not belong at the current position.
        """
        if not tensor.start <= self._position <= tensor.stop - chunk.nbytes:
            raise AssertionError(
                f"{tensor.name}: bytes at {self._position:,} are outside its range"
            )
        self._sink(chunk)
        self._position += chunk.nbytes

    def finish(self, size: int) -> None:
        """Check that the file is complete.

        Args:
            size: Bytes of the file.

        Raises:
            AssertionError: Fewer or more bytes were written.
        """
        if self._position != size:
            raise AssertionError(f"{self._position:,} of {size:,} bytes were written")
