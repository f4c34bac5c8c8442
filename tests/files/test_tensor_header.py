"""Headers of safetensors files: which are accepted and which are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load, save

from paroquant_stream.errors import MalformedFileError
from paroquant_stream.files import tensor_header
from paroquant_stream.files.descriptor import closing, open_regular
from paroquant_stream.files.tensor_header import (
    MAX_HEADER,
    MAX_TENSORS,
    TensorInfo,
    TensorSpec,
    check_name,
    parse_header,
    read_header,
    read_header_bytes,
)
from tests.helpers.tensor_files import REFUSED, file_of, tensor


def read(path: Path):
    with closing(open_regular(path)) as fd:
        return read_header(fd, path.name)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, tmp_path):
    header, data = REFUSED[case]
    path = tmp_path / "x.safetensors"
    if case == "empty file":
        path.write_bytes(b"")
    else:
        file_of(path, header, data)
    with pytest.raises(MalformedFileError, match=r"x\.safetensors"):
        read(path)


@pytest.mark.parametrize("length", [0, 1, 1000, 2**63, 2**64 - 8])
def test_refuses_a_header_length_of(length, tmp_path):
    with pytest.raises(MalformedFileError, match="header length"):
        read(file_of(tmp_path / "x", {"a": tensor()}, length=length))


def test_names_a_git_lfs_pointer(tmp_path):
    (tmp_path / "x").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(MalformedFileError, match="git lfs pull"):
        read(tmp_path / "x")


@pytest.mark.parametrize(
    "metadata", [{}, {"__metadata__": None}, {"__metadata__": {"format": "pt"}}]
)
def test_accepts_what_safetensors_writes_or_allows(metadata, tmp_path):
    header = {
        **metadata,
        "a.b": tensor(),
        "c": tensor("U8", (), (8, 9)),
        "d": tensor("F16", (0, 3), (9, 9)),
    }
    path = file_of(tmp_path / "x", header, bytes(9))
    assert [t.name for t in read(path).tensors] == ["a.b", "c", "d"]
    assert set(load(path.read_bytes())) == {"a.b", "c", "d"}


def test_ranges_are_absolute(tmp_path):
    data = save({"x": np.arange(3, dtype=np.int32)})
    (tmp_path / "x").write_bytes(data)
    (found,) = read(tmp_path / "x").tensors
    assert data[found.start : found.stop] == np.arange(3, dtype=np.int32).tobytes()


def test_only_these_cases_are_stricter_than_safetensors(tmp_path):
    stricter = set()
    for case, (header, data) in REFUSED.items():
        if case == "empty file":
            continue
        path = file_of(tmp_path / "x", header, data)
        try:
            load(path.read_bytes())
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            continue
        stricter.add(case)
    assert stricter <= {
        "duplicate name", "unknown field", "double precision", "leading space", "empty name",
        "path for a name", "dunder in a name", "layer thirty million", "empty part of a name",
        "a name of 10 kB", "1,000 dots", "newline in a name", "newline after a name", "rank 10,000",
        "zero size with huge rest",
    }  # fmt: skip


def header_of(text: bytes, size: int | None = None):
    """Parse a header that lies in memory."""
    data = len(text).to_bytes(8, "little") + text
    return parse_header(lambda at, n: data[at : at + n], size or len(data), "x")


def test_a_header_can_be_read_by_any_function():
    text = json.dumps({"a": tensor("U8", (3,), (0, 3))}).encode()
    header = header_of(text, 8 + len(text) + 3)
    start = 8 + len(text)
    assert header.tensors == (TensorInfo("a", "U8", (3,), start, start + 3),)


def test_a_header_is_hashed_with_its_length_and_padding(tmp_path):
    path = tmp_path / "x"
    text = json.dumps({"a": tensor("U8", (3,), (0, 3))}).encode() + b"  "
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"abc")
    with closing(open_regular(path)) as fd:
        found = read_header_bytes(fd, "x")
        assert found == path.read_bytes()[:-3]
        assert read_header(fd, "x").sha256 == hashlib.sha256(found).digest()


def test_the_bytes_of_a_header_over_the_limit_are_not_read(tmp_path):
    path = tmp_path / "x"
    path.write_bytes((MAX_HEADER + 1).to_bytes(8, "little"))
    with (
        closing(open_regular(path)) as fd,
        pytest.raises(MalformedFileError, match="header length of 33,554,433"),
    ):
        read_header_bytes(fd, "x")


def test_the_shortest_header_is_that_of_no_tensors():
    assert header_of(b"{}").tensors == ()
    with pytest.raises(MalformedFileError, match="found 9 bytes"):
        parse_header(lambda *_: b"", 9, "x")


def test_a_header_that_a_server_cuts_short_is_refused():
    data = (100).to_bytes(8, "little") + b"{}"
    with pytest.raises(MalformedFileError, match="ends inside its header"):
        parse_header(lambda at, n: data[at : at + n], 1000, "x")


def test_a_header_over_the_limit_is_not_read():
    lengths = []

    def read(_at, length):
        lengths.append(length)
        return (MAX_HEADER + 1).to_bytes(8, "little")

    with pytest.raises(MalformedFileError, match="header length of 33,554,433"):
        parse_header(read, 1 << 40, "x")
    assert max(lengths) <= 40


def test_the_most_tensors_are_accepted_and_one_more_is_refused(monkeypatch):
    monkeypatch.setattr(tensor_header, "MAX_TENSORS", 10)

    def table(count: int) -> bytes:
        names = (f'"t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
        return ("{" + ",".join(names) + "}").encode()

    assert len(header_of(table(10)).tensors) == 10
    with pytest.raises(MalformedFileError, match="11 tensors, over the limit"):
        header_of(table(11))


def test_too_many_keys_are_refused_before_they_are_parsed(monkeypatch):
    monkeypatch.setattr(tensor_header, "strict_json", lambda *_: pytest.fail("it was parsed"))
    with pytest.raises(MalformedFileError, match="over the limit of 100,000 tensors"):
        header_of(b"{" + b'"":' * (4 * MAX_TENSORS + 1001))


@pytest.mark.parametrize(
    ("shape", "refused"),
    [((2**31 - 1,), None), ((2**31,), "bad dimension"), ((1,) * 9, "at most 8 dimensions"),
     ((0, 2**24, 2**24), None), ((0, 2**24, 2**24 + 1), "over 2[*][*]48 elements")],
)  # fmt: skip
def test_limits_of_a_shape(shape, refused):
    size = 0 if 0 in shape else shape[0]
    text = json.dumps({"a": tensor("U8", shape, (0, size))}).encode()
    if refused is None:
        assert header_of(text, 8 + len(text) + size).tensors[0].shape == shape
    else:
        with pytest.raises(MalformedFileError, match=refused):
            header_of(text, 8 + len(text) + size)


@pytest.mark.parametrize("name", ["a" * 256, ".".join("a" * 24), "l.65535.w", "a-b_c.0"])
def test_names_within_the_limits_are_accepted(name):
    check_name(name, "x")


@pytest.mark.parametrize("name", ["a" * 257, ".".join("a" * 25), "l.65536.w", "a.__b", "a b", ".a"])
def test_names_beyond_the_limits_are_refused(name):
    with pytest.raises(MalformedFileError, match=r"x: '.*' is not a tensor name"):
        check_name(name, "x")


@pytest.mark.parametrize(("shape", "count"), [((), 4), ((3,), 12), ((3, 0), 0), ((2, 3, 5), 120)])
def test_bytes_of_a_tensor(shape, count):
    assert TensorSpec("a", "F32", shape).nbytes == count
