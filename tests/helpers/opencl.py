"""The address spaces of a Metal kernel, checked by clang as OpenCL C++; only where it is installed.

Metal's address spaces are those of OpenCL by other names, and clang is the compiler of both. The
package libclang brings it; nothing is run.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_HEADER = Path(__file__).with_name("opencl.h")


def errors_of(source: str) -> list[str]:
    """Return what clang finds wrong in a kernel as MLX generates it, in one instance."""
    cindex = pytest.importorskip("clang.cindex", reason="needs libclang")
    options = ["-x", "cl", "-cl-std=CLC++2021", "-target", "spir64", "-cl-no-stdinc", "-w"]
    file = ("kernel.cl", _HEADER.read_text() + instance_of(source))
    unit = cindex.Index.create().parse("kernel.cl", args=options, unsaved_files=[file])
    return [
        found.spelling for found in unit.diagnostics if found.severity >= cindex.Diagnostic.Error
    ]


def instance_of(source: str) -> str:
    """Return the kernel with its template's arguments as constants, as OpenCL has none."""
    start = source.index("template <typename T")
    helpers, kernel = source[:start], source[start:]
    names = [part.split()[-1] for part in kernel[10 : kernel.index(">")].split(",")]
    values = re.findall(r"decltype\(\w+<(.*?)>\)", source)[-1].split(", ")
    constants = [f"typedef {values[0]} {names[0]};"]
    constants += [
        f"constexpr __constant int {name} = {value};"
        for name, value in zip(names[1:], values[1:], strict=True)
    ]
    body = kernel[kernel.index("[[kernel]]") : kernel.index("\ntemplate [[host_name")]
    body = re.sub(r" \[\[[^\]]*\]\]", "", body).replace("[[kernel]]", "__kernel")
    return "\n".join([helpers, *constants, body])
