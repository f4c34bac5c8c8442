"""Layout of safetensors files, and writing them in one stream."""

from __future__ import annotations

import hashlib

import pytest
from safetensors.numpy import load

from paroquant_stream.errors import UnreadableFileError
from paroquant_stream.files.descriptor import closing, open_regular
from paroquant_stream.files.tensor_header import TensorSpec, read_header
from paroquant_stream.files.tensor_writer import (
    PAGE,
    TensorWriter,
    end_of,
    file_size,
    lay_out,
    layout_defect,
)

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


def test_pages_come_first_and_the_rest_is_aligned_to_items():
    header, tensors = lay_out(SPECS)
    assert len(header) % PAGE == 0
    assert [t.name for t in tensors] == ["page", "pages", "empty", "words", "small"]
    assert all(t.start % PAGE == 0 for t in tensors[:3])
    assert tensors[3].start % 4 == 0
    assert tensors[4].start % 2 == 0


def test_our_reader_and_safetensors_read_what_is_written(tmp_path):
    (tmp_path / "x").write_bytes(written(SPECS))
    with closing(open_regular(tmp_path / "x")) as fd:
        found = read_header(fd, "x")
    assert found.tensors == lay_out(SPECS)[1]
    assert found.size == file_size(SPECS) == (tmp_path / "x").stat().st_size
    assert found.metadata == {"format": "mlx"}
    arrays = load(written(SPECS))
    assert arrays["words"].shape == (5,)
    assert {name: set(a.tobytes()) for name, a in arrays.items() if a.size}["pages"] == {1}


def test_the_same_specs_give_the_same_bytes():
    digest = hashlib.sha256(written(SPECS)).hexdigest()
    assert digest == "474fbf2ebc87b2e71840fb21ba61b80422df80788bc14b74fc10f9f3cf069e18"


def test_metadata_is_added_to_the_format():
    assert lay_out(SPECS, {"a": "b"})[0] != lay_out(SPECS)[0]
    assert b'"__metadata__":{"a":"b","format":"mlx"}' in lay_out(SPECS, {"a": "b"})[0]


def test_a_file_without_tensors_is_its_header():
    header, tensors = lay_out([])
    assert end_of(header, tensors) == file_size([]) == len(header) == PAGE


def test_a_tensor_out_of_turn_or_too_long_is_never_written():
    header, tensors = lay_out(SPECS)
    sunk = bytearray()
    writer = TensorWriter(sunk.extend, header)
    with pytest.raises(AssertionError, match="pages"):
        writer.write(tensors[1], memoryview(bytes(4)))
    with pytest.raises(AssertionError, match="page"):
        writer.write(tensors[0], memoryview(bytes(PAGE + 1)))
    with pytest.raises(AssertionError, match="bytes were written"):
        writer.finish(file_size(SPECS))
    assert sunk == header


def test_a_tensor_may_be_written_in_chunks_but_not_twice():
    header, tensors = lay_out(SPECS)
    writer = TensorWriter(lambda _: None, header)
    half = memoryview(bytes(PAGE // 2))
    writer.write(tensors[0], half)
    writer.write(tensors[0], half)
    with pytest.raises(AssertionError, match="page: bytes at"):
        writer.write(tensors[0], half[:1])


@pytest.fixture
def defect(tmp_path):
    def find(data: bytes) -> str | None:
        (tmp_path / "x").write_bytes(data)
        with closing(open_regular(tmp_path / "x")) as fd:
            return layout_defect(fd, SPECS, "x")

    return find


def test_the_right_layout_has_no_defect(defect):
    data = written(SPECS)
    assert defect(data) is None
    assert defect(data[:-1] + b"x") is None  # only the digest shows that


def test_another_size_or_header_is_a_defect(defect):
    data, size = written(SPECS), file_size(SPECS)
    assert defect(data[:-1]) == f"expected {size:,} bytes, found {size - 1:,}"
    assert defect(data + b"x") == f"expected {size:,} bytes, found {size + 1:,}"
    other = bytearray(data)
    other[len(lay_out(SPECS)[0]) - 1] ^= 1  # the last byte of the padding
    assert defect(bytes(other)) == "the header is not the one that was written"


def test_a_file_that_cannot_be_read_is_an_error():
    with pytest.raises(UnreadableFileError, match="x: cannot be read: Bad file descriptor"):
        layout_defect(-1, SPECS, "x")
