"""The loaders of mlx-lm and mlx-vlm for ParoQuant models; for all others they stay as they are.

`load_model` is what builds a model, so it is what is replaced: each library's own `load` calls it,
and does the rest (tokenizer, adapters, `return_config`) as always. Of `load` only the download of a
Hub model is another one, as shards are converted while they arrive. mlx-lm's `sharded_load` would
cut rotated layers as if they had no rotation, so it is replaced whole.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..errors import AssemblyError
from .paroquant_models import Found, find_local, find_on_hub
from .replacement import Call

logger = logging.getLogger(__name__)
_Loader = Callable[..., tuple[Any, Any, bool]]
_from_hub: ContextVar[Found | None] = ContextVar("_from_hub", default=None)
"""The Hub model that a `load` further up on the stack asked for."""
_KNOWN = {
    *("strict", "trust_remote_code", "revision", "force_download", "get_model_classes"),
    *("model_path", "lazy", "model_config", "quantize_activations"),
    *("expert_cache_gb", "max_kv_size"),  # of mlx-vlm, for models with offloaded experts
}
"""Arguments of `load_model` that are followed, or mean nothing for a ParoQuant model. `strict`:
every load is. `trust_remote_code`: no code of a model is run."""


def load(call: Call) -> Any:
    """Call `load` of mlx-lm or mlx-vlm; a Hub model is not downloaded before.

    Args:
        call: Of `mlx_lm.utils.load` or `mlx_vlm.utils.load`.
    """
    options = call.arguments | call.more
    own = options.get("trust_remote_code") or options.get("force_download") or _modelscope()
    found = (
        None if own else find_on_hub(str(call.arguments["path_or_hf_repo"]), options["revision"])
    )
    if found is None:
        return call.forward()
    with _asked_for(found):
        return call.forward(path_or_hf_repo=str(found.directory))


def load_text_model(call: Call, loader: _Loader) -> Any:
    """Load the model and its config, as `mlx_lm.utils.load_model` does.

    Args:
        call: Of that function.
        loader: `paroquant_stream.load`, with the options of the installation.

    Raises:
        ValueError: Activations are to be quantized.
        ParoquantStreamError: As `paroquant_stream.load` raises.
    """
    found = _find(call)
    settings = dict(call.arguments.get("model_config") or {})
    if found is None or _has_own_classes(call):
        return call.forward()
    _check(call, settings)
    lazy, options = call.arguments["lazy"], {"model_config": settings, "tokenizer": False}
    model, _, _ = loader(found.name, lazy, True, **options, **found.options)
    return model, {**call.home.load_config(found.directory), **settings}


def load_vision_model(call: Call, loader: _Loader) -> Any:
    """Load the model as `mlx_vlm.utils.load_model` does.

    Args:
        call: Of that function.
        loader: As for `load_text_model`.

    Raises:
        AssemblyError: It is a text model.
        ValueError: Activations are to be quantized.
        ParoquantStreamError: As `paroquant_stream.load` raises.
    """
    found = _find(call)
    if found is None:
        return call.forward()
    _check(call, {})
    config = call.home.load_config(found.directory)
    lazy = call.arguments["lazy"]
    is_vlm = bool(config.get("vision_config"))
    if is_vlm:
        model, _, is_vlm = loader(found.name, lazy, False, tokenizer=False, **found.options)
    if not is_vlm:
        raise AssemblyError(
            f"{found.name}: a text model, which mlx-vlm cannot load: use mlx_lm, whose commands "
            "have the same names, or paroquant_stream.load()"
        )
    if hasattr(call.home, "apply_generation_config_defaults"):
        call.home.apply_generation_config_defaults(model.config, config)
    model.model_path = found.directory
    return model


def load_sharded(call: Call, loader: _Loader) -> Any:
    """Load this rank's part of a model, as `mlx_lm.utils.sharded_load` does.

    Args:
        call: Of that function.
        loader: As for `load_text_model`.

    Raises:
        ParoquantStreamError: As `paroquant_stream.load` raises.
    """
    repo, home = call.arguments["repo"], call.home
    found = find_local(repo) or (None if _modelscope() else find_on_hub(str(repo), None))
    if found is None:
        return call.forward()
    pipeline, tensor = call.arguments["pipeline_group"], call.arguments["tensor_group"]
    parallel = "tensor" if pipeline is None else "pipeline"
    group = tensor if pipeline is None else pipeline
    if group is None:
        group = home.mx.distributed.init()
    how = {"group": group, "parallel": parallel, "tokenizer": False}
    model, _, _ = loader(found.name, False, True, **how, **found.options)
    config = home.load_config(found.directory)
    tokenizer = home.load_tokenizer(
        found.directory,
        call.arguments.get("tokenizer_config"),
        eos_token_ids=config.get("eos_token_id"),
    )
    return (model, tokenizer, config) if call.arguments["return_config"] else (model, tokenizer)


@contextmanager
def _asked_for(found: Found) -> Iterator[None]:
    token = _from_hub.set(found)
    try:
        yield
    finally:
        _from_hub.reset(token)


def _find(call: Call) -> Found | None:
    path = Path(call.arguments["model_path"])
    asked = _from_hub.get()
    return asked if asked is not None and asked.directory == path else find_local(path)


def _has_own_classes(call: Call) -> bool:
    """Return whether the program chooses the model's class itself."""
    return call.arguments.get("get_model_classes") is not getattr(call.home, "_get_classes", None)


def _check(call: Call, settings: dict[str, Any]) -> None:
    """Raise or warn for options that cannot be followed."""
    options = call.arguments | call.more
    if settings.get("quantize_activations") or options.get("quantize_activations"):
        raise ValueError("quantize_activations: a ParoQuant model has no such quantization")
    for name in sorted(set(options) - _KNOWN):
        if name in call.passed.arguments or name in call.more:
            logger.warning("%s: no effect on a ParoQuant model", name)


def _modelscope() -> bool:
    """Return whether mlx-lm downloads from another hub."""
    return os.environ.get("MLXLM_USE_MODELSCOPE", "").lower() == "true"
