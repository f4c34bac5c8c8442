"""load(): the MLX model of a checkpoint."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..checkpoint.model_files import check_directory
from ..conversion.converter import convert
from ..conversion.in_place import shipped
from ..conversion.request import Request, make_request
from ..conversion.staleness import Needed
from ..distributed.split import Parallel, Split
from ..errors import (
    AssemblyError,
    CheckpointError,
    EntryDamagedError,
)
from ..store.format import Dtype
from ..store.manifest import EntryRecord, Manifest
from ..trace import Trace, written_to

if TYPE_CHECKING:
    from ..conversion.progress import Progress

logger = logging.getLogger(__name__)


def load(
    model_path: str | Path,
    lazy: bool = False,
    force_text: bool = False,
    *,
    cache_dir: str | Path | None = None,
    jobs: int | None = None,
    revision: str | None = None,
    dtype: Dtype = "source",
    progress: Progress | None = None,
    verify: Literal["header", "full"] = "header",
    trace: str | Path | None = None,
    layers: range | None = None,
    group: Any = None,
    parallel: Parallel = "pipeline",
) -> tuple[Any, Any, bool]:
    """`(model, tokenizer or processor, is_vlm)`, converting first what is not in the cache.

    The model is an `mlx.nn.Module` in eval mode; `lazy=True` leaves its parameters unevaluated.
    `force_text=True` loads a vision model's text part through mlx-lm. A directory that `export`
    wrote is read as it is: it has no hashes, and code in it is never run. Else a conversion inside
    the model directory is used first: `mlx/`, then `converted_mlx.safetensors`, if they fit.
    `dtype` is that of `convert_checkpoint`; conversions in two dtypes stand side by side.
    `verify="header"` checks size, names, dtypes and shapes of every entry, and its hash unless its
    stat is as the writer left it; `"full"` hashes every entry. A damaged entry is taken out of use
    and converted again, once.

    `layers=range(a, b)`: only those transformer layers are loaded, and what belongs to no layer
    (embeddings, final norm, head, towers). `model.layers[i]` keeps its number; a layer outside of
    the range has no parameters, and calling it or the whole model raises MissingPartError.
    `group`, an `mx.distributed.Group`: what this rank has of a model that all ranks call together;
    load returns when all have loaded. `parallel="pipeline"`: the layers that the class's own
    `pipeline(group)` gives the rank; `"tensor"`: its part of every layer, as `shard(group)` cuts.
    The whole model is checked, by the manifest. Only entries with a tensor of the layers are opened
    or have to be there, and of what is cut only the rank's byte ranges are read; of a single file
    or an export, all.

    Raises what `convert_checkpoint` raises, AssemblyError when stored tensors and parameters do not
    match one to one, MissingPartError for layers that the model has not and for a class without a
    pipeline, SplitError for one that cannot be cut so, ValueError for options that are none.
    """
    split = Split(layers, group, parallel)
    request = make_request(
        model_path, cache_dir=cache_dir, jobs=jobs, revision=revision, dtype=dtype
    )
    with written_to(trace) as timed:
        options = _Options(lazy, force_text, verify == "full", timed, split)
        with contextlib.suppress(EntryDamagedError):  # logged; leaving the block drops every array
            return _load(request, options, progress)
        return _load(request, options, progress)


@dataclass(frozen=True)
class _Options:
    """How to load, whatever is loaded."""

    lazy: bool
    force_text: bool
    full: bool
    trace: Trace
    split: Split

    def of_stored(self, force_text: bool) -> dict[str, Any]:
        """Those that count when no entries are read."""
        found = {"lazy": self.lazy, "trace": self.trace, "split": self.split}
        return {**found, "force_text": force_text}


_Loaded = tuple[Any, Any, bool]


def _load(request: Request, options: _Options, progress: Progress | None) -> _Loaded:
    """The model from the first of: an export, `mlx/`, the single file, the cache, a conversion."""
    check_directory(request.source.directory)  # before hours of conversion
    with options.trace.span("import MLX"):
        from ..exports.mlx_directory_reader import stored_in_export  # conversion may not need it
        from ..model.assemble import assemble, assemble_from, needed_entries
    if request.source.config.is_export:
        stored = stored_in_export(request.source.config)
        return assemble_from(stored, request.source.config, **options.of_stored(force_text=True))

    def of_part(manifest: Manifest) -> Collection[EntryRecord]:
        return needed_entries(options.split, request.source.config, manifest, options.force_text)

    needed = of_part if options.split.by_layers else None
    loaded, damage = _load_shipped(request, options, needed)
    if loaded is None:
        loaded, reason = _load_single(request, options)
    if loaded:
        return loaded
    try:
        manifest = convert(request, progress, options.trace, needed).manifest
    except CheckpointError as error:
        if damage:
            raise damage from error
        if reason is None:
            raise
        raise type(error)(f"{error}; and not used: {reason}") from error
    return assemble(request.source.config, manifest, request.store, **vars(options))


def _load_shipped(
    request: Request, options: _Options, needed: Needed | None
) -> tuple[_Loaded | None, EntryDamagedError | None]:
    """The model from the conversion inside its directory, or the damage by which it cannot be."""
    with options.trace.span("check the sources"):
        found = shipped(request, needed)
    if found is None:
        return None, None
    from ..model.assemble import assemble

    manifest, store = found
    try:
        return assemble(request.source.config, manifest, store, **vars(options)), None
    except EntryDamagedError as error:  # logged; nobody repairs what somebody else may have made
        return None, error


def _load_single(request: Request, options: _Options) -> tuple[_Loaded | None, str | None]:
    """The model from the single file in its directory, else why that is not used, if it is there.

    A file of ours that fits its sources and not the model is an error, as an entry would be.
    """
    if request.target.dtype != "source":
        return None, None
    from ..checkpoint.quantization import read_quantization
    from ..exports.single_file import opened
    from ..exports.single_file_reader import check_usable, stored_in_file
    from ..model.assemble import assemble_from

    try:
        with opened(request.source.directory) as file:
            if file is None:
                return None, None
            with options.trace.span("check the sources"):
                check_usable(file, request, options.full)
            stored = stored_in_file(
                file, read_quantization(request.source.config.values), lazy=options.lazy
            )
            try:
                settings = options.of_stored(options.force_text)
                return assemble_from(stored, request.source.config, **settings), None
            except AssemblyError as error:
                if file.origin:
                    raise
                reason = f"{file.path}: {error}"
    except CheckpointError as error:
        reason = str(error)
    logger.warning("not used: %s", reason)
    return None, reason
