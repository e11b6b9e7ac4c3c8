"""IDX files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from msdiff_dist.data.make.idx import read_idx

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
FILE = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4]) + ARRAY.tobytes()


def test_plain_and_gzipped(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(FILE)
    (tmp_path / "a.gz").write_bytes(gzip.compress(FILE))
    for name in ("a", "a.gz"):
        assert np.array_equal(read_idx(tmp_path / name), ARRAY)


@pytest.mark.parametrize("content", [FILE[:-1], FILE + b"x", FILE[:10], b"", b"\0\0\x0d" + FILE[3:], b"P6" + FILE[2:]])
def test_other_content_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError):  # noqa: PT011
        read_idx(tmp_path / "a")


def test_gzipped_files_cut_short_or_not_gzipped(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    for content in (gzip.compress(FILE)[:-20], gzip.compress(FILE)[:12] + bytes(30), FILE):
        path.write_bytes(content)
        with pytest.raises((ValueError, OSError)):
            read_idx(path)
