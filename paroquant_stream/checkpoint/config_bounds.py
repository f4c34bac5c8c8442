"""The numbers of a model's settings, held against its tensors before a class is built by them.

A class makes what its config says before the first tensor is missed: ten million layers took 3.5 GB
and a minute. Which numbers those are was measured: every key of the classes for Llama, Qwen and
Gemma in mlx-lm and mlx-vlm, and of transformers' configs and tokenizers, set to a million and more.
Whatever else a config says is lazy in MLX, and shows when parameters and tensors are compared.
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

MOST_LAYERS = 2_000  # the deepest model that we know has 126; a layer takes 0.1 to 0.2 MB and 1 ms
MOST_SETTINGS = 2_000  # of a section; transformers takes quadratic time, 12 s for 100,000
MOST_SPECIAL = 10_000  # tokens; quadratic too, 8 s for 40,000. Gemma 3 adds 6,242 of all kinds
MOST_TOKENS = 1 << 20  # ids of a tokenizer; the largest vocabulary that we know has 262,144
_LAYERS = re.compile(r"(?!max_|.*topk)(.*_)?(layers?|blocks?|depths?|stages?)")
"""Counts of layers, and lists of their numbers: `num_hidden_layers`, `depth`, `n_layer`, ..."""
_PER_STAGE = re.compile(r"(.*_)?(depths|blocks|stages)")
"""Lists of counts, of which the sum counts."""
_PER_LAYER = re.compile(r".*(layer|block|pattern).*")
"""Lists, or words, with something for each layer: `layer_types`, `hybrid_override_pattern`."""
_WIDTHS = re.compile(
    r"(.*_)?(head_dim|hidden_size|d_model|n_embd|embed_dim|rotary_dim|rope_dim|experts?|labels)"
)
"""Loops, and tables that are computed at once, as wide as some dimension of some tensor."""
_SHARES = re.compile(r"(.*_)?(partial_rotary_factors?|rotary_pct|rotary_percent)")
"""Shares of a head's width, that rotary tables multiply it by."""
_TOKENS = re.compile(r"(.*_)?(extra_ids|offset|madeup_words)")
"""How many tokens a class of transformers makes up itself."""
_SPECIAL = re.compile(r"(extra|additional)_special_tokens")
"""Tokens of which transformers looks each up among all others."""


def check_config(config: Mapping[str, Any], tensors: Sequence[TensorSpec], label: str) -> None:
    """Hold a config's counts and widths against the tensors.

    Args:
        config: As it was parsed; sections such as `text_config` are looked into.
        tensors: All that are stored, with their shapes.
        label: The config's file, for the error.

    Raises:
        AssemblyError: A number is larger than the tensors allow; names the key, it and the bound.
    """
    layers = min(len(tensors), MOST_LAYERS)
    why = f"as the {len(tensors):,} stored tensors allow"
    if layers < len(tensors):
        why = "layers of any model that we know"
    widest = max((max(t.shape) for t in tensors if t.shape and 0 not in t.shape), default=0)
    for path, section in _sections(config):
        what = f"{label}: the number of settings{path}"
        _check(what, len(section), MOST_SETTINGS, "of any model that we know")
    for path, key, value in _settings(config, ""):
        if _LAYERS.fullmatch(key):
            _check(f"{label}: {path}", _largest(key, value), layers, why)
        if _PER_LAYER.fullmatch(key) and isinstance(value, (list, str)):
            _check(f"{label}: the length of {path}", len(value), max(layers, 64), why)
        if _WIDTHS.fullmatch(key):
            _check(f"{label}: {path}", _largest(key, value), widest, "as any stored tensor is wide")
        if _SHARES.fullmatch(key):
            _check(f"{label}: {path}", _largest(key, value), 1, "the whole of it")


def check_tokenizer(directory: Path) -> None:
    """Look for numbers in a tokenizer's settings by which its class would make tokens without end.

    Args:
        directory: The model directory.

    Raises:
        AssemblyError: It is more than any vocabulary has; names the key, the number and the bound.
        CheckpointError: The settings are too large or cannot be opened.
        MalformedFileError: They are no regular file.
        UnreadableFileError: The system cannot read them.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        try:
            settings = json.loads(read_linked(path, MAX_JSON))
        except (FileNotFoundError, ValueError, RecursionError):
            continue  # transformers says what it makes of that
        if type(settings) is dict:
            _check_tokenizer(settings, str(path))


def _check_tokenizer(settings: Mapping[str, Any], label: str) -> None:
    what = f"{label}: the number of settings"
    _check(what, len(settings), MOST_SETTINGS, "of any model that we know")
    for path, key, value in _settings(settings, ""):
        if _TOKENS.fullmatch(key):
            _check(f"{label}: {path}", _number(value), MOST_TOKENS, "words of any vocabulary")
        if _SPECIAL.fullmatch(key) and type(value) is list:
            what = f"{label}: the length of {path}"
            _check(what, len(value), MOST_SPECIAL, "special tokens of any model that we know")
    added = settings.get("added_tokens_decoder")
    for number in added if type(added) is dict else ():
        if number.isdigit():
            what = f"{label}: a number in added_tokens_decoder"
            _check(what, int(number[:20]), MOST_TOKENS, "words of any vocabulary")


def _check(what: str, value: float, bound: int, why: str) -> None:
    if value > bound:
        raise AssemblyError(
            f"{what} is {value:,}, more than the {bound:,} {why}; put the model's own file in its "
            "place"
        )


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config and those inside of it that transformers makes a config of."""
    yield "", config
    for key, value in config.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, Mapping):
            yield f" in {key}", value


def _settings(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, Any]]:
    """Path, key and value of each setting that is no section, in order."""
    waiting = [(section, prefix)]
    while waiting:  # no recursion: sections may be nested as deep as a parser goes
        section, prefix = waiting.pop()
        for key, value in section.items():
            inner = value if type(value) is list else [value]
            waiting += [(item, f"{prefix}{key}.") for item in inner if isinstance(item, Mapping)]
            if not isinstance(value, Mapping):
                yield f"{prefix}{key}", key, value


def _largest(key: str, value: Any) -> float:
    """The number that counts of a setting which may be a list of numbers."""
    numbers = [_number(item) for item in value] if type(value) is list else [_number(value)]
    return sum(numbers) if _PER_STAGE.fullmatch(key) else max(numbers, default=0)


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else 0
