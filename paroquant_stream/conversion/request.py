"""The request of a conversion: which model, where to, and how."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.locate import locate
from ..checkpoint.model_source import ModelSource
from ..options import check, check_choice, check_count, check_flags, check_path
from ..store.format import CAST_VERSION, DEFAULT_VARIANT, DTYPES, IO_BITS, Dtype, Variant
from ..store.location import IN_PLACE
from ..store.manifest import Manifest
from ..store.store import Store, cache_store

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from typing import TypedDict, Unpack

    from ..execution.threads import Shared

    class ConvertKeywords(TypedDict, total=False):
        """The fields of `ConvertOptions`, as keyword arguments."""

        cache_dir: str | Path | None
        in_place: bool
        force: bool
        jobs: int | None
        revision: str | None
        drop_source: bool
        dtype: Dtype
        io_bits: int
        executor: Executor | None


@dataclass(frozen=True)
class ConvertOptions:
    """How a model is converted.

    Attributes:
        cache_dir: Directory of the cache; None for the user's.
        in_place: Convert into `<model>/mlx`, to ship with the model, instead of the cache.
        force: Convert every shard again.
        jobs: Workers; None for one per core and at most 16, or for the width of `executor`. Each
            holds the input and output of one linear in memory.
        revision: Branch, tag or commit of a Hub repository; None for `main`.
        drop_source: **Remove** each shard, downloaded or local, once its entry was read back and no
            other shard needs it. Nothing asks before.
        dtype: "source" stores every tensor as the public loader would, bit for bit. "float16" or
            "bfloat16" stores scales, biases, norms and all that meets activations in that one
            width; that rounds values.
        io_bits: Bits per weight of embedding and head, 4 (as the public loader) or 8.
        executor: Convert in its workers, which see the same paths; None for worker processes where
            there is enough work, and else threads.

    Raises:
        ValueError: An option has a value that is not allowed.
    """

    cache_dir: str | Path | None = None
    in_place: bool = False
    force: bool = False
    jobs: int | None = None
    revision: str | None = None
    drop_source: bool = False
    dtype: Dtype = "source"
    io_bits: int = 4
    executor: Executor | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        check_flags(in_place=self.in_place, force=self.force, drop_source=self.drop_source)
        check_path("cache_dir", self.cache_dir)
        check_count("jobs", self.jobs)
        fits = self.revision is None or isinstance(self.revision, str)
        check("revision", self.revision, "a branch, tag or commit, or None", fits)
        check_choice("dtype", self.dtype, DTYPES)
        fits = type(self.io_bits) is int and self.io_bits in IO_BITS
        check("io_bits", self.io_bits, "4 or 8", fits)
        if self.executor is not None:
            _check_executor(self.executor)


@dataclass(frozen=True)
class Target:
    """Where a conversion goes, and in which variant."""

    store: Store
    in_place: bool = False
    variant: Variant = DEFAULT_VARIANT

    def manifest_name(self, source: ModelSource) -> str:
        """Name a model's manifest: by its path in a cache, without any inside the model."""
        if self.in_place:
            return in_place_id(self.variant)
        return model_id(source.resolved, self.variant)


@dataclass(frozen=True)
class Request:
    """A model, where its conversion goes, and how it is made."""

    source: ModelSource
    target: Target
    options: ConvertOptions = field(default_factory=ConvertOptions)
    jobs: int = 1
    """Units of work at once."""
    shared: Shared | None = None
    """With the conversions of other models."""

    @property
    def manifest_name(self) -> str:
        """The name of the manifest in the store."""
        return self.target.manifest_name(self.source)

    @property
    def store(self) -> Store:
        """Where entries and the manifest go."""
        return self.target.store

    def with_variant(self, variant: Variant) -> Request:
        """Give the request of the same model for another of its conversions."""
        return replace(self, target=replace(self.target, variant=variant))


def make_request(model_path: str | Path, **keywords: Unpack[ConvertKeywords]) -> Request:
    """Find a model and its target; downloads config, index and tokenizer of a Hub id, no shard.

    Args:
        model_path: A model directory or a repository id.
        **keywords: The fields of `ConvertOptions`.

    Raises:
        CheckpointError: There is no such model.
        ValueError: An option has a value that is not allowed.
    """
    return request_for(model_path, ConvertOptions(**keywords))


def request_for(model_path: str | Path, options: ConvertOptions) -> Request:
    """Do the same with options that were made, and so checked, before.

    Args:
        model_path: A model directory or a repository id.
        options: How it is converted.

    Raises:
        CheckpointError: There is no such model.
        ValueError: `model_path` is neither text nor a path.
    """
    check_path("model_path", model_path, optional=False)
    directory, remote = locate(model_path, options.revision)
    if options.in_place:
        store = Store(directory / IN_PLACE, private=False)
    else:
        store = cache_store(options.cache_dir)
    source = ModelSource(str(model_path), directory, remote)
    target = Target(store, options.in_place, Variant(options.dtype, options.io_bits))
    return Request(source, target, options, _jobs(options))


def read_manifest(request: Request) -> Manifest | None:
    """Read the manifest of an earlier conversion; None where there is none that can be used."""
    return request.store.load_manifest(request.manifest_name)


def model_id(directory: Path, variant: Variant = DEFAULT_VARIANT) -> str:
    """Name the manifest, in a cache, of the model in this resolved directory."""
    return hashlib.sha256(os.fsencode(directory) + b"\0" + _options_json(variant)).hexdigest()


def in_place_id(variant: Variant) -> str:
    """Name the manifest, inside a model directory, of this one of its conversions."""
    return f"model-{hashlib.sha256(_options_json(variant)).hexdigest()[:16]}"


def default_jobs() -> int:
    """Give one job per core, at most 16."""
    return min(16, os.cpu_count() or 1)


def _check_executor(executor: object) -> None:
    from concurrent.futures import Executor  # late, as it is slow to import

    fits = isinstance(executor, Executor)
    check("executor", executor, "a concurrent.futures.Executor or None", fits)


def _jobs(options: ConvertOptions) -> int:
    if options.jobs is None and options.executor:
        from ..execution.executors import worker_count  # late: most runs need no executor

        return worker_count(options.executor) or default_jobs()
    return options.jobs or default_jobs()


def _options_json(variant: Variant) -> bytes:
    """Return the options that change an entry, as JSON."""
    cast = {} if variant.dtype == "source" else {"cast": CAST_VERSION}
    io_bits = {} if variant.io_bits == DEFAULT_VARIANT.io_bits else {"io_bits": variant.io_bits}
    return json.dumps({"dtype": variant.dtype, **cast, **io_bits}, sort_keys=True).encode()
