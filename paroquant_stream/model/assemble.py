"""assemble(): the MLX model of a manifest, every parameter from a stored tensor and every tensor
used.
"""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..backends.backend import build, load_config, load_tokenizer
from ..checkpoint.checkpoint import read_config
from ..conversion.request import WHOLE, Split
from ..distributed.byte_ranges import entry_slices
from ..distributed.partition import Part, check_placed, cut, meet, part_of
from ..distributed.tensor_parallel import read_by_layer
from ..errors import AssemblyError
from ..plan.planner import Plan
from ..rotation.layers import RotateQuantizedLinear, RotateSwitchGLU
from ..store.manifest import Manifest
from ..store.store import Store
from ..trace import SILENCE, Trace
from .entries import Stored, check_sizes, entries_with, placeholders, read_weights, reading
from .names import listed, named_for

logger = logging.getLogger(__name__)

Weights = dict[str, mx.array]


def assemble(
    directory: Path,
    manifest: Manifest,
    store: Store,
    *,
    lazy: bool,
    force_text: bool,
    full: bool = False,
    trace: Trace = SILENCE,
    split: Split = WHOLE,
) -> tuple[nn.Module, Any, bool]:
    """`(model, tokenizer or processor, is_vlm)` of a converted checkpoint, or a part of it.

    `lazy`: nothing is read before it is used. `full`: every entry is hashed before it is used.
    Raises what `assemble_stored` raises, and EntryDamaged when an entry is not what was written.
    """
    stored = Stored(
        [tensor for record in manifest.entries for tensor in record.tensors],
        lambda wanted: read_weights(
            manifest, store, wanted, full=full, lazy=lazy or split.by_tensors
        ),
        lambda wanted: reading(entries_with(manifest, wanted), store),
        lambda wanted: check_sizes(entries_with(manifest, wanted), store),
        manifest.bits,
        manifest.group_size,
        slices=lambda weights: entry_slices(manifest.entries, store, weights),
    )
    return assemble_stored(
        directory, stored, lazy=lazy, force_text=force_text, trace=trace, split=split
    )


