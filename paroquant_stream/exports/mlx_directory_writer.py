"""export_directory(): a converted model as an MLX model directory, one tensor in memory at a time.

The directory appears complete or not at all, and shares no file with the cache. It holds the
model's parameters under their own names; `load` of this package reads it. Of a vision model the
text part is written.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..backends.dtypes import MLX_DTYPES
from ..checkpoint.config import EXPORTED, INDEX_NAME, SINGLE_NAME
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
from ..model.entries import guard_reads
from ..progress_bar import FILES, SHARDS
from ..rotation.layers import RotateQuantizedLinear, RotateSwitchGLU
from ..store.manifest import Manifest
from ..store.store import Store
from ..text import bytes_text
from . import standalone
from .copied_files import as_json, export_files, files_to_export, without_code, write_file
from .mlx_directory_reader import FORMAT

logger = logging.getLogger(__name__)
MODEL_FILE = "paroquant_model.py"
"""The code of a self-contained directory: `standalone.py`, byte for byte."""
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
    self_contained: bool,
    shard_size: int,
    phase: Callable[[str], Progress | None],
) -> Export:
    """Write a model as an MLX model directory, as `paroquant_stream.export_model` describes.

    Args:
        request: The model.
        target: The directory to write, as `new_target` returned it.
        self_contained: Add a Python file by which mlx-lm reads it without this package.
        shard_size: Bytes of tensors in a file at most; a larger tensor has its own file.
        phase: Gives the callbacks of the conversion and of the files that are written.

    Raises:
        CheckpointError: The model cannot be used.
        StoreError: It cannot be written.
        ModelError: As `load` raises.
    """
    _check_source(request)

    def attempt() -> Export:
        try:
            manifest, store = converted(request, phase(SHARDS), loads="text")
        except BaseException as stop:
            if not isinstance(stop, Exception):  # Ctrl-C: workers may be inside a system call
                request.store.sweep(own=True)
            raise
        written = phase(FILES)
        return _write_directory(
            request, manifest, store, target, self_contained, shard_size, written
        )

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


def _check_source(request: Request) -> None:
    directory = request.source.directory
    if request.source.config.is_export:
        raise CheckpointError(f"{directory}: is an export already; export its original")
    check_directory(directory)
    check_has_tokenizer(directory)
    files_to_export(directory)


def _write_directory(
    request: Request,
    manifest: Manifest,
    store: Store,
    target: Path,
    self_contained: bool,
    shard_size: int,
    written: Progress | None,
) -> Export:
    model, _, _ = assemble(request.source.config, manifest, store, lazy=True, force_text=True)
    config = request.source.config.values
    text_only = any(config.get(key) for key in ("vision_config", "audio_config"))
    config = without_code(config, str(request.source.directory / "config.json"))
    config = _exported_config(config, manifest, model, self_contained)
    tensors = dict(tree_flatten(model.parameters()))
    del model  # the only references to an array are those in `tensors`
    specs = [TensorSpec(n, _DTYPES[a.dtype], tuple(a.shape)) for n, a in tensors.items()]
    total = sum(spec.nbytes for spec in specs)
    with new_directory(target, total) as directory:
        export_files(request.source.directory, files_to_export(request.source.directory), directory)
        shards = _cut(specs, shard_size)
        counts = [FileProgress(f"{target.name}/{n}", s, written) for n, s in _sizes(shards)]
        logger.info("%s: writing %d files, %s", target, len(shards), bytes_text(total))
        with guard_reads(manifest.entries, store):
            for (name, held), count in zip(shards.items(), counts, strict=True):
                _write_shard(directory / name, held, tensors, count)
        weight_map = {spec.name: name for name, held in shards.items() for spec in held}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_bytes(directory / INDEX_NAME, as_json(index))
        if self_contained:
            _write_bytes(directory / MODEL_FILE, Path(standalone.__file__).read_bytes())
        _write_bytes(directory / "config.json", as_json(config))
    return Export(target, len(shards), total, text_only)


def _exported_config(
    original: dict[str, Any],
    manifest: Manifest,
    model: nn.Module,
    self_contained: bool,
) -> dict[str, Any]:
    """Return the export's config.json: MLX's `quantization`, no tower, no code but its own.

    The model type stays, even one that mlx-lm does not know: it may decide the tokenizer's class.
    """
    left_out = ("_name_or_path", "vision_config", "audio_config")
    config = {key: value for key, value in original.items() if key not in left_out}
    if type(config.get("text_config")) is dict:
        text = config["text_config"]
        config["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    config["quantization"] = {"group_size": manifest.group_size, "bits": manifest.bits}
    config["quantization_config"] = config["quantization"]
    mark: dict[str, Any] = {"format": FORMAT}
    if self_contained:
        config["model_file"] = MODEL_FILE
        mark["module"] = type(model).__module__.removeprefix("mlx_lm.models.")
        mark["rotated"] = dict(_rotated(model))
    config[EXPORTED] = mark
    return dict(sorted(config.items()))


def _rotated(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Return path and number of rotation rounds of each rotated layer."""
    for path, module in model.named_modules():
        if isinstance(module, RotateQuantizedLinear):
            yield path, module.theta.shape[0]
        elif isinstance(module, RotateSwitchGLU):
            yield path, module.gate_up_rot_theta.shape[0]


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
