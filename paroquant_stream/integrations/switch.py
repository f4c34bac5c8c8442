"""The switch: a file in site-packages by which every program of an interpreter can be changed.

    zz_paroquant_stream_switch.pth   one line, run by `site` at each start of the interpreter
    PAROQUANT_STREAM_INSTALL=1       without it in the environment, the line does nothing

The name comes last in the order of names in which .pth files are read: others may make the package
importable.

For programs whose command cannot be changed: services, launchers, wrappers.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, UnwritableFileError

VARIABLE = "PAROQUANT_STREAM_INSTALL"
JOBS, DTYPE, CACHE = "PAROQUANT_STREAM_JOBS", "PAROQUANT_STREAM_DTYPE", "PAROQUANT_STREAM_CACHE"
IO_BITS = "PAROQUANT_STREAM_IO_BITS"
VARIABLES = (VARIABLE, JOBS, DTYPE, IO_BITS, CACHE, "PYTHONPATH")
"""What `child_environment` may set."""
NAME = "zz_paroquant_stream_switch.pth"
LINE = (
    f"import os; os.environ.get({VARIABLE!r}) == '1' and "
    r'exec("try: import paroquant_stream.startup\nexcept ImportError: pass")' + "\n"
)
"""Without the package, as after `pip uninstall`, it does nothing."""
CHILDREN = Path(__file__).parent / "child_processes"


def entries() -> list[Path]:
    """List the files of the switch in this interpreter's environment."""
    return [path for path in (place / NAME for place in _site_directories()) if path.is_file()]


def turn_on() -> Path:
    """Write the file of the switch.

    Returns:
        Its path.

    Raises:
        MissingExtraError: Programs of this interpreter cannot import the package.
        UnwritableFileError: The file cannot be written.
    """
    _check_importable()
    path = _chosen_directory() / NAME
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(LINE)
        os.replace(temporary, path)
    except OSError as error:
        raise UnwritableFileError(f"{path}: {error.strerror}") from error
    return path


def turn_off() -> list[Path]:
    """Remove the files of the switch.

    Returns:
        The removed files.

    Raises:
        UnwritableFileError: One cannot be removed.
    """
    found = entries()
    for path in found:
        try:
            path.unlink()
        except OSError as error:
            raise UnwritableFileError(f"{path}: cannot be removed: {error.strerror}") from error
    return found


def options_from_environment() -> dict[str, Any]:
    """Return the options of `install` that the environment gives; `load` checks their values."""
    found: dict[str, Any] = {}
    for option, variable in (("jobs", JOBS), ("io_bits", IO_BITS)):
        if number := os.environ.get(variable):
            found[option] = int(number) if number.isdecimal() else number
    if dtype := os.environ.get(DTYPE):
        found["dtype"] = dtype
    return found


def child_environment(
    cache_dir: str | None, jobs: int | None, dtype: str, io_bits: int
) -> Mapping[str, str]:
    """Return the variables by which the Python processes that a program starts are changed too.

    Args:
        cache_dir: As for `load`.
        jobs: As for `load`.
        dtype: As for `load`.
        io_bits: As for `load`.
    """
    paths = [str(CHILDREN), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {
        VARIABLE: "1",
        DTYPE: dtype,
        IO_BITS: str(io_bits),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    if jobs is not None:
        found[JOBS] = str(jobs)
    if cache_dir is not None:
        found[CACHE] = os.path.abspath(cache_dir)  # a child may have another current directory
    return found


def _site_directories() -> list[Path]:
    """List the directories whose .pth files this interpreter reads, first that of pip."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    places += site.getsitepackages()
    if site.ENABLE_USER_SITE:
        places.append(site.getusersitepackages())
    return [Path(place) for place in dict.fromkeys(places)]


def _chosen_directory() -> Path:
    """Return the directory that the package is installed in, else where pip installs to."""
    places = _site_directories()
    home = Path(__file__).resolve().parents[2]
    return next((place for place in places if place.resolve() == home), places[0])


def _check_importable() -> None:
    """Import the package in a process that has neither this directory nor PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", VARIABLE)}
    command = [sys.executable, "-c", "import paroquant_stream.startup"]
    done = subprocess.run(
        command, cwd=os.sep, env=environment, capture_output=True, check=False, timeout=60
    )
    if done.returncode != 0:
        raise MissingExtraError(
            f"paroquant_stream is not installed for {sys.executable}, so its programs could not "
            f"import it: {sys.executable} -m pip install paroquant_stream"
        )
