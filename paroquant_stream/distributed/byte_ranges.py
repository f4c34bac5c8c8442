"""Read a rank's slices of a model's weights from the entries, as byte ranges."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import mlx.core as mx

from ..errors import MalformedFileError
from ..files.tensor_header import TensorInfo
from ..files.tensor_writer import lay_out
from ..store.damage import take_out
from ..store.format import stacks_in_pieces
from ..store.manifest import EntryRecord
from ..store.store import Store
from .slices import Slice, read_slice


class EntrySlices:
    """A `SliceReader` of `tensor_parallel` that reads the slices from the entries."""

    def __init__(
        self, records: Collection[EntryRecord], store: Store, weights: Mapping[str, mx.array]
    ) -> None:
        """Find each array in the entries.

        Args:
            records: Of the entries.
            store: Where the entries are.
            weights: The arrays that `read_weights` returned, by name in the entries; stacks of
                experts whole. Arrays are found by identity, since the model's names are others.
        """
        self._store, self._records = store, {record.key: record for record in records}
        self._fds: dict[str, int] = {}
        stored = {
            tensor.name: (record.key, tensor)
            for record in records
            for tensor in lay_out(record.tensors)[1]
        }
        pieces = stacks_in_pieces(stored)
        self._places: dict[int, tuple[mx.array, list[tuple[str, TensorInfo]]]] = {}
        for name, array in weights.items():
            names = pieces.get(name, [name])
            if stored.keys() >= set(names):
                self._places[id(array)] = array, [stored[piece] for piece in names]

    def __call__(self, _name: str, array: mx.array, part: Slice) -> mx.array:
        """Read a slice of an array.

        Args:
            _name: Of the parameter.
            array: One of the weights, or an array computed from them.
            part: Which slice.

        Returns:
            The slice, evaluated; lazy if the array is not as it was stored, or if experts are
            divided among ranks.

        Raises:
            EntryDamagedError: The entry ends too early; it was taken out of use.
            StoreError: The entry cannot be opened.
            UnreadableFileError: The entry cannot be read.
        """
        _, places = self._places.get(id(array), (None, []))
        if not places or (len(places) > 1 and part.axis == 0):
            return part.of(array)
        found = [self._read(key, tensor, part) for key, tensor in places]
        if len(found) > 1:  # evaluated, to free the pieces before the next stack is read
            found = [mx.concatenate(found)]
            mx.eval(found)
        return found[0]

    def _read(self, key: str, tensor: TensorInfo, part: Slice) -> mx.array:
        label = str(self._store.entry_path(key))
        try:
            return read_slice(self._fd(key), tensor, part, label)
        except MalformedFileError as error:
            raise take_out(self._store, self._records[key], str(error)) from error

    def _fd(self, key: str) -> int:
        if key not in self._fds:
            self._fds[key] = self._store.open_entry(key)
        return self._fds[key]

    def close(self) -> None:
        """Close the entries and release the arrays."""
        self._places.clear()
        while self._fds:
            os.close(self._fds.popitem()[1])


@contextmanager
def entry_slices(
    records: Collection[EntryRecord], store: Store, weights: Mapping[str, mx.array]
) -> Iterator[EntrySlices]:
    """Provide `EntrySlices` for the body and close them after it.

    Args:
        records: Of the entries.
        store: Where the entries are.
        weights: The arrays that `read_weights` returned, by name in the entries.
    """
    slices = EntrySlices(records, store, weights)
    try:
        yield slices
    finally:
        slices.close()
