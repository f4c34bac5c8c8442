"""Prints tokens per second of a model with the rotation's kernel and with its reference.

    python -m tests.benchmarks.micro.generation MODEL [--prompt 512] [--tokens 64] [--rounds 5]

MODEL is a model directory. Prompts are random tokens, so any vocabulary will do. Both forms run in
turn in one process on the default device; the figures are medians. It prints also how far the
logits of the prompt lie apart, and how many of the greedy tokens agree.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from paroquant_stream import load
from paroquant_stream.rotation import reference
from paroquant_stream.rotation.layers import build_tables, table_bytes


@contextmanager
def the_reference() -> Iterator[None]:
    """Layers rotate by the reference, whatever the device."""
    with mock.patch("paroquant_stream.rotation.kernels._kernel_for", return_value=reference):
        yield


def generate(
    model: nn.Module, prompt: mx.array, tokens: int
) -> tuple[float, float, mx.array, list[int]]:
    """Prompt tokens a second, generated ones a second, the prompt's last logits, greedy tokens."""
    cache = make_prompt_cache(model)
    start = time.perf_counter()
    logits = model(prompt[None], cache=cache)[0, -1]
    mx.eval(logits)
    prefill = len(prompt) / (time.perf_counter() - start)
    token, found = mx.argmax(logits), []
    start = time.perf_counter()
    for _ in range(tokens):
        following = mx.argmax(model(token[None, None], cache=cache)[0, -1])
        mx.async_eval(following)  # the next step is under way while this one's token is read
        found.append(int(token))
        token = following
    mx.eval(token)
    return prefill, tokens / (time.perf_counter() - start), logits, found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    start = time.perf_counter()
    model, _, _ = load(options.model)
    loaded = time.perf_counter() - start
    build_tables(model)
    vocabulary = model(mx.array([[0]])).shape[-1]
    prompt = mx.random.randint(0, vocabulary, (options.prompt,))
    rates: dict[str, list[tuple[float, float]]] = {"kernel": [], "reference": []}
    results = {}
    for number in range(options.rounds + 1):  # the first compiles kernels and does not count
        for name, figures in rates.items():
            forms = the_reference() if name == "reference" else mock.patch.dict({})
            with forms:
                prefill, decode, *results[name] = generate(model, prompt, options.tokens)
            if number:
                figures.append((prefill, decode))
    print(
        f"{mx.default_device()}: loaded in {loaded:.1f} s, {table_bytes(model) / 1e6:.1f} MB of "
        f"tables, peak memory {mx.get_peak_memory() / 1e9:.2f} GB"
    )
    for name, figures in rates.items():
        prefill, decode = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"{name:10} prefill {prefill:9.1f} tokens/s, decode {decode:7.1f} tokens/s")
    (logits, tokens), (correct, expected) = results["kernel"], results["reference"]
    apart = mx.linalg.norm((logits - correct).astype(mx.float32)) / mx.linalg.norm(
        correct.astype(mx.float32)
    )
    agree = sum(a == b for a, b in zip(tokens, expected, strict=True))
    print(f"logits apart {apart.item():.1e}; {agree} of {len(tokens)} greedy tokens the same")


if __name__ == "__main__":
    main()
