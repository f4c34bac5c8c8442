"""Safetensors files with headers as given, most of them to be refused."""

from __future__ import annotations

import json
from pathlib import Path


def file_of(
    path: Path, header: bytes | dict, data: bytes = bytes(8), length: int | None = None
) -> Path:
    """A file with this header, as JSON or verbatim."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(dtype="F32", shape=(2,), offsets=(0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def two(first: dict, second: dict) -> dict:
    return {"a": first, "b": second}


REFUSED = {
    "empty file": (b"", b""),
    "hole between tensors": (two(tensor(), tensor(offsets=(12, 20))), bytes(20)),
    "overlap": (two(tensor(), tensor(offsets=(4, 12))), bytes(12)),
    "two names on one range": (two(tensor(), tensor()), bytes(8)),
    "trailing bytes": ({"a": tensor()}, bytes(9)),
    "data cut short": ({"a": tensor()}, bytes(7)),
    "range larger than the shape": ({"a": tensor(shape=(1,))}, bytes(8)),
    "negative dimension": ({"a": tensor(shape=(-2,))}, bytes(8)),
    "two negative dimensions": ({"a": tensor(shape=(-1, -2))}, bytes(8)),
    "product is 2**64": ({"a": tensor("U8", (65536,) * 4, (0, 0))}, b""),
    "product is 1 mod 2**64": ({"a": tensor("U8", (998724481, 1119412321, 33), (0, 1))}, b"\0"),
    "dimension over int32": ({"a": tensor("U8", (2**32 + 4,), (0, 4))}, bytes(4)),
    "float dimension": (b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', bytes(8)),
    "boolean dimension": (b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', bytes(1)),
    "float offsets": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0.0,8.0]}}', bytes(8)),
    "negative offset": ({"a": tensor(offsets=(-8, 0))}, bytes(8)),
    "one offset": ({"a": tensor(offsets=(0,))}, bytes(8)),
    "offsets near 2**64": ({"a": tensor(offsets=(2**64 - 8, 2**64))}, bytes(8)),
    "huge integer": (b'{"a":{"dtype":"U8","shape":[1' + b"0" * 30 + b'],"data_offsets":[0,1]}}',
                     b"\0"),
    "duplicate name": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                       b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
    "duplicate field": (b'{"a":{"dtype":"U8","shape":[2],"shape":[1],"data_offsets":[0,1]}}',
                        bytes(1)),
    "unknown field": ({"a": tensor(extra=1)}, bytes(8)),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "unknown dtype": ({"a": tensor("F31")}, bytes(8)),
    "double precision": ({"a": tensor("F64", (1,))}, bytes(8)),
    "eight-bit float": ({"a": tensor("F8_E4M3", (8,))}, bytes(8)),
    "dtype no string": ({"a": tensor(dtype=3)}, bytes(8)),
    "rank 10,000": ({"a": tensor(shape=(1,) * 10_000, offsets=(0, 4))}, bytes(4)),
    "zero size with huge rest": ({"a": tensor(shape=(0, 2**31 - 1, 2**31 - 1), offsets=(0, 0))},
                                 b""),
    "list for header": (b"[1, 2, 3]", b""),
    "bytes after the JSON": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}x', bytes(1)),
    "NUL padding": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}\0\0', bytes(1)),
    "byte order mark": (b"\xef\xbb\xbf{}", b""),
    "leading space": (b' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
    "invalid UTF-8": (b'{"\xff":1}', b""),
    "NaN": (b'{"a":NaN}', b""),
    "100,000 brackets": (b'{"a":' + b"[" * 100_000, b""),
    "metadata a list": ({"__metadata__": [], "a": tensor()} | {"__metadata__": [1]}, bytes(8)),
    "metadata with a number": ({"__metadata__": {"a": 1}}, b""),
    "empty name": ({"": tensor()}, bytes(8)),
    "path for a name": ({"../../etc/passwd": tensor()}, bytes(8)),
    "dunder in a name": ({"__class__.x": tensor()}, bytes(8)),
    "layer thirty million": ({"layers.30000000.w": tensor()}, bytes(8)),
    "empty part of a name": ({"a..b": tensor()}, bytes(8)),
    "a name of 10 kB": ({"a" * 10_000: tensor()}, bytes(8)),
    "1,000 dots": ({".".join("a" * 1000): tensor()}, bytes(8)),
    "newline in a name": ({"a\nb": tensor()}, bytes(8)),
    "newline after a name": ({"a\n": tensor()}, bytes(8)),
}  # fmt: skip
