"""assemble(): the MLX model of a manifest, every parameter from a stored tensor and every tensor
used.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..backends.mlx_lm import load_config
from ..checkpoint.config import ModelConfig
from ..checkpoint.config_bounds import check_tokenizer
from ..checkpoint.model_files import check_directory
from ..distributed.byte_ranges import entry_slices
from ..distributed.partition import Part, check_placed, cut, meet, part_of
from ..distributed.split import WHOLE, Split
from ..distributed.tensor_parallel import read_by_layer
from ..errors import AssemblyError
from ..plan.planner import Plan
from ..store.manifest import EntryRecord, Manifest
from ..store.store import Store
from ..trace import NO_TRACE, Trace
from .entries import check_sizes, read_weights, reading
from .experts import placeholders
from .names import named_for
from .placement import place_weights
from .tensor_source import TensorSource

logger = logging.getLogger(__name__)


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
) -> Loaded:
    """Assemble a converted model, or a part of it, from its entries.

    Args:
        config: Of the model directory.
        manifest: Names the entries.
        store: Holds them.
        lazy: Read nothing before it is used.
        force_text: Load the text part of a vision model.
        full: Hash every entry before it is used.
        trace: Gets the time of each stage.
        split: Which part is loaded.

    Raises:
        EntryDamagedError: An entry is not what was written.
        AssemblyError: As `assemble_from` raises.
        MissingPartError: As `assemble_from` raises.
    """
    stored = TensorSource(
        [tensor for record in manifest.entries for tensor in record.tensors],
        lambda wanted: read_weights(
            manifest, store, wanted, full=full, lazy=lazy or split.by_tensors
        ),
        lambda wanted: reading(manifest.entries_with(wanted), store),
        lambda wanted: check_sizes(manifest.entries_with(wanted), store),
        manifest.bits,
        manifest.group_size,
        slices=lambda weights: entry_slices(manifest.entries, store, weights),
    )
    return assemble_from(stored, config, lazy=lazy, force_text=force_text, trace=trace, split=split)


def assemble_from(
    stored: TensorSource,
    config: ModelConfig,
    *,
    lazy: bool,
    force_text: bool,
    trace: Trace = NO_TRACE,
    split: Split = WHOLE,
) -> Loaded:
    """Assemble a model, or a part of it, from stored tensors.

    Args:
        stored: The tensors.
        config: Of the model directory.
        lazy: Read nothing before it is used.
        force_text: Load the text part of a vision model.
        trace: Gets the time of each stage.
        split: Which part is loaded.

    Raises:
        AssemblyError: Lists every tensor that the whole model has no place for, every parameter
            without a tensor, and every shape that does not fit.
        MissingPartError: The model does not have the part.
    """
    directory, tensors = config.directory, stored.tensors
    check_directory(directory)
    class_config = cache(partial(load_config, directory))
    part = part_of(split, config, tensors, force_text, class_config)
    is_vlm = part.backend.is_vlm
    if stored.model_names and config.values.get("vision_config") and not (is_vlm or force_text):
        logger.warning("%s: saved without its vision tower, so a text model", directory)
    weights = _start_reading(stored, part, split, lazy, trace)
    slices = stored.slices(weights) if split.by_tensors else nullcontext()
    with trace.span("build the model"):
        model = part.backend.build(class_config())
    with trace.span("tokenizer"):
        check_tokenizer(directory)
        tokenizer = part.backend.load_tokenizer(directory, class_config())
    with trace.span("place the weights"):
        _place(model, stored, part, weights, directory)
    del weights  # else what `cut` replaces would stay
    with stored.guard(part.reads):
        with trace.span("cut"), slices as take:
            cut(model, split, part, take)
        if not lazy:
            with trace.span("read"):
                _read(model, stored, part, split)
    if split.group is not None:
        meet(split.group)
    return model, tokenizer, is_vlm


def _start_reading(
    stored: TensorSource, part: Part, split: Split, lazy: bool, trace: Trace
) -> dict[str, mx.array]:
    """Open what the part needs and let MLX read it while seconds of imports go by."""
    if not lazy:
        parts = split.group.size() if split.by_tensors else 1
        _check_memory(sum(t.nbytes for t in stored.tensors if part.reads(t.name)) // parts)
    with trace.span("open the entries"):
        weights = stored.read(part.reads)
    if not lazy and not split.by_tensors:
        with stored.guard(part.reads):
            mx.async_eval(weights)
    return weights


def _place(
    model: nn.Module,
    stored: TensorSource,
    part: Part,
    weights: dict[str, mx.array],
    directory: Path,
) -> None:
    """Puts what was read into the model, and placeholders in the place of the rest."""
    unread = placeholders(t for t in stored.tensors if part.has(t.name) and not part.reads(t.name))
    weights = weights | unread
    if not stored.model_names:
        weights = named_for(model, weights, part.backend)
    check_placed(part, weights, unread)
    place_weights(model, weights, stored.bits, stored.group_size, directory)


def _read(model: nn.Module, stored: TensorSource, part: Part, split: Split) -> None:
    """Has MLX read what is left of the parameters, from files that are as they were opened."""
    if split.by_tensors:
        read_by_layer(model)
    else:
        mx.eval(model.parameters())
    stored.check(part.reads)


def needed_entries(
    split: Split, config: ModelConfig, manifest: Manifest, force_text: bool
) -> Collection[EntryRecord]:
    """Find the entries from which a part of a model is read; raises what `part_of` raises."""
    tensors = [tensor for record in manifest.entries for tensor in record.tensors]
    class_config = partial(load_config, config.directory)
    return manifest.entries_with(part_of(split, config, tensors, force_text, class_config).reads)


def check_assembly(config: ModelConfig, plan: Plan) -> None:
    """Build the model's class and find the place of every tensor that a plan makes; reads none.

    Raises:
        AssemblyError: No class is known for the model, or a tensor has no place in it, or a
            parameter no tensor.
        MissingExtraError: mlx-lm or mlx-vlm is not installed.
    """
    directory = config.directory
    check_directory(directory)
    specs = [output for task in plan.tasks for output in task.outputs]
    class_config = cache(partial(load_config, directory))
    part = part_of(WHOLE, config, specs, force_text=False, class_config=class_config)
    model = part.backend.build(class_config())
    weights = placeholders(spec for spec in specs if part.has(spec.name))
    weights = named_for(model, weights, part.backend)
    bits, group_size = plan.quantization.bits, plan.quantization.group_size
    place_weights(model, weights, bits, group_size, directory)


def _check_memory(needed: int) -> None:
    """Raises AssemblyError when the weights cannot fit: out of memory, MLX crashes the process."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise AssemblyError(
            f"the weights take {needed:,} bytes, this machine has {memory:,}; lazy=True loads them "
            "all the same, as they are used"
        )
