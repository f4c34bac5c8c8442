"""Whether the installed library has a class for a model, told without importing it if it has."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .model_kind import TEXT_TYPES


def why_unknown(config: Mapping[str, Any], is_vlm: bool) -> str | None:
    """Say why a model cannot be loaded by what is installed here, and what to do; None if it can.

    Looks for the file of the model's class. Only where there is none is the library asked, which
    takes seconds: it knows some types by other names.
    """
    package, extra = ("mlx_vlm", "vlm") if is_vlm else ("mlx_lm", "lm")
    library, kind = package.replace("_", "-"), config.get("model_type")
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return f"{library} is not installed; to load it: pip install 'paroquant_stream[{extra}]'"
    name = str(kind if is_vlm else TEXT_TYPES.get(str(kind), kind))
    for directory in spec.submodule_search_locations or ():
        models = Path(directory, "models")
        with suppress(OSError):
            if (models / f"{name}.py").is_file() or (models / name / "__init__.py").is_file():
                return None
    from .backend import has_class  # brings the library

    if has_class({**config, "model_type": name}, is_vlm):
        return None
    try:
        installed = version(library)
    except PackageNotFoundError:
        installed = "(of unknown version)"
    return (
        f"{library} {installed} has no class for model_type {kind!r}, so it cannot be loaded here; "
        f"a newer one may have: pip install -U {library}"
    )
