"""COMMAND env: what a bug report needs: versions, system, MLX's device, cache, variables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..backends.device import describe_device
from ..errors import ParoquantStreamError
from ..maintenance.inventory import take_inventory
from ..store.store import cache_store
from ..text import bytes_text, shown
from ..version import __version__
from .arguments import CACHE_VARIABLES, add_cache_dir, add_help
from .common import run_command

DESCRIPTION = """\
Print what a bug report needs: versions, system, MLX's backend and device, the cache, and the
environment variables that matter. Tokens and passwords are hidden, and the home directory is
written ~. Works without MLX too; converts and changes nothing."""
EXAMPLES = ("paroquant-stream env", "paroquant-stream env --json")
PACKAGES = (
    "mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "mlx-vlm", "numpy",
    "safetensors", "huggingface_hub", "paroquant", "transformers", "filelock", "msgpack", "xxhash",
    "distributed",
)  # fmt: skip
_BACKENDS = re.compile("mlx-(metal|cpu|cuda-.*)")  # of which one is enough
_VARIABLES = re.compile(
    r"PAROQUANT_STREAM_\w+|HF_\w+|HUGGING\w+|MLX_\w+|(HTTPS?|NO|ALL)_PROXY|SSL_CERT_\w+|"
    r"REQUESTS_CA_BUNDLE|CUDA_VISIBLE_DEVICES|NO_COLOR|COLUMNS|TMPDIR",
    re.IGNORECASE,
)
_SECRET = re.compile("TOKEN|SECRET|PASS|KEY|AUTH|COOKIE|CREDENTIAL", re.IGNORECASE)
_HIDDEN = "(hidden)"


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_help(parser, EXAMPLES)
    add_cache_dir(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: versions, system, mlx, cache and variables",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser("paroquant-stream env", description=DESCRIPTION)
    configure_parser(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: _print(arguments), "nothing was changed")


def _print(arguments: argparse.Namespace) -> int:
    found = collect(arguments.cache_dir)
    if arguments.json:
        print(json.dumps(found))
        return 0
    for section, values in found.items():
        width = max((len(name) for name in values), default=0)
        print(f"{section}:")
        for name, value in values.items():
            print(shown(f"  {name:{width}}  {_text(name, value)}"))
        if not values:
            print("  none is set")
    return 0


def _text(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name in _BYTES:
        return bytes_text(value)
    return "-" if value is None else str(value)


_BYTES = ("memory", "size", "free", "memory_size", "max_recommended_working_set_size")
"""Names of the values that are bytes."""


def collect(cache_dir: str | None) -> dict[str, dict[str, Any]]:
    """Return what `env` prints, by section.

    Args:
        cache_dir: The cache; None for the user's.
    """
    return {
        "versions": _versions(),
        "system": _system(),
        "mlx": describe_device(),
        "cache": _cache(cache_dir),
        "variables": _variables(),
    }


def _versions() -> dict[str, str | None]:
    """Return the version of each package; None for one that is not installed."""
    found: dict[str, str | None] = {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "paroquant_stream": __version__,
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if not _BACKENDS.fullmatch(package):
                found[package] = None
    return found


def _system() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _cache(cache_dir: str | None) -> dict[str, Any]:
    """Return where the cache lies and its size; one that cannot be read has an error instead."""
    found: dict[str, Any] = {}
    try:
        store = cache_store(cache_dir)
        found |= {"path": _private(str(store.root)), "exists": store.root.exists()}
        inventory = take_inventory(store)
        found |= {"size": inventory.size, "models": len(inventory.models)}
        found |= {"entries": len(inventory.entries), "free": store.free_bytes()}
    except (ParoquantStreamError, OSError, RuntimeError) as error:
        found["error"] = _private(str(error))
    return found


def _variables() -> dict[str, str]:
    """Return the environment variables that matter, secrets hidden."""
    return {
        name: _HIDDEN if value and _SECRET.search(name) else _private(value)
        for name, value in sorted(os.environ.items())
        if name in CACHE_VARIABLES or _VARIABLES.fullmatch(name)
    }


def _private(text: str) -> str:
    """Hide tokens and passwords in a text, and the name of the home directory."""
    text = re.sub(r"\bhf_\w{8,}", _HIDDEN, text)
    text = re.sub(r"://[^/\s]*@", f"://{_HIDDEN}@", text)
    home = os.path.expanduser("~")
    return re.sub(rf"{re.escape(home)}(?![^/:;,\s])", "~", text) if len(home) > 1 else text
