"""The tensors of a manifest's entries, as one dict of lazy MLX arrays, stacks whole."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from ..checkpoint.layout import Quantization
from ..distributed.slices import MLX_DTYPES
from ..distributed.tensor_parallel import Take
from ..errors import AssemblyError, ParoquantStreamError
from ..exports.single_file import SingleFile
from ..files.descriptor import closing, file_status
from ..files.tensor_header import TensorSpec, layout_defect
from ..store.damage import confirmed_defect, defect_of, take_out
from ..store.format import stacks_in_pieces
from ..store.manifest import EntryRecord, Manifest
from ..store.store import Store

logger = logging.getLogger(__name__)
IO_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")
"""Ends of the names of weights that are quantized here and were not in the checkpoint."""
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
    records = entries_with(manifest, wanted)
    with reading(records, store):
        for record in records:
            arrays = _read_entry(record, store, full)
            names = [tensor.name for tensor in record.tensors if wanted(tensor.name)]
            weights.update((name, arrays[name]) for name in names)
        return _stack_experts(_join_pieces(weights, lazy))


def entries_with(manifest: Manifest, wanted: Callable[[str], bool]) -> list[EntryRecord]:
    """The entries that hold a wanted tensor."""
    return [
        record
        for record in manifest.entries
        if any(wanted(tensor.name) for tensor in record.tensors)
    ]


def placeholders(specs: Iterable[TensorSpec]) -> dict[str, mx.array]:
    """Name -> an array of the tensor's shape and dtype that must never be evaluated; stacks whole.

    For tensors that are not read here: `sanitize` judges tensors by others, so it must see them
    all. Unevaluated, they take no memory.
    """
    found = {spec.name: mx.zeros(spec.shape, MLX_DTYPES[spec.dtype]) for spec in specs}
    return _stack_experts(_join_pieces(found, lazy=True))


@dataclass(frozen=True)
class Stored:
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
    slices: Callable[[dict[str, mx.array]], contextlib.AbstractContextManager[Take | None]] = (
        lambda _: contextlib.nullcontext()
    )
    """For a body in which slices of the arrays that were read are taken; None: cut them."""


def stored_in_file(file: SingleFile, quantization: Quantization, *, lazy: bool) -> Stored:
    """The tensors of a single file, which must stay open while they are read."""
    bits, group_size = quantization.bits, quantization.group_size

    def read(wanted: Callable[[str], bool]) -> dict[str, mx.array]:
        with _reading_file(file):
            found = mx.load(f"/dev/fd/{file.fd}", format="safetensors")
            weights = {
                name: array
                for name, array in cast("dict[str, mx.array]", found).items()
                if wanted(name)
            }
            del found
            if file.origin:
                return _stack_experts(weights)
            return _quantize_floats(weights, bits, group_size, lazy)

    foreign = file.origin is None
    return Stored(
        file.header.tensors,
        read,
        lambda _: _reading_file(file),
        lambda _: _check_size(file),
        bits,
        group_size,
        foreign,
    )


def _check_size(file: SingleFile) -> None:
    if file_status(file.fd, str(file.path)).st_size != file.header.size:
        raise AssemblyError(f"{file.path}: its size changed while it was read; load it again")


@contextlib.contextmanager
def _reading_file(file: SingleFile) -> Iterator[None]:
    """As `reading`, for a single file."""
    try:
        yield
    except ParoquantStreamError:
        raise
    except Exception as error:
        raise AssemblyError(f"{file.path}: MLX could not read the weights: {error}") from error


def _quantize_floats(
    weights: dict[str, mx.array], bits: int, group_size: int, lazy: bool
) -> dict[str, mx.array]:
    """Embeddings and heads that are floats still, quantized with the bits that entries have."""
    for name in [name for name in weights if name.endswith(IO_WEIGHTS)]:
        module = name.removesuffix(".weight")
        if f"{module}.scales" in weights or not mx.issubdtype(weights[name].dtype, mx.floating):
            continue
        # on the CPU as in a conversion: GPUs round halves differently
        results = mx.quantize(weights.pop(name), group_size, bits, stream=mx.cpu)
        if not lazy:
            mx.eval(results)  # one at a time: its floats are freed before the next is read
        for leaf, array in zip(("weight", "scales", "biases"), results, strict=True):
            weights[f"{module}.{leaf}"] = array
    return weights


@contextlib.contextmanager
def reading(records: Collection[EntryRecord], store: Store) -> Iterator[None]:
    """Guards a body in which MLX reads these entries: after a failure no array of it may be used,
    for a second eval would give zeros.

    Raises EntryDamaged, the entry taken out of use, when an entry is the cause, else AssemblyError.
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
        EntryDamaged: There is one.
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
    if not full and store.memo.lookup(fd) == record.digest:
        return layout_defect(fd, record.tensors, label)
    before = store.memo.begin(fd)
    problem = defect_of(record, store, fd)
    if not problem:
        store.memo.remember(fd, before, record.digest)
    return problem


def _join_pieces(weights: dict[str, mx.array], lazy: bool) -> dict[str, mx.array]:
    """Pieces `X.experts_<first>_<last>` become one X, in the order of the experts."""
    for stack, pieces in stacks_in_pieces(weights).items():
        weights[stack] = mx.concatenate([weights.pop(name) for name in pieces], axis=0)
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
