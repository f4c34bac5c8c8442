"""Tests of manifests: they are decoded as encoded, and any defect is an error."""

from __future__ import annotations

import hashlib
import struct

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paroquant_stream.errors import ManifestError, NewerManifestError
from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.store.manifest import EntryRecord, Manifest, seal, unseal

RECORD = EntryRecord(
    shard="model-00001-of-00002.safetensors",
    source_sha256="a" * 64,
    source_size=10,
    borrowed_sha256=("b" * 64,),
    task_sha256="c" * 64,
    key="d" * 64,
    digest="e" * 32,
    size=20,
    tensors=(TensorSpec("x.weight", "U32", (2, 4)), TensorSpec("x.empty", "F16", (0,))),
)
MANIFEST = Manifest("owner/name", "f" * 64, "entry/1", "AUTOAWQ", 4, 128, (RECORD,))
GOOD = MANIFEST.encode()


def sealed(body: bytes, version: int = 2 << 16, magic: bytes = b"PAROSTRM") -> bytes:
    """A manifest file of any body with the right hash."""
    head = struct.pack("<8sIQ32s", magic, version, len(body), hashlib.sha256(body).digest())
    return head + body


def changed(**fields) -> bytes:
    """The good manifest with some fields of its record replaced."""
    body = msgpack.unpackb(GOOD[52:])
    body["entries"][0] |= fields
    return sealed(msgpack.packb(body))


def test_a_manifest_is_decoded_as_it_was_encoded():
    assert Manifest.decode(GOOD) == MANIFEST


def test_a_newer_minor_version_is_read_a_major_is_not():
    body = GOOD[52:]
    assert Manifest.decode(sealed(body, 2 << 16 | 7)) == MANIFEST
    with pytest.raises(ManifestError, match="format 3"):
        Manifest.decode(sealed(body, 3 << 16))


def test_a_manifest_of_format_1_is_read_as_it_is():
    assert Manifest.decode(sealed(GOOD[52:], 1 << 16 | 1)) == MANIFEST
    with pytest.raises(ManifestError, match="format 0"):
        Manifest.decode(sealed(GOOD[52:], 0))


def test_both_kinds_of_digest_are_kept():
    for digest in ("e" * 32, "tree:" + "e" * 32):
        found = Manifest.decode(changed(digest=digest))
        assert found.entries[0].digest == digest
        assert Manifest.decode(found.encode()) == found


def test_every_flipped_bit_is_noticed():
    for position in range(len(GOOD) * 8):
        data = bytearray(GOOD)
        data[position // 8] ^= 1 << position % 8
        if 8 <= position // 8 < 10:  # the minor version: any is fine
            assert Manifest.decode(bytes(data)) == MANIFEST
            continue
        with pytest.raises(ManifestError):
            Manifest.decode(bytes(data))


def test_every_truncation_is_noticed():
    for length in range(len(GOOD)):
        with pytest.raises(ManifestError):
            Manifest.decode(GOOD[:length])
    with pytest.raises(ManifestError):
        Manifest.decode(GOOD + b"\0")


@pytest.mark.parametrize(
    "fields",
    [
        {"key": "../../etc/passwd"},
        {"key": "D" * 64},
        {"key": "d" * 63},
        {"digest": "e" * 64},
        {"digest": "tree:" + "e" * 31},
        {"digest": "tree:"},
        {"digest": "list:" + "e" * 32},
        {"size": "20"},
        {"size": True},
        {"dropped": 0},
        {"borrowed_sha256": ["x"]},
        {"borrowed_sha256": "b" * 64},
        {"tensors": [["__class__.x", "U32", [1]]]},
        {"tensors": [["x", "F99", [1]]]},
        {"tensors": [["x", "U32", [-1]]]},
        {"tensors": [["x", "U32", [True]]]},
        {"tensors": [["x", "U32", [1] * 9]]},
        {"tensors": [["x", "U32"]]},
        {"tensors": [[["x"], "U32", [1]]]},
        {"shard": 1},
    ],
)
def test_a_malformed_field_is_noticed(fields):
    with pytest.raises(ManifestError):
        Manifest.decode(changed(**fields))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgpack.packb(1),
        msgpack.packb([]),
        msgpack.packb({}),
        msgpack.packb(float("nan")),
        msgpack.packb(msgpack.ExtType(1, b"x")),
        msgpack.packb(msgpack.Timestamp(1)),
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * 5000,
        b"\x82\xa1a\x01\xa1a\x02",
    ],
)
def test_a_malformed_body_is_noticed(body):
    with pytest.raises(ManifestError):
        Manifest.decode(sealed(body))


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_random_bytes_are_a_manifest_error(body):
    for data in (body, sealed(body)):
        with pytest.raises(ManifestError):
            Manifest.decode(data)


