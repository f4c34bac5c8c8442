"""Headers: what is accepted, what is refused, and how files are laid out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load, save

from paroquant_stream.errors import MalformedFileError
from paroquant_stream.files.descriptor import open_regular, pread_exactly
from paroquant_stream.files.tensor_header import TensorSpec, read_header
from paroquant_stream.files.tensor_writer import PAGE, TensorWriter, file_size, lay_out
from tests.helpers.tensor_files import REFUSED, file_of, tensor


def read(path: Path):
    fd = open_regular(path)
    try:
        return read_header(fd, path.name)
    finally:
        os.close(fd)


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


def test_refuses_a_pipe_without_hanging(tmp_path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(MalformedFileError, match="regular file"):
        open_regular(tmp_path / "x")


def test_follows_no_link_when_told_so(tmp_path):
    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="link"):
        open_regular(tmp_path / "link", follow=False)


def test_a_short_read_is_an_error(tmp_path):
    (tmp_path / "x").write_bytes(bytes(10))
    fd = open_regular(tmp_path / "x")
    with pytest.raises(MalformedFileError, match="ends 5 bytes before"):
        pread_exactly(fd, 5, 10, "x")
    os.close(fd)


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


SPECS = [
    TensorSpec("small", "F16", (3,)),
    TensorSpec("page", "U8", (PAGE,)),
    TensorSpec("words", "U32", (5,)),
    TensorSpec("pages", "F32", (PAGE // 2,)),
    TensorSpec("empty", "F32", (0,)),
]


def written(specs) -> bytes:
    header, tensors = lay_out(specs)
    out = bytearray()
    writer = TensorWriter(out.extend, header)
    for index, info in enumerate(tensors):
        writer.write(info, memoryview(bytes([index]) * info.nbytes))
    writer.finish(file_size(specs))
    return bytes(out)


def test_pages_come_first_on_page_boundaries_and_the_rest_stays_aligned():
    _, tensors = lay_out(SPECS)
    assert [t.name for t in tensors] == ["page", "pages", "empty", "words", "small"]
    assert all(t.start % PAGE == 0 for t in tensors[:3])
    assert tensors[3].start % 4 == 0
    assert tensors[4].start % 2 == 0


def test_what_is_written_is_valid_for_us_and_for_safetensors(tmp_path):
    (tmp_path / "x").write_bytes(written(SPECS))
    assert read(tmp_path / "x").tensors == lay_out(SPECS)[1]
    arrays = load(written(SPECS))
    assert arrays["words"].shape == (5,)
    assert {name: set(a.tobytes()) for name, a in arrays.items() if a.size}["pages"] == {1}


def test_the_same_specs_give_the_same_bytes():
    import hashlib

    digest = hashlib.sha256(written(SPECS)).hexdigest()
    assert digest == "474fbf2ebc87b2e71840fb21ba61b80422df80788bc14b74fc10f9f3cf069e18"


def test_a_tensor_out_of_turn_or_too_long_is_never_written():
    header, tensors = lay_out(SPECS)
    writer = TensorWriter(lambda _: None, header)
    with pytest.raises(AssertionError, match="pages"):
        writer.write(tensors[1], memoryview(bytes(4)))
    with pytest.raises(AssertionError, match="page"):
        writer.write(tensors[0], memoryview(bytes(PAGE + 1)))
    with pytest.raises(AssertionError, match="bytes were written"):
        writer.finish(file_size(SPECS))


def test_whatever_is_refused_here_but_not_by_safetensors_is_on_this_list(tmp_path):
    """The second opinion: the differences between the two are known, and each is ours being
    stricter.
    """
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