def assemble_stored(
    directory: Path,
    stored: Stored,
    *,
    lazy: bool,
    force_text: bool,
    trace: Trace = SILENCE,
    split: Split = WHOLE,
) -> tuple[nn.Module, Any, bool]:
    """`(model, tokenizer or processor, is_vlm)` of stored tensors, or a part of it.

    Raises AssemblyError listing every tensor that the whole model has no place for, every parameter
    without a tensor, and every shape that does not fit; NoSuchPart.
    """
    tensors, config = stored.tensors, read_config(directory)
    part = part_of(split, directory, tensors, force_text)
    is_vlm = part.is_vlm
    if stored.model_names and config.get("vision_config") and not (is_vlm or force_text):
        logger.warning("%s: saved without its vision tower, so a text model", directory)
    if not lazy:
        parts = split.group.size() if split.by_tensors else 1
        _check_memory(sum(t.nbytes for t in tensors if part.reads(t.name)) // parts)
    with trace.span("open the entries"):
        weights = stored.read(part.reads)
    if not lazy and not split.by_tensors:
        with stored.guard(part.reads):
            mx.async_eval(weights)  # read from here on, while seconds of imports go by
    slices = stored.slices(weights) if split.by_tensors else nullcontext()
    unread = placeholders(t for t in tensors if part.has(t.name) and not part.reads(t.name))
    with trace.span("build the model"):
        config = load_config(directory)
        model = build(config, is_vlm)
    with trace.span("tokenizer"):
        tokenizer = load_tokenizer(directory, config, is_vlm)
    with trace.span("place the weights"):
        weights |= unread
        if not stored.model_names:
            weights = named_for(model, weights, is_vlm)
        check_placed(part, weights, unread)
        _place(model, weights, stored.bits, stored.group_size, directory)
        del weights, unread  # else what `cut` replaces would stay
    with stored.guard(part.reads):
        with trace.span("cut"), slices as take:
            cut(model, split, part, take)
        if not lazy:
            with trace.span("read"):
                _read(model, stored, part, split)
    if split.group is not None:
        meet(split.group)
    return model, tokenizer, is_vlm


def _read(model: nn.Module, stored: Stored, part: Part, split: Split) -> None:
    """Has MLX read what is left of the parameters, from files that are as they were opened."""
    if split.by_tensors:
        read_by_layer(model)
    else:
        mx.eval(model.parameters())
    stored.check(part.reads)


def check_assembly(directory: Path, plan: Plan) -> None:
    """Build the model's class and find the place of every tensor that a plan makes; reads none.

    Raises:
        AssemblyError: No class is known for the model, or a tensor has no place in it, or a
            parameter no tensor.
        MissingExtra: mlx-lm or mlx-vlm is not installed.
    """
    specs = [output for task in plan.tasks for output in task.outputs]
    part = part_of(WHOLE, directory, specs, force_text=False)
    model = build(load_config(directory), part.is_vlm)
    weights = named_for(model, placeholders(s for s in specs if part.has(s.name)), part.is_vlm)
    bits, group_size = plan.quantization.bits, plan.quantization.group_size
    _place(model, weights, bits, group_size, directory)


def _place(model: nn.Module, weights: Weights, bits: int, group_size: int, directory: Path) -> None:
    """Puts the weights into the model, each in its place, or raises AssemblyError."""
    try:
        _swap_layers(model, weights, bits, group_size)
    except (ValueError, LookupError, ArithmeticError, AttributeError, TypeError) as error:
        raise AssemblyError(  # what shapes and names lead to that no conversion has
            f"{directory}: the stored tensors are no rotated layers of this model: {error}"
        ) from error
    _check(model, weights)
    model.load_weights(list(weights.items()))
    model.eval()


def _check_memory(needed: int) -> None:
    """Raises AssemblyError when the weights cannot fit: out of memory, MLX crashes the process."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise AssemblyError(
            f"the weights take {needed:,} bytes, this machine has {memory:,}; lazy=True loads them "
            "all the same, as they are used"
        )


def _swap_layers(model: nn.Module, weights: Weights, bits: int, group_size: int) -> None:
    """Puts rotated and quantized layers where the weights have their parameters."""
    modules = dict(model.named_modules())
    swaps: list[tuple[str, nn.Module]] = []
    for path, module in modules.items():
        if f"{path}.gate_up_rot_theta" in weights:
            krot = weights[f"{path}.gate_up_rot_theta"].shape[0]
            swaps.append((path, RotateSwitchGLU.from_switch_glu(module, group_size, krot, bits)))
        elif f"{path}.theta" in weights and "weight" in module:
            outputs, inputs = module.weight.shape
            krot = weights[f"{path}.theta"].shape[0]
            layer = RotateQuantizedLinear(
                inputs, outputs, bias="bias" in module, group_size=group_size, bits=bits, krot=krot
            )
            swaps.append((path, layer))
    model.update_modules(tree_unflatten(swaps))
    nn.quantize(
        model,
        group_size,
        bits,
        class_predicate=lambda path, module: (
            f"{path}.scales" in weights and hasattr(module, "to_quantized")
        ),
    )


def _check(model: nn.Module, weights: Weights) -> None:
    """Raises AssemblyError unless weights and parameters match in name, shape and kind."""
    parameters = dict(tree_flatten(model.parameters()))
    issues = [f"{name}: no stored tensor" for name in parameters.keys() - weights.keys()]
    issues += [f"{name}: no such parameter" for name in weights.keys() - parameters.keys()]
    for name in parameters.keys() & weights.keys():
        wanted, found = parameters[name], weights[name]
        if wanted.shape != found.shape or _kind(wanted) != _kind(found):
            issues.append(
                f"{name}: the model has {wanted.dtype} {wanted.shape}, "
                f"stored is {found.dtype} {found.shape}"
            )
    if issues:
        count = f"{len(issues)} differences between the model class and the stored tensors:"
        raise AssemblyError(count + listed(issues))


def _kind(array: mx.array) -> Any:
    """Floats may differ in width, since a class starts in float32; integers must agree."""
    return mx.floating if mx.issubdtype(array.dtype, mx.floating) else array.dtype
