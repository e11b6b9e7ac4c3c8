"""`.npy` files whose headers promise what is not there."""

from __future__ import annotations

import io

import numpy as np
import pytest

from msdiff_dist.data.npy import read_npy


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_arrays_of_every_version_are_read(version: tuple[int, int]) -> None:
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    assert (read_npy(npy(array, version)) == array).all()
    assert read_npy(npy(np.float64(3), version)) == 3


def claiming(shape: str) -> bytes:
    """A .npy file of no content whose header claims this shape."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def test_a_header_that_claims_a_terabyte() -> None:
    with pytest.raises(ValueError, match=r"claims float32\[1000000, 262144\], 1048576000000 bytes, and has 0"):
        read_npy(claiming("(1000000, 262144)"))


@pytest.mark.parametrize("shape", ["(3", "('a',)", "{}", "(" * 500, "-", "None"])
def test_a_header_that_is_none(shape: str) -> None:
    with pytest.raises(ValueError, match="header"):
        read_npy(claiming(shape))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"junk", "not a .npy"), (b"", "is empty"), (b"<html>", "HTML"), (npy(np.zeros(9))[:-1], "claims float64")],
)
def test_what_is_no_array_is_named(content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_npy(content)


def test_objects_are_refused() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="Object arrays"):
        read_npy(stream.getvalue())
