"""Imported by every Python process that a program under `run` starts, as PYTHONPATH leads here.

Python imports a module of this name at each start. One that the environment has of its own is
imported after this. An interpreter without paroquant_stream goes on unchanged.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _import_next() -> None:
    """Import the `sitecustomize` that this one hides, if there is one."""
    own = sys.modules.pop("sitecustomize", None)
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != _HERE]
    try:
        import sitecustomize  # type: ignore[import-not-found] # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
        if own is not None:
            sys.modules["sitecustomize"] = own


def _start() -> None:
    if os.environ.get("PAROQUANT_STREAM_INSTALL") == "1":
        try:
            import paroquant_stream.startup  # noqa: F401
        except (ImportError, SyntaxError):  # another interpreter, perhaps an old one
            return


_start()
_import_next()
