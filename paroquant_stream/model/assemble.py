"""Assembles the MLX model: every parameter has a stored tensor, every tensor a parameter."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..backends.mlx_lm import load_config
from ..checkpoint.config import ModelConfig
from ..checkpoint.config_bounds import check_tokenizer
from ..checkpoint.model_files import check_directory
from ..distributed.byte_ranges import entry_slices
from ..distributed.partition import (
    Partition,
    apply_partition,
    barrier,
    check_placed,
    find_partition,
)
from ..distributed.split import WHOLE, Split
from ..distributed.tensor_parallel import read_by_layer
from ..errors import AssemblyError
from ..plan.planner import Plan
from ..store.manifest import EntryRecord, Manifest
from ..store.store import Store
from ..text import bytes_text
from ..trace import NO_TRACE, Trace
from .early_reader import EarlyReader
from .entries import check_sizes, guard_reads, read_weights
from .experts import placeholders
from .memory import physical_memory
from .names import leave_out_absent, rename_weights
from .placement import place_weights
from .tensor_source import TensorSource

logger = logging.getLogger(__name__)


NO_CHANGES: Mapping[str, Any] = MappingProxyType({})
Loaded = tuple[nn.Module, Any, bool]
"""The model, its tokenizer or processor, and whether it is a vision model."""


def assemble(
    config: ModelConfig,
    manifest: Manifest,
    store: Store,
    *,
    lazy: bool,
    force_text: bool,
    full: bool = False,
    trace: Trace = NO_TRACE,
    split: Split = WHOLE,
    model_config: Mapping[str, Any] = NO_CHANGES,
    tokenizer: bool = True,
    early: EarlyReader | None = None,
) -> Loaded:
    """Assemble a converted model, or a part of it, from its cache entries.

    Args:
        config: Of the model directory.
        manifest: Lists the entries.
        store: Holds the entries.
        lazy: As for `assemble_from`, like all that follow.
        force_text: See above.
        full: Hash every entry before it is used.
        trace: See above.
        split: See above.
        model_config: See above.
        tokenizer: See above.
        early: Has read some entries already.

    Raises:
        EntryDamagedError: An entry's bytes are not those that were written.
        AssemblyError: As `assemble_from` raises.
        MissingPartError: As `assemble_from` raises.
    """
    stored = TensorSource(
        [tensor for record in manifest.entries for tensor in record.tensors],
        lambda wanted: read_weights(
            manifest, store, wanted, full=full, lazy=lazy or split.by_tensors, early=early
        ),
        lambda wanted: guard_reads(manifest.entries_with(wanted), store),
        lambda wanted: check_sizes(manifest.entries_with(wanted), store),
        manifest.bits,
        manifest.group_size,
        slices=lambda weights: entry_slices(manifest.entries, store, weights),
    )
    how: Any = {"lazy": lazy, "force_text": force_text, "trace": trace, "split": split}
    return assemble_from(stored, config, **how, model_config=model_config, tokenizer=tokenizer)


def assemble_from(
    stored: TensorSource,
    config: ModelConfig,
    *,
    lazy: bool,
    force_text: bool,
    trace: Trace = NO_TRACE,
    split: Split = WHOLE,
    model_config: Mapping[str, Any] = NO_CHANGES,
    tokenizer: bool = True,
) -> Loaded:
    """Assemble a model, or a part of it, from stored tensors.

    Args:
        stored: The tensors.
        config: Of the model directory.
        lazy: Leave the parameters unevaluated, so that MLX reads each at its first use.
        force_text: Load the text part of a vision model.
        trace: Records the time of each stage.
        split: Which part is loaded.
        model_config: Values that replace those of config.json for the model's class.
        tokenizer: Load the tokenizer or processor too.

    Raises:
        AssemblyError: Tensors and parameters of the whole model do not match; lists each.
        MissingPartError: The model has no such part.
        CheckpointError: The directory or its tokenizer cannot be used.
    """
    directory, tensors = config.directory, stored.tensors
    check_directory(directory)
    class_config = cache(lambda: {**load_config(directory), **model_config})
    part = find_partition(split, config, tensors, force_text, class_config)
    if stored.model_names and not force_text:
        _warn_without_tower(config, part)
    weights = _start_reading(stored, part, split, lazy, trace)
    slices = stored.slices(weights) if split.by_tensors else nullcontext()
    with trace.span("build the model"):
        model = part.backend.build(class_config())
    loaded = _load_tokenizer(part, directory, class_config(), trace) if tokenizer else None
    with trace.span("place the weights"):
        _place(model, stored, part, weights, directory)
    del weights  # or the arrays that `apply_partition` replaces would stay in memory
    with stored.guard(part.reads):
        with trace.span("cut"), slices as take:
            apply_partition(model, split, part, take)
        if not lazy:
            _read(model, stored, part, split, trace)
    if split.group is not None:
        barrier(split.group)
    return model, loaded, part.backend.is_vlm


def _warn_without_tower(config: ModelConfig, part: Partition) -> None:
    if config.values.get("vision_config") and not part.backend.is_vlm:
        message = "%s: saved without its vision tower, so loaded as a text model"
        logger.warning(message, config.directory)


def _load_tokenizer(
    part: Partition, directory: Path, config: Mapping[str, Any], trace: Trace
) -> Any:
    with trace.span("tokenizer"):
        check_tokenizer(directory)
        return part.backend.load_tokenizer(directory, config)


def _start_reading(
    stored: TensorSource, part: Partition, split: Split, lazy: bool, trace: Trace
) -> dict[str, mx.array]:
    """Open the tensors of the part, and have MLX read them during the slow imports."""
    if not lazy:
        parts = split.group.size() if split.by_tensors else 1
        _check_memory(sum(t.nbytes for t in stored.tensors if part.reads(t.name)) // parts)
    logger.info("opening the weights")
    with trace.span("open the entries"):
        weights = stored.read(part.reads)
    if not lazy and not split.by_tensors:
        with stored.guard(part.reads):
            mx.async_eval(weights)
    return weights


def _place(
    model: nn.Module,
    stored: TensorSource,
    part: Partition,
    weights: dict[str, mx.array],
    directory: Path,
) -> None:
    """Put the tensors of the part into the model, and placeholders for all others."""
    unread = placeholders(t for t in stored.tensors if part.has(t.name) and not part.reads(t.name))
    weights = weights | unread
    if stored.model_names:
        leave_out_absent(model, weights, part.backend)
    else:
        weights = rename_weights(model, weights, part.backend)
    check_placed(part, weights, unread)
    place_weights(model, weights, stored.bits, stored.group_size, directory)


def _read(
    model: nn.Module, stored: TensorSource, part: Partition, split: Split, trace: Trace
) -> None:
    """Have MLX read the parameters that the part kept, then check the sizes of the files."""
    logger.info("reading the weights")
    with trace.span("read"):
        if split.by_tensors:
            read_by_layer(model)
        # the state, for constants that are no parameters: another thread cannot compute them
        mx.eval(model.state)
        stored.check(part.reads)


def needed_entries(
    split: Split, config: ModelConfig, manifest: Manifest, force_text: bool
) -> Collection[EntryRecord]:
    """Find the entries from which a part of a model is read.

    Args:
        split: Which part is loaded.
        config: Of the model directory.
        manifest: Lists the entries.
        force_text: Load the text part of a vision model.

    Raises:
        AssemblyError: As `find_partition` raises.
        MissingPartError: As `find_partition` raises.
    """
    tensors = [tensor for record in manifest.entries for tensor in record.tensors]
    class_config = partial(load_config, config.directory)
    return manifest.entries_with(
        find_partition(split, config, tensors, force_text, class_config).reads
    )


def check_assembly(config: ModelConfig, plan: Plan) -> None:
    """Check that a model can be assembled from the tensors of a plan, without reading any.

    Args:
        config: Of the model directory.
        plan: Lists the tensors that a conversion would write.

    Raises:
        AssemblyError: The library has no class for the model, or tensors and parameters do not
            match.
        MissingExtraError: mlx-lm or mlx-vlm is not installed.
    """
    directory = config.directory
    check_directory(directory)
    specs = [output for task in plan.tasks for output in task.outputs]
    class_config = cache(partial(load_config, directory))
    part = find_partition(WHOLE, config, specs, force_text=False, class_config=class_config)
    model = part.backend.build(class_config())
    weights = placeholders(spec for spec in specs if part.has(spec.name))
    weights = rename_weights(model, weights, part.backend)
    bits, group_size = plan.quantization.bits, plan.quantization.group_size
    place_weights(model, weights, bits, group_size, directory)


def _check_memory(needed: int) -> None:
    """Check that the weights fit into memory: beyond it, MLX would crash the process."""
    if needed > (memory := physical_memory()):
        raise AssemblyError(
            f"the weights need {bytes_text(needed)}, this machine has {bytes_text(memory)}; "
            "lazy=True loads them anyway, each at its first use"
        )
