"""The source of a GPU kernel as C++: compiled with g++, and every thread of a launch run.

A Metal kernel is also checked for what Metal refuses. The body of a CUDA kernel runs in MLX's Metal
wrapper, see emulated_cuda.h: nothing that the CUDA compiler would refuse is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from paroquant_stream.rotation import cuda
from tests.helpers.kernel_source import Launch, Rotate, array_of, cuda_launch_of, parameters_of
from tests.helpers.rotations import (
    BOUNDS,
    error,
    make_rotation,
    make_x,
    rotate_float64,
    tables_of,
    to_float64,
)

THREADGROUP_BYTES = 32 << 10  # "Metal feature set tables": every Apple GPU
BLOCK_BYTES = 48 << 10  # the CUDA programming guide: static shared memory
SPACES = ("device", "constant", "thread", "threadgroup")
BITS = {mx.float16: np.float16, mx.bfloat16: np.uint16, mx.float32: np.float32}
_FLAGS = ("-I", str(Path(__file__).parent), "-fsingle-precision-constant", "-Wno-attributes")
_ALIGNED = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
_POINTER = re.compile(r"^\s*((?:const\s+)*)(\w+)\s*[*&]\s*\w+\s*[=;,)]")


class RefusedError(Exception):
    """A kernel that Metal would refuse, or whose threads do not keep together."""


class Program:
    """The kernels of some launches as one program."""

    def __init__(self, launches: Sequence[Launch], folder: Path) -> None:
        """Compile them.

        Raises:
            RefusedError: Metal would refuse one.
        """
        self.launches = launches
        self._sources = list(dict.fromkeys(launch.source for launch in launches))
        self._binary = folder / "program"
        of_cuda = any("emulated_cuda.h" in source for source in self._sources)
        for source in () if of_cuda else self._sources:
            check_pointers(source)
        self.most_in_a_bank = 0
        """Words that the lanes of a CUDA kernel asked of one bank at once, in the last run."""
        options = ["-std=c++20", "-O1", "-ffp-contract=off", "-o", str(self._binary)]
        compile_cpp(program_text(self._sources), *options, *(_ALIGNED if of_cuda else ()))
        check_shared_memory(self._binary, BLOCK_BYTES if of_cuda else THREADGROUP_BYTES)

    def run(self, launch: Launch, order: int = 0, after: int = 0) -> mx.array:
        """Run a launch and return its output.

        Args:
            launch: One of those that were compiled.
            order: Of the threads between two barriers: upwards for 0, downwards for 1, or shuffled.
            after: How many bytes follow `x`, which then begins at no multiple of more.

        Raises:
            RefusedError: Threads did not keep together, or one left its buffers.
        """
        out = np.empty(launch.shape, BITS[launch.dtype])
        size = map(min, zip(launch.threadgroup, launch.grid, strict=True))  # MLX's dispatch
        buffers = launch.buffers
        kernel = self._sources.index(launch.source)
        numbers = [kernel, order, *launch.grid, *size, len(buffers) + 1]
        numbers += [*(buffer.nbytes for buffer in buffers), out.nbytes]
        numbers.insert(9, after)
        request = np.array(numbers, np.uint32).tobytes() + b"".join(b.tobytes() for b in buffers)
        done = subprocess.run([self._binary], input=request, capture_output=True)
        if done.returncode:
            raise RefusedError(done.stderr.decode() or f"signal {-done.returncode}")
        self.most_in_a_bank = int(done.stderr)
        return array_of(np.frombuffer(done.stdout, out.dtype).reshape(out.shape), launch.dtype)


def noticed(
    program: Program, launch: Launch, expected: np.ndarray, after: int = 0, banks: int = 32
) -> bool:
    """Return whether a launch stops, is off, or depends on the order of its threads.

    Args:
        program: What runs it.
        launch: The launch.
        expected: Its results in float64.
        after: Bytes that follow `x`.
        banks: How many words lanes may ask of one bank at once.
    """
    for order in (0, 1, 2):
        try:
            y = program.run(launch, order, after)
        except RefusedError:
            return True
        if not error(y, expected) < BOUNDS[launch.dtype] or program.most_in_a_bank > banks:
            return True
    return False


def random_launch(
    group_size: int,
    krot: int,
    rows: int,
    dtype: mx.Dtype,
    source: str | None = None,
    rotate: Rotate = cuda.rotate,
) -> tuple[Launch, np.ndarray]:
    """Return what a function of `cuda` launches for random rows, and its results in float64."""
    dims = 3 * group_size
    parameters = make_rotation(dims, group_size, krot, seed=krot)
    x = make_x((rows, dims), dtype, seed=2)
    expected = rotate_float64(to_float64(x), *parameters, group_size)
    return cuda_launch_of(x, tables_of(parameters, group_size), source, rotate), expected


def program_text(sources: Sequence[str]) -> str:
    """All kernels, each in a namespace, and how each is called for one thread."""
    parts = ['#include "emulated_metal.h"']
    for n, source in enumerate(sources):
        name = re.findall(r"decltype\((.*)\)", source)[-1]
        arguments = [
            f"one.{p.name}" if p.buffer is None else f"({p.kind}{p.pointer})buffers[{p.buffer}]"
            for p in parameters_of(source)
        ]
        parts += [
            f"namespace kernel_{n} {{\n{source}\n}}",
            f"void call_{n}(const emulation::Buffers& buffers, const emulation::Thread& one) {{",
            f"  kernel_{n}::{name}({', '.join(arguments)});\n}}",
        ]
    calls = ", ".join(f"call_{n}" for n in range(len(sources)))
    parts += [f"const emulation::Kernel emulation::kernels[] = {{{calls}}};"]
    parts += ["int main() { return emulation::serve(); }"]
    return "\n".join(parts)


def check(sources: Sequence[str]) -> None:
    """Compile sources once for each address space, in the C++ that Metal 3 is based on.

    Raises:
        RefusedError: Metal would refuse one.
    """
    text = '#include "emulated_metal.h"\n'
    for n, source in enumerate(sources):
        check_pointers(source)
        text += f"namespace kernel_{n} {{\n{source}\n}}\n"
    for space in SPACES:
        compile_cpp(text, "-std=c++14", "-pedantic-errors", "-fsyntax-only", f"-DCHECK_{space}")


def check_pointers(source: str) -> None:
    """Raise RefusedError for a pointer or reference without an address space."""
    for line in source.splitlines():
        found = _POINTER.match(line)
        if found and found[2] not in (*SPACES, "return"):
            raise RefusedError(f"a pointer without an address space: {line.strip()}")
        if re.search(r"\bthreadgroup\s+\w+\s*[*&]", line):
            raise RefusedError(f"a pointer to threadgroup memory is not emulated: {line.strip()}")


def check_shared_memory(binary: Path, limit: int) -> None:
    """Raise RefusedError for a kernel whose threadgroup arrays take more than a limit."""
    symbols = subprocess.run(["nm", "-S", "-C", str(binary)], capture_output=True, text=True)
    sizes: dict[str, int] = {}
    for line in symbols.stdout.splitlines():
        found = re.match(r"\w+ (\w+) \w (?:void )?(kernel_\d+::\w+<.*)::\w+$", line)
        if found:
            sizes[found[2]] = sizes.get(found[2], 0) + int(found[1], 16)
    assert sizes, "no threadgroup array was found"
    for name, size in sizes.items():
        if size > limit:
            raise RefusedError(f"{size:,} bytes of threadgroup memory, at most {limit:,}: {name}")


def compile_cpp(text: str, *options: str) -> None:
    """Compile C++ with g++; skip where there is none.

    Raises:
        RefusedError: It does not compile.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++, which stands for the Metal compiler")
    command = [compiler, *_FLAGS, *options, "-x", "c++", "-"]
    plain = {**os.environ, "LC_ALL": "C"}  # its messages in English and ASCII
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=plain)
    if done.returncode:
        raise RefusedError(done.stderr)
