"""The tensors of a manifest's entries, as one dict of lazy MLX arrays, stacks whole."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterator
from typing import cast

import mlx.core as mx

from ..errors import AssemblyError, ParoquantStreamError
from ..files.descriptor import closing
from ..files.tensor_writer import layout_defect
from ..store.damage import confirmed_defect, defect_of, take_out
from ..store.manifest import EntryRecord, Manifest
from ..store.store import Store
from .experts import join_pieces, stack_experts

logger = logging.getLogger(__name__)
IO_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")
"""Ends of the names of weights that are quantized here and were not in the checkpoint."""


def read_weights(
    manifest: Manifest,
    store: Store,
    wanted: Callable[[str], bool],
    *,
    full: bool = False,
    lazy: bool = False,
) -> dict[str, mx.array]:
    """Name -> lazy array of every wanted tensor; stacks whole, shape (experts, ...).

    Size and header of an entry are always checked, its digest when its stat is not known or `full`.
    `lazy`: stacks are not joined before they are used.
    An entry without a wanted tensor is not opened. Raises EntryDamagedError, after taking the entry out
    of use, when its bytes are not those that were written; StoreError when it is absent.
    """
    weights: dict[str, mx.array] = {}
    records = manifest.entries_with(wanted)
    with reading(records, store):
        for record in records:
            arrays = _read_entry(record, store, full)
            names = [tensor.name for tensor in record.tensors if wanted(tensor.name)]
            weights.update((name, arrays[name]) for name in names)
        return stack_experts(join_pieces(weights, lazy))


@contextlib.contextmanager
def reading(records: Collection[EntryRecord], store: Store) -> Iterator[None]:
    """Guards a body in which MLX reads these entries: after a failure no array of it may be used,
    for a second eval would give zeros.

    Raises EntryDamagedError, the entry taken out of use, when an entry is the cause, else AssemblyError.
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
    """Take out of use an entry that was cut off since it was opened.

    MLX before 0.32.4 gives zeros for what it cannot read any more.

    Raises:
        EntryDamagedError: There is one.
    """
    for record in records:
        if store.entry_size(record.key) not in (None, record.size):  # None: removed, and still open
            raise take_out(store, record, "became shorter while it was read")


def _read_entry(record: EntryRecord, store: Store, full: bool) -> dict[str, mx.array]:
    """The entry's arrays, through the very descriptor that was checked."""
    with closing(_open_checked(record, store, full)) as fd:
        return cast("dict[str, mx.array]", mx.load(f"/dev/fd/{fd}", format="safetensors"))


def _open_checked(record: EntryRecord, store: Store, full: bool) -> int:
    """A descriptor of a sound entry; a damaged one is taken out of use."""
    fd = store.open_entry(record.key)
    try:
        if not _defect(record, store, fd, full):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    if problem := confirmed_defect(record, store):
        raise take_out(store, record, problem)
    logger.warning("%s: read wrong once, and right again", store.entry_path(record.key))
    return store.open_entry(record.key)


def _defect(record: EntryRecord, store: Store, fd: int, full: bool) -> str | None:
    """What is wrong with an entry: size and header, and the digest unless its stat is known."""
    label = str(store.entry_path(record.key))
    if not full and store.digest_cache.lookup(fd) == record.digest:
        return layout_defect(fd, record.tensors, label)
    before = store.digest_cache.begin(fd)
    problem = defect_of(record, store, fd)
    if not problem:
        store.digest_cache.remember(fd, before, record.digest)
    return problem
