"""Prints tokens per second of a model by the form of its rotations, on an NVIDIA GPU.

    python -m tests.benchmarks.nvidia.model MODEL [--cache-dir DIR] [--export DIR]
        [--prompt 512] [--tokens 64] [--rounds 5] [--forms kernel few gathers none]

kernel    the CUDA kernels
few       the kernel for few rows, for all
gathers   the reference in plain MLX
none      no rotation: what the rest of the model takes; its answers are nonsense
export    a self-contained export of MODEL, by stock mlx-lm; both must fit the GPU's memory
alone     the same without MODEL: give its directory as MODEL and --alone

Prompts are random tokens. All forms run in turn in one process; the figures are medians. A round of
a 70B takes a minute where `gathers` is among the forms.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

from paroquant_stream import load
from paroquant_stream.rotation.layers import build_tables, table_bytes
from tests.benchmarks.micro.generation import generate, the_reference

SUITS = "paroquant_stream.rotation.cuda.suits_many_rows"
FORMS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "kernel": contextlib.nullcontext,
    "few": lambda: mock.patch(SUITS, lambda *_: False),  # noqa: PT008
    "gathers": the_reference,
    "none": lambda: mock.patch("paroquant_stream.rotation.kernels.rotate", lambda x, _: x),
}


def stock(directory: str) -> nn.Module:
    """The model of a self-contained export, as mlx-lm loads it."""
    model, _ = load_model(Path(directory), trust_remote_code=True)
    return model


def loaded(options: argparse.Namespace) -> dict[str, tuple[nn.Module, str]]:
    """Model and form of each row of the table."""
    if options.alone:
        return {"alone": (stock(options.model), "kernel")}
    model, _, _ = load(options.model, cache_dir=options.cache_dir)
    build_tables(model)
    found = {form: (model, form) for form in options.forms}
    if options.export:
        found["export"] = (stock(options.export), "kernel")
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--cache-dir")
    parser.add_argument("--export")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    start = time.perf_counter()
    rows = loaded(options)
    seconds = time.perf_counter() - start
    first = next(iter(rows.values()))[0]
    vocabulary = first(mx.array([[0]])).shape[-1]
    prompt = mx.random.randint(0, vocabulary, (options.prompt,))
    mx.eval(prompt)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    answers: dict[str, tuple[mx.array, list[int]]] = {}
    for number in range(options.rounds + 1):  # the first compiles kernels and does not count
        for name, (model, form) in rows.items():
            with FORMS[form]():
                prefill, decode, *answer = generate(model, prompt, options.tokens)
            answers[name] = (answer[0], answer[1])
            if number:
                rates[name].append((prefill, decode))
        print(f"round {number} of {options.rounds}", flush=True)
    device = mx.device_info().get("device_name", mx.default_device())
    print(
        f"{device}, MLX {mx.__version__}: loaded in {seconds:.0f} s, {table_bytes(first) / 1e6:.0f}"
        f" MB of tables, peak memory {mx.get_peak_memory() / 1e9:.1f} GB"
    )
    print(f"| rotations | prompt of {options.prompt}, tokens/s | generated, tokens/s | tokens as |")
    print("|---|---|---|---|")
    best = answers.get("kernel", next(iter(answers.values())))
    for name, figures in rates.items():
        prefill, decode = (statistics.median(column) for column in zip(*figures, strict=True))
        same = sum(a == b for a, b in zip(answers[name][1], best[1], strict=True))
        print(f"| {name} | {prefill:.0f} | {decode:.2f} | {same} of {options.tokens} |")


if __name__ == "__main__":
    main()
