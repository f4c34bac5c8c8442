"""`load`: the MLX model of a checkpoint.

The model comes from the first of these that there is and that fits the checkpoint: a directory that
`export_model` wrote, used as it is; the conversion inside the model directory, `mlx/`; the single
file in it, `converted_mlx.safetensors`; the cache, after a conversion of what it lacks. A damaged
entry of the cache is taken out of use and converted again, once. Code of a model is never run.

Of a part of a model (`layers`, `group`) every tensor is checked, by the manifest, but only entries
with tensors of the part are opened and have to exist, and of tensors that are cut only this rank's
byte ranges are read. A single file or an export is read whole. `model.layers[i]` keeps its number.
With a `group`, `load` returns on every rank once all have loaded.
"""

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
from ..conversion.request import ConvertOptions, Request, request_for
from ..conversion.staleness import Needed
from ..distributed.split import Parallel, Split
from ..errors import AssemblyError, CheckpointError, EntryDamagedError
from ..store.format import DEFAULT_VARIANT, Dtype
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
    io_bits: int = 4,
    progress: Progress | None = None,
    verify: Literal["header", "full"] = "header",
    trace: str | Path | None = None,
    layers: range | None = None,
    group: Any = None,
    parallel: Parallel = "pipeline",
) -> tuple[Any, Any, bool]:
    """Load a model as MLX modules, converting first what is not in the cache.

    Args:
        model_path: A model directory, one that `export_model` wrote, or a Hub repository id.
        lazy: Leave the parameters unevaluated, so that MLX reads each at its first use.
        force_text: Load the text part of a vision model, by mlx-lm.
        cache_dir: As in `ConvertOptions`.
        jobs: As in `ConvertOptions`.
        revision: As in `ConvertOptions`.
        dtype: As in `ConvertOptions`; conversions in two dtypes are kept side by side.
        io_bits: As in `ConvertOptions`; kept side by side too.
        progress: As for `convert_checkpoint`.
        verify: "header" hashes an entry only if it may have changed since it was written; "full"
            hashes every entry. Size, names, dtypes and shapes are always checked.
        trace: As for `convert_checkpoint`.
        layers: Load only these layers, and what belongs to none (embeddings, final norm, head,
            towers). Another layer has no parameters; calling it raises MissingPartError.
        group: An `mx.distributed.Group` whose ranks each load their part of the model.
        parallel: "pipeline" splits by layers, "tensor" splits each layer.

    Returns:
        The model in eval mode, its tokenizer or processor, and whether it is a vision model.

    Raises:
        ValueError: An option has a value that is not allowed.
        ModelError: Tensors and parameters do not match, or the model has no such part.
        CheckpointError, StoreError, ExecutionError: As `convert_checkpoint` raises.
    """
    full, split = _is_full(verify), Split(layers, group, parallel)
    chosen = ConvertOptions(cache_dir, jobs=jobs, revision=revision, dtype=dtype, io_bits=io_bits)
    request = request_for(model_path, chosen)
    with written_to(trace) as timed:
        return _load_repairing(request, _Options(lazy, force_text, full, timed, split), progress)


@dataclass(frozen=True)
class _Options:
    """How a model is loaded, wherever its tensors are read from."""

    lazy: bool
    force_text: bool
    full: bool
    trace: Trace
    split: Split

    def without_entries(self, force_text: bool) -> dict[str, Any]:
        """Return the options of `assemble_from`, which reads no entries."""
        options = {"lazy": self.lazy, "trace": self.trace, "split": self.split}
        return {**options, "force_text": force_text}


def _is_full(verify: str) -> bool:
    if verify not in ("header", "full"):
        raise ValueError(f"verify is header or full, not {verify!r}")
    return verify == "full"


_Loaded = tuple[Any, Any, bool]


def _load_repairing(request: Request, options: _Options, progress: Progress | None) -> _Loaded:
    """Load the model; after a damaged entry load again, which converts it again."""
    with contextlib.suppress(EntryDamagedError):  # was logged; leaving the block frees all arrays
        return _load(request, options, progress)
    return _load(request, options, progress)


def _load(request: Request, options: _Options, progress: Progress | None) -> _Loaded:
    """Load from an export, `mlx/`, the single file or the cache, whichever there is first."""
    check_directory(request.source.directory)  # fail before a long conversion
    with options.trace.span("import MLX"):
        from ..exports.mlx_directory_reader import stored_in_export
        from ..model.assemble import assemble, assemble_from, needed_entries
    if request.source.config.is_export:
        stored = stored_in_export(request.source.config)
        return assemble_from(
            stored, request.source.config, **options.without_entries(force_text=True)
        )

    def entries_of_part(manifest: Manifest) -> Collection[EntryRecord]:
        return needed_entries(options.split, request.source.config, manifest, options.force_text)

    needed = entries_of_part if options.split.by_layers else None
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
    """Load from the conversion inside the model directory; return the damage if it has any."""
    with options.trace.span("check the sources"):
        found = shipped(request, needed)
    if found is None:
        return None, None
    from ..model.assemble import assemble

    manifest, store = found
    try:
        return assemble(request.source.config, manifest, store, **vars(options)), None
    except EntryDamagedError as error:  # was logged; not repaired, as others may have written it
        return None, error


def _load_single(request: Request, options: _Options) -> tuple[_Loaded | None, str | None]:
    """Load from the single file in the model directory; return the reason if it is not used."""
    if request.target.variant != DEFAULT_VARIANT:
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
                settings = options.without_entries(options.force_text)
                return assemble_from(stored, request.source.config, **settings), None
            except AssemblyError as error:
                if file.origin:  # written by this package for these sources, so like an entry
                    raise
                reason = f"{file.path}: {error}"
    except CheckpointError as error:
        reason = str(error)
    logger.warning("not used: %s", reason)
    return None, reason
