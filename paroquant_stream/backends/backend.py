"""What every library that runs models does for us: classes, parameter names, tokenizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import AssemblyError, CheckpointError, MissingExtraError, MissingPartError
from ..text import one_line

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn


class Backend(ABC):
    """A library with model classes; the only code that calls it."""

    package: ClassVar[str]
    """Its name as a module."""
    extra: ClassVar[str]
    """The extra of this package that installs it."""
    is_vlm: ClassVar[bool]
    """Whether it runs vision models."""

    @property
    def library(self) -> str:
        """Its name as a distribution."""
        return self.package.replace("_", "-")

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the model of a config, at its lazy random start.

        Args:
            config: As `load_config` gives it; `check_config` has bounded its numbers before.

        Raises:
            AssemblyError: The library does not know the model type, or its class cannot use the
                config.
            MissingExtraError: The library is not installed.
        """
        utils = self._utils()
        try:
            return self._build(utils, dict(config))
        except Exception as error:  # a missing key, a zero, a number beyond MLX's: of any kind
            raise AssemblyError(
                f"model_type {config.get('model_type')!r}: {one_line(error)}"
            ) from error

    @abstractmethod
    def sanitize(self, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Rename weights to the model's own names, by the library's own functions.

        Some of them change arrays in place, so `weights` must not be shared with another load.
        """

    def load_tokenizer(self, directory: Path, config: Mapping[str, Any]) -> Any:
        """Load the tokenizer of a text model, or the processor of a vision model.

        A vision model without processor files gets its tokenizer. No code of the model is ever
        run, and transformers is told so, else it would ask the user.

        Raises:
            CheckpointError: It cannot be loaded.
            MissingExtraError: The library is not installed.
        """
        utils = self._utils()
        try:
            return self._load_tokenizer(utils, directory, config.get("eos_token_id"))
        except Exception as error:  # transformers has two dozen kinds
            raise CheckpointError(
                f"{directory}: transformers cannot load the tokenizer: {one_line(error)}"
            ) from error

    def why_unknown(self, config: Mapping[str, Any]) -> str | None:
        """Say why the installed library cannot load a model, and what to do; None if it can.

        Looks for the file of the model's class. Only where there is none is the library asked,
        which takes seconds: it knows some types by other names.
        """
        kind = config.get("model_type")
        try:
            spec = find_spec(self.package)
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            return (
                f"{self.library} is not installed; to load it: "
                f"pip install 'paroquant_stream[{self.extra}]'"
            )
        name = self.type_name(str(kind))
        for directory in spec.submodule_search_locations or ():
            models = Path(directory, "models")
            with suppress(OSError):
                if (models / f"{name}.py").is_file() or (models / name / "__init__.py").is_file():
                    return None
        if self._has_class({**config, "model_type": name}):
            return None
        try:
            installed = version(self.library)
        except PackageNotFoundError:
            installed = "(of unknown version)"
        return (
            f"{self.library} {installed} has no class for model_type {kind!r}, so it cannot be "
            f"loaded here; a newer one may have: pip install -U {self.library}"
        )

    def type_name(self, model_type: str) -> str:
        """Give the library's name for a model type."""
        return model_type

    def _has_class(self, config: dict[str, Any]) -> bool:
        try:
            self._find_class(self._utils(), config)
        except (MissingExtraError, TypeError, ValueError, KeyError):
            return False
        return True

    @abstractmethod
    def _utils(self) -> Any:
        """The library's module of functions; raises MissingExtraError."""

    @abstractmethod
    def _find_class(self, utils: Any, config: dict[str, Any]) -> Any: ...

    @abstractmethod
    def _build(self, utils: Any, config: dict[str, Any]) -> nn.Module: ...

    @abstractmethod
    def _load_tokenizer(self, utils: Any, directory: Path, end: Any) -> Any: ...


def keep_pipeline_layers(model: nn.Module, group: Any) -> range:
    """Leave a model the layers that this rank of `group` runs, by the class's own split.

    mlx-lm's classes leave None in the place of earlier layers, and end with the last of this rank.

    Returns:
        The numbers of those layers.

    Raises:
        MissingPartError: The class offers no pipeline, or there are more ranks than layers.
    """
    owner: Any = getattr(model, "model", None)
    if not hasattr(owner, "pipeline"):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        others = ["layers=range(first, beyond the last) for a loop of your own"]
        if hasattr(model, "shard"):
            others.append('parallel="tensor", which splits each layer')
        if kind.startswith("mlx_vlm."):
            others.append("perhaps a pipeline of its text part, with force_text=True")
        raise MissingPartError(f"{kind} offers no pipeline; there is {'; '.join(others)}")
    try:
        owner.pipeline(group)
    except ValueError as error:
        raise MissingPartError(f"no pipeline over {group.size()} ranks: {error}") from error
    return range(owner.start_idx, owner.end_idx)
