"""The options of `load`, checked together before a model is looked up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..conversion.progress import check_progress
from ..conversion.request import ConvertOptions
from ..distributed.split import Parallel, Split
from ..options import check, check_choice, check_flags, check_path
from ..store.format import Dtype

if TYPE_CHECKING:
    from ..conversion.progress import ProgressOption


@dataclass(frozen=True)
class LoadOptions:
    """The options of `load`, which describes them, in its order.

    Raises:
        ValueError: An option has a value that is not allowed.
    """

    lazy: bool = False
    force_text: bool = False
    cache_dir: str | Path | None = None
    jobs: int | None = None
    revision: str | None = None
    dtype: Dtype = "source"
    io_bits: int = 4
    progress: ProgressOption = None
    verify: Literal["header", "full"] = "header"
    trace: str | Path | None = None
    layers: range | None = None
    group: Any = None
    parallel: Parallel = "pipeline"
    model_config: Mapping[str, Any] | None = None
    tokenizer: bool = True

    def __post_init__(self) -> None:
        """Check every value."""
        check_flags(lazy=self.lazy, force_text=self.force_text, tokenizer=self.tokenizer)
        check_choice("verify", self.verify, ("header", "full"))
        check_progress(self.progress)
        check_path("trace", self.trace)
        fits = self.model_config is None or isinstance(self.model_config, Mapping)
        check("model_config", self.model_config, "a dict or None", fits)
        _ = self.conversion, self.split  # which check theirs

    @cached_property
    def conversion(self) -> ConvertOptions:
        """Return the options of a conversion of what is not in the cache."""
        return ConvertOptions(
            cache_dir=self.cache_dir,
            jobs=self.jobs,
            revision=self.revision,
            dtype=self.dtype,
            io_bits=self.io_bits,
        )

    @cached_property
    def split(self) -> Split:
        """Return which part of the model is loaded."""
        return Split(self.layers, self.group, self.parallel)
