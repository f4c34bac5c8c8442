"""Load a model from its single file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import cast

import mlx.core as mx

from ..checkpoint.quantization import Quantization
from ..checkpoint.shard import Shard
from ..conversion.in_place import inside_model
from ..conversion.request import Request
from ..conversion.staleness import source_staleness
from ..errors import AssemblyError, CheckpointError, ParoquantStreamError, StoreError
from ..files.descriptor import file_status, path_of
from ..model.entries import IO_WEIGHTS
from ..model.experts import stack_experts
from ..model.tensor_source import TensorSource
from ..store.format import TRANSFORM
from .single_file import Origin, SingleFile, hash_single


def stored_in_file(file: SingleFile, quantization: Quantization, *, lazy: bool) -> TensorSource:
    """Return the tensors of a single file, which must stay open while they are read."""
    bits, group_size = quantization.bits, quantization.group_size

    def read(wanted: Callable[[str], bool]) -> dict[str, mx.array]:
        with _reading_file(file):
            found = mx.load(path_of(file.fd), format="safetensors")
            weights = {
                name: array
                for name, array in cast("dict[str, mx.array]", found).items()
                if wanted(name)
            }
            del found
            if file.origin:
                return stack_experts(weights)
            return _quantize_floats(weights, bits, group_size, lazy)

    foreign = file.origin is None
    return TensorSource(
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
    """Guard reads of a single file, as `guard_reads` does for entries."""
    try:
        yield
    except ParoquantStreamError:
        raise
    except Exception as error:
        raise AssemblyError(f"{file.path}: MLX could not read the weights: {error}") from error


def _quantize_floats(
    weights: dict[str, mx.array], bits: int, group_size: int, lazy: bool
) -> dict[str, mx.array]:
    """Quantize embeddings and heads that are still floats, with the bits that entries have."""
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


def check_usable(file: SingleFile, request: Request, full: bool) -> None:
    """Check that a single file may be used for the model as it is now.

    Present sources are compared with what was converted, hashed when no hash is remembered; absent
    ones count as unchanged. Then the file's own digest is checked, unless it is remembered and not
    `full`.

    Raises:
        CheckpointError: It may not be used; says why.
    """
    if reason := _why_unused(file, request, full):
        raise CheckpointError(f"{file.path}: {reason}; remove it, or have it written anew")


def _why_unused(file: SingleFile, request: Request, full: bool) -> str | None:
    named, removed = request.source.config.shard_names, _removed_sources(request)
    if file.origin is None:
        present = [name for name in named if os.path.lexists(request.source.directory / name)]
        if present:
            return f"nothing in it tells whether it was made from {present[0]}, which is there too"
        if removed:
            return "nothing in it tells whether it was made from the shards that were removed"
        return None
    if file.origin.transform != TRANSFORM:
        return "made by another version"
    request.store.check_owner()  # since its digest cache is trusted
    with contextlib.suppress(StoreError):  # without a digest cache everything is hashed again
        request.store.create()
    for name in sorted({*named, *file.origin.sources}):
        shard = Shard(name, request.source.directory / name)
        if not os.path.exists(shard.path):
            if removed.get(name, file.origin.sources.get(name)) != file.origin.sources.get(name):
                return f"made from another {name} than the one that --drop-source removed"
            continue
        if name not in file.origin.sources:
            return f"{name} was not there when it was made"
        digest_cache, expected = request.store.digest_cache, file.origin.sources[name]
        if reason := source_staleness(digest_cache, shard, expected, read_unknown=True):
            return reason
    return _damage(file, file.origin, request, full)


def _removed_sources(request: Request) -> dict[str, str]:
    """Return the SHA-256 of shards that `--drop-source` removed, from cache and `mlx/`, by name."""
    from ..conversion.find_dropped import find_dropped

    found: dict[str, str] = {}
    for place in (inside_model(request), request):
        with contextlib.suppress(ParoquantStreamError):
            drop = find_dropped(place)
            entries = drop.manifest.entries if drop else ()
            found |= {entry.shard: entry.source_sha256 for entry in entries if entry.dropped}
    return found


def _damage(file: SingleFile, origin: Origin, request: Request, full: bool) -> str | None:
    label, digest_cache = str(file.path), request.store.digest_cache
    if not full and digest_cache.lookup(file.fd) == origin.digest:
        return None
    before = digest_cache.begin(file.fd)
    header_size = file.header.tensors[0].start if file.header.tensors else file.header.size
    digest = hash_single(file.fd, header_size, label, origin.digest)
    if digest != origin.digest:
        return f"damaged: expected XXH3 {origin.digest}, found {digest}"
    digest_cache.remember(file.fd, before, digest)
    return None