def test_a_model_name_may_be_invalid_utf8():
    from dataclasses import replace

    named = replace(MANIFEST, model=b"bad\xff".decode("utf-8", "surrogateescape"))
    assert Manifest.decode(named.encode()).model == "bad?"


def test_a_directory_may_be_invalid_utf8():
    from dataclasses import replace

    directory = b"/models/bad\xff".decode("utf-8", "surrogateescape")
    assert Manifest.decode(replace(MANIFEST, directory=directory).encode()).directory == directory


def test_a_manifest_from_before_1_1_has_no_directory():
    body = msgpack.unpackb(GOOD[52:])
    del body["directory"]
    assert Manifest.decode(sealed(msgpack.packb(body))) == MANIFEST


@pytest.mark.parametrize("directory", ["/text", b"relative", b"/nul\0", 1, None])
def test_a_relative_directory_is_noticed(directory):
    body = msgpack.unpackb(GOOD[52:]) | {"directory": directory}
    with pytest.raises(ManifestError):
        Manifest.decode(sealed(msgpack.packb(body)))


@pytest.mark.parametrize("shard", ["", ".", "..", "../x", "/x", "a/b", "a\0b"])
def test_a_shard_that_is_not_a_file_name_is_noticed(shard):
    with pytest.raises(ManifestError, match="shard: expected a file name"):
        Manifest.decode(changed(shard=shard))


def test_a_newer_major_version_has_an_error_of_its_own():
    with pytest.raises(NewerManifestError):
        Manifest.decode(sealed(GOOD[52:], 3 << 16))
    with pytest.raises(ManifestError) as caught:
        Manifest.decode(GOOD[:-1])
    assert not isinstance(caught.value, NewerManifestError)


def test_a_key_that_is_there_twice_is_noticed():
    body = GOOD[52:]
    assert body[0] == 0x88  # a map of eight keys
    doubled = b"\x89" + body[1:] + msgpack.packb("bits") + msgpack.packb(4)
    with pytest.raises(ManifestError, match="a map has a key twice"):
        Manifest.decode(sealed(doubled))


@pytest.mark.parametrize("dim", [2**31 - 1, 2**31, -1])
def test_dimensions_have_31_bits(dim):
    data = changed(tensors=[["x", "U32", [dim]]])
    if 0 <= dim < 2**31:
        assert Manifest.decode(data).entries[0].tensors[0].shape == (dim,)
    else:
        with pytest.raises(ManifestError, match="x: a dimension"):
            Manifest.decode(data)


def test_a_file_over_the_limit_is_not_hashed():
    sealed_bytes = seal(b"PAROSTRM", b"body")
    assert unseal(b"PAROSTRM", sealed_bytes, len(sealed_bytes)) == b"body"
    with pytest.raises(ManifestError, match=f"{len(sealed_bytes)} bytes"):
        unseal(b"PAROSTRM", sealed_bytes, len(sealed_bytes) - 1)


def test_entries_are_found_by_the_names_of_their_tensors():
    assert MANIFEST.entries_with(lambda name: name == "x.empty") == [RECORD]
    assert MANIFEST.entries_with(lambda name: name == "y") == []
