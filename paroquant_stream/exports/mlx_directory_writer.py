"""export_directory(): a converted model as an MLX model directory, one tensor in memory at a time.

The directory appears complete or not at all, and shares no file with the cache. It holds the
model's parameters under their own names; `load` of this package reads it. Of a vision model the
text part is written, for mlx-lm, or all of it, for mlx-vlm.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..backends.dtypes import MLX_DTYPES
from ..checkpoint.config import INDEX_NAME, SINGLE_NAME
from ..checkpoint.model_files import check_directory, check_has_tokenizer
from ..conversion.in_place import converted
from ..conversion.progress import FileProgress, Progress
from ..conversion.request import Request
from ..errors import CheckpointError, EntryDamagedError
from ..files.atomic_directory import new_directory
from ..files.new_file import new_file_at
from ..files.tensor_header import TensorInfo, TensorSpec
from ..files.tensor_writer import TensorWriter, end_of, lay_out
from ..model.assemble import assemble
from ..model.entries import check_sizes, guard_reads
from ..progress_bar import FILES, SHARDS
from ..store.manifest import Manifest
from ..store.store import Store
from ..text import bytes_text
from . import standalone_vision
from .copied_files import as_json, export_files, files_to_export, without_code, write_file
from .exported_config import MODEL_FILE, TOWERS, VISION_FILE, exported_config
from .standalone_code import model_code

logger = logging.getLogger(__name__)
CODE: dict[str | None, tuple[str, ...]] = {
    None: (),
    MODEL_FILE: (MODEL_FILE,),
    VISION_FILE: (VISION_FILE, MODEL_FILE),
}
"""The `model_file` of an export -> the names of its Python files."""
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


def export_directory(
    request: Request,
    target: Path,
    code: str | None,
    shard_size: int,
    phase: Callable[[str], Progress | None],
) -> Export:
    """Write a model as an MLX model directory, as `paroquant_stream.export_model` describes.

    Args:
        request: The model.
        target: The directory to write, as `new_target` returned it.
        code: The `model_file` of the export, a key of `CODE`.
        shard_size: Bytes of tensors in a file at most; a larger tensor has its own file.
        phase: Gives the callbacks of the conversion and of the files that are written.

    Raises:
        CheckpointError: The model cannot be used.
        StoreError: It cannot be written.
        ModelError: As `load` raises.
    """
    _check_source(request, code)

    def attempt() -> Export:
        try:
            manifest, store = converted(request, phase(SHARDS), loads="text")
        except BaseException as stop:
            if not isinstance(stop, Exception):  # Ctrl-C: workers may be inside a system call
                request.store.sweep(own=True)
            raise
        return _write_directory(request, manifest, store, target, code, shard_size, phase(FILES))

    with contextlib.suppress(EntryDamagedError):  # logged; the entry is converted again
        return attempt()
    return attempt()


def new_target(out: str | Path) -> Path:
    """Return the absolute path of a new directory; checked before hours of conversion.

    Args:
        out: The directory, which must not exist.

    Raises:
        CheckpointError: It exists, or its parent does not.
    """
    target = Path(os.path.abspath(Path(out).expanduser()))
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: exists; remove it or name another directory")
    if not os.path.isdir(target.parent):
        raise CheckpointError(f"{target}: there is no directory {target.parent}; make it first")
    return target


def _check_source(request: Request, code: str | None) -> None:
    directory, config = request.source.directory, request.source.config
    if config.is_export:
        raise CheckpointError(f"{directory}: is an export already; export its original")
    if code == VISION_FILE and not config.values.get("vision_config"):
        raise CheckpointError(_no_tower(directory))
    check_directory(directory)
    check_has_tokenizer(directory)
    files_to_export(directory, vision=code == VISION_FILE)


def _no_tower(directory: Path) -> str:
    return f"{directory}: has no vision tower; export it as a text model, without --vision"


def _write_directory(
    request: Request,
    manifest: Manifest,
    store: Store,
    target: Path,
    code: str | None,
    shard_size: int,
    written: Progress | None,
) -> Export:
    original, source = request.source.config, request.source.directory
    vision = code == VISION_FILE
    model, _, is_vlm = assemble(original, manifest, store, lazy=True, force_text=not vision)
    if vision and not is_vlm:
        raise CheckpointError(_no_tower(source))
    text_only = not vision and any(original.values.get(key) for key in TOWERS)
    config = without_code(original.values, str(source / "config.json"))
    configs = exported_config(config, manifest, model, code)
    tensors = dict(tree_flatten(model.parameters()))
    del model  # the only references to an array are those in `tensors`
    specs = [TensorSpec(n, _DTYPES[a.dtype], tuple(a.shape)) for n, a in tensors.items()]
    total = sum(spec.nbytes for spec in specs)
    with new_directory(target, total) as directory:
        export_files(source, files_to_export(source, vision=vision), directory)
        shards = _cut(specs, shard_size)
        counts = [FileProgress(f"{target.name}/{n}", s, written) for n, s in _sizes(shards)]
        logger.info("%s: writing %d files, %s", target, len(shards), bytes_text(total))
        with guard_reads(manifest.entries, store):
            for (name, held), count in zip(shards.items(), counts, strict=True):
                _write_shard(directory / name, held, tensors, count)
            check_sizes(manifest.entries, store)
        weight_map = {spec.name: name for name, held in shards.items() for spec in held}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_bytes(directory / INDEX_NAME, as_json(index))
        for name in CODE[code]:
            _write_bytes(directory / name, _code_of(name).encode())
        for name, values in configs.items():
            _write_bytes(directory / name, as_json(values))
    return Export(target, len(shards), total, text_only)


def _code_of(name: str) -> str:
    """Return the text of one of the Python files of `CODE`."""
    return model_code() if name == MODEL_FILE else inspect.getsource(standalone_vision)


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


def _sizes(shards: dict[str, list[TensorSpec]]) -> list[tuple[str, int]]:
    return [(name, sum(spec.nbytes for spec in held)) for name, held in shards.items()]


def _write_shard(
    path: Path, specs: list[TensorSpec], tensors: dict[str, mx.array], count: FileProgress
) -> None:
    """Write one file, taking each tensor out of `tensors`."""
    header, infos = lay_out(specs)
    size = end_of(header, infos)
    with new_file_at(path, size) as file:
        writer = TensorWriter(file.write, header)
        for info in infos:
            _write_tensor(writer, info, tensors.pop(info.name))
            count.add(info.nbytes)
        writer.finish(size)
    mx.clear_cache()  # what Metal keeps of the buffers that were freed


def _write_tensor(writer: TensorWriter, info: TensorInfo, array: mx.array) -> None:
    words: Any = mx.contiguous(array).view(_WORDS[array.itemsize])
    mx.eval(words)
    view = memoryview(words).cast("B")
    for start in range(0, len(view), _CHUNK):
        writer.write(info, view[start : start + _CHUNK])
