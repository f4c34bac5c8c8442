"""The tensors of a manifest's entries, as one dict of lazy MLX arrays, stacks whole."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import cast

import mlx.core as mx

from .descriptor import closing
from .digest import FileStamp, hash_entry
from .errors import AssemblyError, EntryDamaged, ParoquantStreamError
from .manifest import EntryRecord, Manifest
from .store import Store
from .tensorfile import layout_defect

logger = logging.getLogger(__name__)
_PIECE = re.compile(r"(?P<stack>.+)\.experts_(?P<first>\d+)_(?P<last>\d+)")
_EXPERT = re.compile(r"(?P<base>.+)\.experts\.(?P<expert>\d+)\.(?P<rest>\w+_proj\.\w+)")


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
    An entry without a wanted tensor is not opened. Raises EntryDamaged, after taking the entry out
    of use, when its bytes are not those that were written; StoreError when it is absent.
    """
    weights: dict[str, mx.array] = {}
    with reading(manifest, store):
        for record in manifest.entries:
            names = [tensor.name for tensor in record.tensors if wanted(tensor.name)]
            if names:
                arrays = _read_entry(record, store, full)
                weights.update((name, arrays[name]) for name in names)
        return _stack_experts(_join_pieces(weights, lazy))


@contextlib.contextmanager
def reading(manifest: Manifest, store: Store) -> Iterator[None]:
    """Guards a body in which MLX reads: after a failure no array of it may be used, for a second
    eval would give zeros.

    Raises EntryDamaged, the entry taken out of use, when an entry is the cause, else AssemblyError.
    """
    try:
        yield
    except ParoquantStreamError:
        raise
    except Exception as error:
        for record in manifest.entries:
            with closing(_open_checked(record, store, full=True)):
                pass
        raise AssemblyError(f"MLX could not read the weights: {error}") from error


def _read_entry(record: EntryRecord, store: Store, full: bool) -> dict[str, mx.array]:
    """The entry's arrays, through the very descriptor that was checked."""
    with closing(_open_checked(record, store, full)) as fd:
        return cast("dict[str, mx.array]", mx.load(f"/dev/fd/{fd}", format="safetensors"))


def _open_checked(record: EntryRecord, store: Store, full: bool) -> int:
    """A descriptor of a sound entry; a damaged one is taken out of use."""
    fd = store.open_entry(record.key)
    try:
        problem = _defect(record, store, fd, full)
    except BaseException:
        os.close(fd)
        raise
    if problem:
        os.close(fd)
        store.quarantine(record.key)
        message = f"{store.entry_path(record.key)}: {problem}; taken out of use"
        logger.warning("%s", message)
        raise EntryDamaged(message)
    return fd


def _defect(record: EntryRecord, store: Store, fd: int, full: bool) -> str | None:
    """What is wrong with an entry: size and header, and the digest unless its stat is known."""
    label = str(store.entry_path(record.key))
    stamp = FileStamp.of_fd(fd, label)
    if problem := layout_defect(fd, record.tensors, label):
        return problem
    if not full and store.memo.lookup(stamp) == record.digest:
        return None
    digest = hash_entry(fd, label)
    if digest != record.digest:
        return f"expected XXH3 {record.digest}, found {digest}"
    store.memo.remember(stamp, digest)
    return None


def _join_pieces(weights: dict[str, mx.array], lazy: bool) -> dict[str, mx.array]:
    """Pieces `X.experts_<first>_<last>` become one X, in the order of the experts."""
    pieces: dict[str, dict[int, tuple[int, str]]] = defaultdict(dict)
    for name in weights:
        if match := _PIECE.fullmatch(name):
            pieces[match["stack"]][int(match["first"])] = (int(match["last"]), name)
    for stack, runs in pieces.items():
        expected, parts = 0, []
        for first in sorted(runs):
            last, name = runs[first]
            if first != expected:
                raise AssemblyError(f"{stack}: experts {expected} to {first - 1} are in no entry")
            parts.append(weights.pop(name))
            expected = last + 1
        weights[stack] = mx.concatenate(parts, axis=0)
        if not lazy:
            mx.eval(weights[stack])  # one at a time: its pieces are freed before the next is read
    return weights


def _stack_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Experts that were left unquantized, one tensor each, become stacks."""
    members: dict[str, dict[int, str]] = defaultdict(dict)
    for name in weights:
        if match := _EXPERT.fullmatch(name):
            members[f"{match['base']}.switch_mlp.{match['rest']}"][int(match["expert"])] = name
    for stack, experts in members.items():
        if sorted(experts) != list(range(len(experts))):
            raise AssemblyError(f"{stack}: experts are missing between 0 and {max(experts)}")
        weights[stack] = mx.stack([weights.pop(experts[expert]) for expert in range(len(experts))])
    return weights
