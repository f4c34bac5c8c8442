"""Reads the tensors of cache entries as lazy MLX arrays and takes damaged entries out of use."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterator
from typing import cast

import mlx.core as mx

from ..errors import AssemblyError, ParoquantStreamError
from ..files.descriptor import closing, path_of
from ..files.tensor_writer import layout_defect
from ..store.damage import confirmed_defect, defect_of, take_out
from ..store.manifest import EntryRecord, Manifest
from ..store.store import Store
from .early_reader import EarlyReader
from .experts import join_pieces, stack_experts

logger = logging.getLogger(__name__)
IO_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")
"""Suffixes of the embedding and head weights, which the conversion quantizes."""


def read_weights(
    manifest: Manifest,
    store: Store,
    wanted: Callable[[str], bool],
    *,
    full: bool = False,
    lazy: bool = False,
    early: EarlyReader | None = None,
) -> dict[str, mx.array]:
    """Read the wanted tensors as lazy arrays, with stacked experts joined to (experts, ...).

    Size and header of each entry are checked, and its digest unless the digest cache knows it. An
    entry without a wanted tensor is not opened.

    Args:
        manifest: Lists the entries.
        store: Holds the entries.
        wanted: Decides by the name of a tensor whether it is read.
        full: Hash every entry, whatever the digest cache knows.
        lazy: Leave joined stacks unevaluated too.
        early: Has read some entries already.

    Returns:
        The arrays by the names of their tensors.

    Raises:
        EntryDamagedError: An entry's bytes are not those that were written; it was taken out of
            use.
        StoreError: An entry is absent or cannot be opened.
        AssemblyError: MLX cannot read an entry, or experts are missing in a stack.
    """
    weights: dict[str, mx.array] = {}
    records = manifest.entries_with(wanted)
    with guard_reads(records, store):
        for record in records:
            arrays = early.take(record) if early else None
            arrays = arrays or read_entry(record, store, full)
            names = [tensor.name for tensor in record.tensors if wanted(tensor.name)]
            weights.update((name, arrays[name]) for name in names)
        return stack_experts(join_pieces(weights, lazy))


@contextlib.contextmanager
def guard_reads(records: Collection[EntryRecord], store: Store) -> Iterator[None]:
    """Guard a block in which MLX evaluates arrays of these entries.

    After a failure none of the arrays may be used: a second evaluation would return zeros.

    Args:
        records: The entries that the arrays are read from.
        store: Holds the entries.

    Raises:
        EntryDamagedError: MLX failed and an entry is damaged; it was taken out of use.
        AssemblyError: MLX failed for another reason.
    """
    try:
        yield
    except ParoquantStreamError:
        raise
    except Exception as error:
        for record in records:
            with closing(_open_checked(record, store, full=True)):
                pass
        raise AssemblyError(f"MLX could not read the weights: {error}") from error


def check_sizes(records: Collection[EntryRecord], store: Store) -> None:
    """Check that no entry was truncated since it was opened.

    MLX before 0.32.4 returns zeros for what it can no longer read.

    Args:
        records: The entries that were read.
        store: Holds the entries.

    Raises:
        EntryDamagedError: An entry was truncated; it was taken out of use.
    """
    for record in records:
        if store.entry_size(record.key) not in (None, record.size):  # None: removed but still open
            raise take_out(store, record, "became shorter while it was read")


def read_entry(record: EntryRecord, store: Store, full: bool = False) -> dict[str, mx.array]:
    """Load the lazy arrays of an entry through the descriptor that was checked.

    Args:
        record: The entry.
        store: Holds it.
        full: Hash it, whatever the digest cache knows.

    Raises:
        EntryDamagedError: Its bytes are not those that were written; it was taken out of use.
        StoreError: It is absent or cannot be opened.
    """
    with closing(_open_checked(record, store, full)) as fd:
        return cast("dict[str, mx.array]", mx.load(path_of(fd), format="safetensors"))


def _open_checked(record: EntryRecord, store: Store, full: bool) -> int:
    """Open an entry and check it; take a damaged one out of use."""
    fd = store.open_entry(record.key)
    try:
        if not _find_defect(record, store, fd, full):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    if problem := confirmed_defect(record, store):
        raise take_out(store, record, problem)
    logger.warning(
        "%s: one read returned wrong bytes, the next one the right ones",
        store.entry_path(record.key),
    )
    return store.open_entry(record.key)


def _find_defect(record: EntryRecord, store: Store, fd: int, full: bool) -> str | None:
    """Check size and header of an entry, and its digest unless the digest cache knows it."""
    label = str(store.entry_path(record.key))
    if not full and store.digest_cache.lookup(fd) == record.digest:
        return layout_defect(fd, record.tensors, label)
    before = store.digest_cache.begin(fd)
    problem = defect_of(record, store, fd)
    if not problem:
        store.digest_cache.remember(fd, before, record.digest)
    return problem
