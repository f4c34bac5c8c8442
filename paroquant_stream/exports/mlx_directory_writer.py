"""export_model(): a converted model as an MLX model directory, one tensor in memory at a time.

The directory appears complete or not at all, and shares no file with the cache. It holds the
model's parameters under their own names; `load` of this package reads it. Of a vision model the
text part is written.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..backends.dtypes import MLX_DTYPES
from ..checkpoint.config import INDEX_NAME, SINGLE_NAME
from ..checkpoint.model_files import check_directory
from ..conversion.in_place import converted
from ..conversion.progress import Progress
from ..conversion.request import Request, make_request
from ..errors import CheckpointError, EntryDamagedError
from ..files.atomic_directory import new_directory
from ..files.new_file import new_file_at
from ..files.tensor_header import TensorInfo, TensorSpec
from ..files.tensor_writer import TensorWriter, end_of, lay_out
from ..model.assemble import assemble
from ..model.entries import guard_reads
from ..store.manifest import Manifest
from ..store.store import Store
from . import standalone
from .copied_files import as_json, export_files, files_to_export, without_code, write_file
from .exported_config import MODEL_FILE, exported_config

SHARD_SIZE = 5_000_000_000
_DTYPES = {dtype: name for name, dtype in MLX_DTYPES.items()}
_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
"""Bytes an item -> what it is seen as: a buffer knows no bfloat16."""
_CHUNK = 64 << 20  # bytes written at once


@dataclass(frozen=True)
class Export:
    """What was written."""

    directory: Path
    files: int
    """Shards."""
    nbytes: int
    """Bytes of all tensors."""
    text_only: bool
    """Whether a vision or audio tower was left out."""


def export_model(
    model_path: str | Path,
    out: str | Path,
    *,
    self_contained: bool = False,
    shard_size: int = SHARD_SIZE,
    cache_dir: str | Path | None = None,
    jobs: int | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write a model as an MLX model directory, converting first what is not in the cache.

    Args:
        model_path: A model directory, or a Hub repository id.
        out: The directory to write, which must not exist.
        self_contained: Add a Python file by which mlx-lm reads it without this package; mlx-lm runs
            it only with `trust_remote_code`.
        shard_size: Bytes of tensors in a file at most; a larger tensor has its own file.
        cache_dir: As for `convert_checkpoint`.
        jobs: As for `convert_checkpoint`.
        revision: As for `convert_checkpoint`.
        progress: As for `convert_checkpoint`.

    Raises:
        CheckpointError: `out` exists or its parent does not, or the model cannot be used.
        StoreError: It cannot be written.
        ModelError: As `load` raises.
    """
    target = _target(out)
    request = make_request(model_path, cache_dir=cache_dir, jobs=jobs, revision=revision)
    _check_source(request)

    def attempt() -> Export:
        try:
            manifest, store = converted(request, progress)
        except BaseException as stop:
            if not isinstance(stop, Exception):  # Ctrl-C: workers may be inside a system call
                request.store.sweep(own=True)
            raise
        return _write_directory(request, manifest, store, target, self_contained, shard_size)

    with contextlib.suppress(EntryDamagedError):  # logged; the entry is converted again
        return attempt()
    return attempt()


def _target(out: str | Path) -> Path:
    """Return the absolute path of the new directory; checked before hours of conversion."""
    target = Path(os.path.abspath(Path(out).expanduser()))
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: exists; remove it or name another directory")
    if not os.path.isdir(target.parent):
        raise CheckpointError(f"{target}: there is no directory {target.parent}; make it first")
    return target


def _check_source(request: Request) -> None:
    directory = request.source.directory
    if request.source.config.is_export:
        raise CheckpointError(f"{directory}: is an export already; export its original")
    check_directory(directory)
    files_to_export(directory)


def _write_directory(
    request: Request,
    manifest: Manifest,
    store: Store,
    target: Path,
    self_contained: bool,
    shard_size: int,
) -> Export:
    model, _, _ = assemble(request.source.config, manifest, store, lazy=True, force_text=True)
    config = request.source.config.values
    text_only = any(config.get(key) for key in ("vision_config", "audio_config"))
    config = without_code(config, str(request.source.directory / "config.json"))
    configs = exported_config(config, manifest, model, self_contained)
    tensors = dict(tree_flatten(model.parameters()))
    del model  # the only references to an array are those in `tensors`
    specs = [TensorSpec(n, _DTYPES[a.dtype], tuple(a.shape)) for n, a in tensors.items()]
    total = sum(spec.nbytes for spec in specs)
    with new_directory(target, total) as directory:
        export_files(request.source.directory, files_to_export(request.source.directory), directory)
        shards = _cut(specs, shard_size)
        with guard_reads(manifest.entries, store):
            for name, held in shards.items():
                _write_shard(directory / name, held, tensors)
        weight_map = {spec.name: name for name, held in shards.items() for spec in held}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_bytes(directory / INDEX_NAME, as_json(index))
        if self_contained:
            _write_bytes(directory / MODEL_FILE, Path(standalone.__file__).read_bytes())
        for name, values in configs.items():
            _write_bytes(directory / name, as_json(values))
    return Export(target, len(shards), total, text_only)


def _cut(specs: list[TensorSpec], shard_size: int) -> dict[str, list[TensorSpec]]:
    """Distribute tensors to files, in the order of the model, so that a layer's are together."""
    shards: list[list[TensorSpec]] = []
    filled = shard_size + 1
    for spec in specs:
        if filled + spec.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": held for i, held in enumerate(shards, 1)}


def _write_bytes(path: Path, data: bytes) -> None:
    write_file(path, len(data), [memoryview(data)])


def _write_shard(path: Path, specs: list[TensorSpec], tensors: dict[str, mx.array]) -> None:
    """Write one file, taking each tensor out of `tensors`."""
    header, infos = lay_out(specs)
    size = end_of(header, infos)
    with new_file_at(path, size) as file:
        writer = TensorWriter(file.write, header)
        for info in infos:
            _write_tensor(writer, info, tensors.pop(info.name))
        writer.finish(size)
    mx.clear_cache()  # what Metal keeps of the buffers that were freed


def _write_tensor(writer: TensorWriter, info: TensorInfo, array: mx.array) -> None:
    words: Any = mx.contiguous(array).view(_WORDS[array.itemsize])
    mx.eval(words)
    view = memoryview(words).cast("B")
    for start in range(0, len(view), _CHUNK):
        writer.write(info, view[start : start + _CHUNK])
