"""The two functions that most programs need: convert_checkpoint() and load()."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any, Literal

from .conversion import Progress, convert
from .errors import EntryDamaged
from .hub import resolve
from .manifest import Manifest
from .request import Request, read_manifest, staleness
from .store import Store, user_cache_root
from .task import DTYPES, Dtype

logger = logging.getLogger(__name__)
IN_PLACE = "mlx"
"""The directory inside a model directory in which a conversion can be shipped with the model."""


def cache_store(cache_dir: str | Path | None = None) -> Store:
    """The cache in `cache_dir`, default the user's."""
    return Store(Path(cache_dir).expanduser() if cache_dir else user_cache_root())


def make_request(
    model_path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    in_place: bool = False,
    force: bool = False,
    jobs: int | None = None,
    dtype: Dtype = "source",
) -> Request:
    """The request for converting `model_path` with these options; downloads a model named by a Hub
    id.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    directory = resolve(model_path)
    jobs = jobs or min(8, os.cpu_count() or 1)
    store = Store(directory / IN_PLACE, private=False) if in_place else cache_store(cache_dir)
    return Request(str(model_path), directory, store, in_place, force, jobs, dtype=dtype)


def convert_checkpoint(
    model_path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    in_place: bool = False,
    force: bool = False,
    jobs: int | None = None,
    dtype: Dtype = "source",
    progress: Progress | None = None,
) -> Manifest:
    """The manifest of the converted model; shards whose entries are in the cache are not converted
    again.

    `model_path`: a model directory or a Hub repository id. `cache_dir`: default the user's cache.
    `in_place`: into `<model_path>/mlx` instead. `force`: convert every shard again. `jobs`:
    workers, default one a core and at most 8; each holds the input and output of one linear.
    `dtype`: "source" stores every tensor as the public loader would, bit for bit; "float16" or
    "bfloat16" stores scales, biases, norms and all that meets activations in that one width, so
    that no operation falls back to float32 because two of its inputs differ. It rounds values, and
    on MLX's CPU backend the fallback is the fastest of all.
    `progress(shard, bytes done, bytes in all)` is called from the workers.

    Raises, before anything is written: CheckpointError, MalformedFile, LayoutError, PlanError.
    Later: SourceChanged, StoreError, and OutOfRange for a value that `dtype` cannot hold; what was
    published stays and the next call goes on from there.
    """
    request = make_request(
        model_path, cache_dir=cache_dir, in_place=in_place, force=force, jobs=jobs, dtype=dtype
    )
    return convert(request, progress).manifest


def load(
    model_path: str | Path,
    lazy: bool = False,
    force_text: bool = False,
    *,
    cache_dir: str | Path | None = None,
    jobs: int | None = None,
    dtype: Dtype = "source",
    progress: Progress | None = None,
    verify: Literal["header", "full"] = "header",
) -> tuple[Any, Any, bool]:
    """`(model, tokenizer or processor, is_vlm)`, converting first what is not in the cache.

    The model is an `mlx.nn.Module` in eval mode; `lazy=True` leaves its parameters unevaluated.
    `force_text=True` loads a vision model's text part through mlx-lm. `dtype` is that of
    `convert_checkpoint`; the conversions of one model in two dtypes stand side by side. A
    conversion inside the model directory is used first, if it fits the sources. `verify="header"`
    checks size, names, dtypes and shapes of every entry, and its hash unless its stat is as the
    writer left it; `"full"` hashes every entry. A damaged entry is taken out of use and converted
    again, once.

    Raises what `convert_checkpoint` raises, and AssemblyError when the stored tensors and the
    model's parameters do not match one to one.
    """
    request = make_request(model_path, cache_dir=cache_dir, jobs=jobs, dtype=dtype)
    from .model import assemble  # imports MLX, which conversion may not need

    def attempt() -> tuple[Any, Any, bool]:
        shipped = _shipped(request)
        manifest, store = shipped or (convert(request, progress).manifest, request.store)
        return assemble(
            request.directory,
            manifest,
            store,
            lazy=lazy,
            force_text=force_text,
            full=verify == "full",
        )

    with contextlib.suppress(EntryDamaged):  # logged; leaving the block drops every array
        return attempt()
    return attempt()


def _shipped(request: Request) -> tuple[Manifest, Store] | None:
    """The conversion inside the model directory, if there is one and it fits the sources."""
    shipped = make_request(request.directory, in_place=True, jobs=request.jobs, dtype=request.dtype)
    manifest = read_manifest(shipped)
    if manifest is None:
        return None
    reason = staleness(shipped, manifest, read_unknown=True)
    if reason:
        logger.warning("%s is not used: %s", shipped.store.root, reason)
        return None
    return manifest, shipped.store
