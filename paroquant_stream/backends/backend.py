"""The interface to a library with model classes: classes, parameter names, tokenizers."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import AssemblyError, CheckpointError, MissingExtraError, MissingPartError
from ..text import install_text, one_line
from .mlx_core import check_mlx

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

logger = logging.getLogger(__name__)


class Backend(ABC):
    """A library with model classes: mlx-lm or mlx-vlm."""

    package: ClassVar[str]
    """The name of its module."""
    extra: ClassVar[str]
    """The extra of paroquant_stream that installs it."""
    needed: ClassVar[tuple[str, ...]]
    """The modules that a load needs: its own, and mlx-lm's, which reads every config."""
    alternative: ClassVar[str] = ""
    """What can be done without it."""
    is_vlm: ClassVar[bool]
    """Whether it runs vision models."""

    @property
    def library(self) -> str:
        """Return the name of its distribution."""
        return self.package.replace("_", "-")

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the model of a config, its random parameters unevaluated.

        Args:
            config: As `load_config` returns it, its numbers checked by `check_config`.

        Raises:
            AssemblyError: The library does not know the model type, or its class cannot use the
                config.
            MissingExtraError: The library is not installed.
        """
        logger.info("building the model by %s", self.library)
        utils = self._utils()
        try:
            return self._build(utils, dict(config))
        except Exception as error:  # a class may raise any type
            raise AssemblyError(
                f"model_type {config.get('model_type')!r}: {one_line(error)}"
            ) from error

    @abstractmethod
    def sanitize(self, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Rename weights to the model's own names, by the library's functions.

        Args:
            model: An instance of the model's class.
            weights: The arrays by their names in the checkpoint. Some functions change arrays in
                place, so they must not be shared with another load.

        Returns:
            The arrays by the names of the model's parameters, without those that the class drops.
        """

    def load_tokenizer(self, directory: Path, config: Mapping[str, Any]) -> Any:
        """Load the tokenizer of a text model, or the processor of a vision model.

        A vision model without processor files gets its tokenizer. `trust_remote_code` is always
        False: no code of the model is run, and transformers does not ask the user.

        Args:
            directory: A model directory that `check_directory` accepted.
            config: As `load_config` returns it.

        Raises:
            CheckpointError: transformers cannot load it.
            MissingExtraError: The library is not installed.
        """
        utils = self._utils()
        try:
            return self._load_tokenizer(utils, directory, config.get("eos_token_id"))
        except Exception as error:  # transformers raises many types
            raise CheckpointError(
                f"{directory}: transformers cannot load the tokenizer: {one_line(error)}"
            ) from error

    def why_unknown(self, config: Mapping[str, Any]) -> str | None:
        """Explain why the installed library cannot load a model; None if it can.

        Looks for the file of the model's class. Only if there is none is the library imported,
        which takes seconds: it knows some types by other names.

        Args:
            config: config.json.

        Returns:
            The reason and the remedy.
        """
        model_type, spec = config.get("model_type"), _find(self.package)
        if missing := self.why_missing():
            return missing
        name = self.type_name(str(model_type))
        for directory in (spec and spec.submodule_search_locations) or ():
            models = Path(directory, "models")
            with suppress(OSError):
                if (models / f"{name}.py").is_file() or (models / name / "__init__.py").is_file():
                    return None
        if self._has_class(config):
            return None
        try:
            installed = version(self.library)
        except PackageNotFoundError:
            installed = "(of unknown version)"
        return (
            f"{self.library} {installed} has no class for model_type {model_type!r}, so it cannot "
            f"be loaded here; a newer version may have one: pip install -U {self.library}"
        )

    def why_missing(self) -> str | None:
        """Explain which library is not installed, and the remedy; None if all are there.

        Nothing is imported.
        """
        missing = [name.replace("_", "-") for name in self.needed if _find(name) is None]
        return self._missing_text(missing, "not installed") if missing else None

    def import_class(self, config: Mapping[str, Any]) -> None:
        """Import the library and the model's class, so that `build` need not; raises as that does.

        Args:
            config: config.json.
        """
        name = self.type_name(str(config.get("model_type")))
        self._find_class(self._utils(), {**config, "model_type": name})

    def check_installed(self) -> None:
        """Raise MissingExtraError where MLX has no backend, or a library is not installed."""
        check_mlx()
        if missing := self.why_missing():
            raise MissingExtraError(missing)

    def missing(self, error: ImportError) -> MissingExtraError:
        """Return the error for the library, which cannot be imported."""
        return MissingExtraError(self._missing_text([self.library], one_line(error)))

    def _missing_text(self, missing: Sequence[str], reason: str) -> str:
        return (
            f"loading this model needs {' and '.join(missing)} ({reason}): "
            f"{install_text(' '.join(missing), self.extra)}"
            f"{self.alternative if self.library in missing else ''}"
        )

    def type_name(self, model_type: str) -> str:
        """Return the library's name for a model type."""
        return model_type

    def _has_class(self, config: Mapping[str, Any]) -> bool:
        """Return whether the library, once imported, finds a class for a config."""
        try:
            self.import_class(config)
        except (MissingExtraError, TypeError, ValueError, KeyError):
            return False
        return True

    @abstractmethod
    def _utils(self) -> Any:
        """Import the library's `utils` module, or raise MissingExtraError."""

    @abstractmethod
    def _find_class(self, utils: Any, config: dict[str, Any]) -> Any:
        """Find the model's class by the library's function."""

    @abstractmethod
    def _build(self, utils: Any, config: dict[str, Any]) -> nn.Module:
        """Make an instance of the model's class."""

    @abstractmethod
    def _load_tokenizer(self, utils: Any, directory: Path, eos_ids: Any) -> Any:
        """Load the tokenizer or processor by the library's function."""


def _find(package: str) -> ModuleSpec | None:
    try:
        return find_spec(package)
    except (ImportError, ValueError):  # ValueError: a program made the module
        return None


def keep_pipeline_layers(model: nn.Module, group: Any) -> range:
    """Remove the layers that other ranks run, by the `pipeline` method of the model's class.

    mlx-lm's classes put None in place of earlier layers and end their list with this rank's last.

    Args:
        model: Changed in place.
        group: The `mx.distributed` group whose ranks run the model together.

    Returns:
        The numbers of this rank's layers.

    Raises:
        MissingPartError: The class has no `pipeline`, or there are more ranks than layers.
    """
    owner: Any = getattr(model, "model", None)
    if not hasattr(owner, "pipeline"):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        others = ["layers=range(first, last + 1), to call the layers yourself"]
        if hasattr(model, "shard"):
            others.append('parallel="tensor", which splits each layer')
        if kind.startswith("mlx_vlm."):
            others.append("force_text=True, as its text part may have a pipeline")
        raise MissingPartError(f"{kind} has no pipeline; alternatives: {'; '.join(others)}")
    try:
        owner.pipeline(group)
    except ValueError as error:
        raise MissingPartError(f"no pipeline over {group.size()} ranks: {error}") from error
    return range(owner.start_idx, owner.end_idx)
