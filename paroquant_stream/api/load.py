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
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..backends.mlx_lm import MlxLm
from ..checkpoint.model_files import check_directory, check_has_tokenizer
from ..conversion.converter import Loads, convert
from ..conversion.in_place import check_variant, shipped
from ..conversion.request import Request, request_for
from ..conversion.staleness import Needed
from ..distributed.split import WHOLE, Parallel, Split
from ..errors import AssemblyError, CheckpointError, EntryDamagedError
from ..execution.threads import translate_refusals
from ..progress_bar import SHARDS, reported
from ..store.format import DEFAULT_VARIANT, Dtype
from ..store.manifest import EntryRecord, Manifest
from ..trace import Trace, written_to
from .load_options import LoadOptions

if TYPE_CHECKING:
    from ..conversion.progress import ProgressOption

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A loaded model: `model, tokenizer, is_vlm = load(...)`, or by name."""

    model: Any
    """An `mlx.nn.Module` in eval mode. MLX types neither its methods nor its call, so that a
    type checker in strict mode would refuse `model.eval()` and `model(tokens)` of that type."""
    tokenizer: Any
    """The tokenizer, of a vision model its processor, as mlx-lm or mlx-vlm makes it."""
    is_vlm: bool
    """Whether it is a vision model."""


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
    progress: ProgressOption = None,
    verify: Literal["header", "full"] = "header",
    trace: str | Path | None = None,
    layers: range | None = None,
    group: Any = None,
    parallel: Parallel = "pipeline",
    model_config: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
) -> Loaded:
    """Load a model as MLX modules, converting first what is not in the cache.

    Args:
        model_path: A model directory, one that `export_model` wrote, or a Hub repository id.
        lazy: Leave the parameters unevaluated: MLX reads each at its first use.
        force_text: Load the text part of a vision model, by mlx-lm.
        cache_dir: As in `ConvertOptions`.
        jobs: As in `ConvertOptions`.
        revision: As in `ConvertOptions`.
        dtype: As in `ConvertOptions`.
        io_bits: As in `ConvertOptions`.
        progress: As for `convert_checkpoint`.
        verify: "header" hashes an entry only if it may have changed, "full" hashes every entry.
        trace: As for `convert_checkpoint`.
        layers: Load only these layers, and what belongs to none; calling another one is an error.
        group: An `mx.distributed.Group` whose ranks each load their part of the model.
        parallel: "pipeline" splits by layers, "tensor" splits each layer.
        model_config: Values that replace those of config.json for the model's class.
        tokenizer: Load the tokenizer too; without it None is returned in its place.

    Returns:
        The model in eval mode, its tokenizer or processor, and whether it is a vision model.

    Raises:
        ValueError: An option has a value that is not allowed.
        ModelError: Tensors and parameters do not match, or the model has no such part.
        CheckpointError, StoreError, ExecutionError: As `convert_checkpoint` raises.
    """
    how = (cache_dir, jobs, revision, dtype, io_bits, progress, verify, trace)
    part = (layers, group, parallel, model_config, tokenizer)
    return _load_with(model_path, LoadOptions(lazy, force_text, *how, *part))


def _load_with(model_path: str | Path, options: LoadOptions) -> Loaded:
    MlxLm().check_installed()
    request = request_for(model_path, options.conversion)
    changes, full = options.model_config or {}, options.verify == "full"
    with translate_refusals(), written_to(options.trace) as timed:
        how = (timed, full, options.split, changes, options.tokenizer)
        settings = _Options(options.lazy, options.force_text, *how)
        return Loaded(*_load_repairing(request, settings, options.progress))


@dataclass(frozen=True)
class _Options:
    """How a model is loaded, wherever its tensors are read from."""

    lazy: bool
    force_text: bool
    trace: Trace
    full: bool
    split: Split
    model_config: Mapping[str, Any]
    tokenizer: bool

    @property
    def loads(self) -> Loads:
        """Which part of a vision model is loaded."""
        return "text" if self.force_text else "all"

    def without_entries(self, force_text: bool) -> dict[str, Any]:
        """Return the options of `assemble_from`, which reads no entries."""
        options = {k: v for k, v in vars(self).items() if k != "full"}
        return {**options, "force_text": force_text}


_Loaded = tuple[Any, Any, bool]


def _load_repairing(request: Request, options: _Options, progress: ProgressOption) -> _Loaded:
    """Load the model; after a damaged entry load again, which converts it again."""
    started, name = time.monotonic(), request.source.name
    logger.info("%s: looking for its conversion", name)
    loaded: _Loaded | None = None
    repaired: set[str] = set()
    is_last = False
    while loaded is None:
        try:
            loaded = _load(request, options, progress)
        except EntryDamagedError as error:  # was logged; leaving the clause frees all arrays
            if error.key in repaired:
                raise
            repaired.add(error.key)
        except AssemblyError:
            if is_last or not repaired:
                raise
            is_last = True  # MLX may raise the failure of a read again, when it reads other arrays
    logger.info("%s: loaded in %.1f s", name, time.monotonic() - started)
    return loaded


def _load(request: Request, options: _Options, progress: ProgressOption) -> _Loaded:
    """Load from an export, `mlx/`, the single file or the cache, whichever there is first."""
    check_directory(request.source.directory)  # fail before a long conversion
    if options.tokenizer:
        check_has_tokenizer(request.source.directory)
    with options.trace.span("import MLX"):
        from ..exports.mlx_directory_reader import stored_in_export
        from ..model.assemble import assemble, assemble_from, needed_entries
    if request.source.config.is_export:
        stored = stored_in_export(request.source.config, options.force_text)
        settings = options.without_entries(options.force_text)
        return assemble_from(stored, request.source.config, **settings)

    def entries_of_part(manifest: Manifest) -> Collection[EntryRecord]:
        return needed_entries(options.split, request.source.config, manifest, options.force_text)

    needed = entries_of_part if options.split.by_layers else None
    loaded, damage = _load_shipped(request, options, needed)
    if loaded is None:
        loaded, reason = _load_single(request, options)
    if loaded:
        return loaded
    from ..model.early_reader import EarlyReader
    from ..model.entries import read_entry

    whole = not options.lazy and options.split == WHOLE
    read = partial(read_entry, store=request.store, full=options.full)
    reader = EarlyReader(read, copies=not options.full)
    with contextlib.closing(reader) as early:
        try:
            with reported(progress) as phase:
                how = (phase(SHARDS), options.trace, needed, options.loads)
                done = convert(request, *how, early if whole else None)
        except CheckpointError as error:
            if damage:
                raise damage from error
            check_variant(request, error)
            if reason is None:
                raise
            raise type(error)(f"{error}; and not used: {reason}") from error
        config, manifest = request.source.config, done.manifest
        return assemble(config, manifest, request.store, **vars(options), early=early)


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

    config = request.source.config
    try:
        with opened(request.source.directory) as file:
            if file is None:
                return None, None
            with options.trace.span("check the sources"):
                check_usable(file, request, options.full)
            stored = stored_in_file(
                file, read_quantization(config.values, str(config.path)), lazy=options.lazy
            )
            try:
                settings = options.without_entries(options.force_text)
                return assemble_from(stored, config, **settings), None
            except AssemblyError as error:
                if file.origin:  # written by this package for these sources, so like an entry
                    raise
                reason = f"{file.path}: {error}"
    except CheckpointError as error:
        reason = str(error)
    logger.warning("not used: %s", reason)
    return None, reason
