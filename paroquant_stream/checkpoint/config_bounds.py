"""Bounds for the numbers in a config and in tokenizer settings, which are untrusted input.

A model class allocates what its config asks for before any missing tensor is noticed, so counts and
widths are compared with the stored tensors first. The checked keys are those that cost time or
memory when set to a million in the classes of mlx-lm, mlx-vlm and transformers for Llama, Qwen and
Gemma. All other sizes are lazy in MLX and are found when parameters and tensors are compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AssemblyError
from ..files.tensor_header import TensorSpec
from .model_files import MAX_JSON, read_linked

MAX_LAYERS = 2_000  # the deepest known model has 126
MAX_SETTINGS = 2_000  # in one section; transformers takes quadratic time
MAX_SPECIAL_TOKENS = 10_000  # transformers takes quadratic time; Gemma 3 adds 6,242 tokens
MAX_TOKENS = 1 << 20  # ids of a tokenizer; the largest known vocabulary has 262,144
_LAYERS = re.compile(r"(?!max_|.*topk)(.*_)?(layers?|blocks?|depths?|stages?)")
"""Counts of layers and lists of layer numbers: `num_hidden_layers`, `depth`, `n_layer`, ..."""
_PER_STAGE = re.compile(r"(.*_)?(depths|blocks|stages)")
"""Lists of counts, whose sum is bounded."""
_PER_LAYER = re.compile(r".*(layer|block|pattern).*")
"""Lists or strings with one item per layer: `layer_types`, `hybrid_override_pattern`."""
_WIDTHS = re.compile(
    r"(.*_)?(head_dim|hidden_size|d_model|n_embd|embed_dim|rotary_dim|rope_dim|experts?|labels)"
)
"""Widths of tables that a class computes eagerly, or lengths of loops."""
_FRACTIONS = re.compile(r"(.*_)?(partial_rotary_factors?|rotary_pct|rotary_percent)")
"""Fractions of a head's width."""
_TOKENS = re.compile(r"(.*_)?(extra_ids|offset|madeup_words)")
"""Counts of tokens that a tokenizer class of transformers generates."""
_SPECIAL = re.compile(r"(extra|additional)_special_tokens")
"""Lists of tokens, each of which transformers looks up among all others."""


def check_config(config: Mapping[str, Any], tensors: Sequence[TensorSpec], label: str) -> None:
    """Check a config's counts and widths against the stored tensors.

    Args:
        config: The parsed config; sections such as `text_config` are checked too.
        tensors: All stored tensors, with their shapes.
        label: The config's file name, for the error.

    Raises:
        AssemblyError: A number exceeds its bound; names the key, the number and the bound.
    """
    layers = min(len(tensors), MAX_LAYERS)
    why = f"that the {len(tensors):,} stored tensors allow"
    if layers < len(tensors):
        why = "layers of any known model"
    widest = max((max(t.shape) for t in tensors if t.shape and 0 not in t.shape), default=0)
    for path, section in _sections(config):
        what = f"{label}: the number of settings{path}"
        _check(what, len(section), MAX_SETTINGS, "of any known model")
    for path, key, value in _settings(config, ""):
        if _LAYERS.fullmatch(key):
            _check(f"{label}: {path}", _largest(key, value), layers, why)
        if _PER_LAYER.fullmatch(key) and isinstance(value, (list, str)):
            _check(f"{label}: the length of {path}", len(value), max(layers, 64), why)
        if _WIDTHS.fullmatch(key):
            why_wide = "of the widest stored tensor"
            _check(f"{label}: {path}", _largest(key, value), widest, why_wide)
        if _FRACTIONS.fullmatch(key):
            _check(f"{label}: {path}", _largest(key, value), 1, "of a whole head")


def check_tokenizer(directory: Path) -> None:
    """Check the numbers of tokens in a tokenizer's settings against the largest vocabularies.

    Args:
        directory: The model directory.

    Raises:
        AssemblyError: A number exceeds its bound; names the key, the number and the bound.
        CheckpointError: A settings file is too large or cannot be opened.
        MalformedFileError: A settings file is not a regular file.
        UnreadableFileError: The system cannot read a settings file.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        try:
            settings = json.loads(read_linked(path, MAX_JSON))
        except (FileNotFoundError, ValueError, RecursionError):
            continue  # transformers reports it
        if type(settings) is dict:
            _check_tokenizer(settings, str(path))


def _check_tokenizer(settings: Mapping[str, Any], label: str) -> None:
    what = f"{label}: the number of settings"
    _check(what, len(settings), MAX_SETTINGS, "of any known model")
    for path, key, value in _settings(settings, ""):
        if _TOKENS.fullmatch(key):
            _check(f"{label}: {path}", _number(value), MAX_TOKENS, "tokens of any vocabulary")
        if _SPECIAL.fullmatch(key) and type(value) is list:
            what = f"{label}: the length of {path}"
            _check(what, len(value), MAX_SPECIAL_TOKENS, "special tokens of any known model")
    added = settings.get("added_tokens_decoder")
    for number in added if type(added) is dict else ():
        if number.isdigit():
            what = f"{label}: a number in added_tokens_decoder"
            _check(what, int(number[:20]), MAX_TOKENS, "tokens of any vocabulary")


def _check(what: str, value: float, bound: int, why: str) -> None:
    if value > bound:
        raise AssemblyError(
            f"{what} is {value:,}, more than the {bound:,} {why}; restore the model's original file"
        )


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the config and each section of which transformers makes a config."""
    yield "", config
    for key, value in config.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, Mapping):
            yield f" in {key}", value


def _settings(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, Any]]:
    """Yield path, key and value of each setting that is not a section."""
    pending = [(section, prefix)]
    while pending:  # no recursion: the nesting is as deep as the parser allows
        section, prefix = pending.pop()
        for key, value in section.items():
            inner = value if type(value) is list else [value]
            pending += [(item, f"{prefix}{key}.") for item in inner if isinstance(item, Mapping)]
            if not isinstance(value, Mapping):
                yield f"{prefix}{key}", key, value


def _largest(key: str, value: Any) -> float:
    """Return the largest number of a setting, or the sum of a list of counts."""
    numbers = [_number(item) for item in value] if type(value) is list else [_number(value)]
    return sum(numbers) if _PER_STAGE.fullmatch(key) else max(numbers, default=0)


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else 0
