"""COMMAND cache: see what is converted, read it through, and remove it.

    store -> inventory -> freshness, prune -> listing, removal -> command

Looking at a cache reads manifests and stats, never weights; only `verify` reads everything.
"""

from ..cli.cache import main

__all__ = ["main"]
