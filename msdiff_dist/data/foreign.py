"""What a file is that is not what its name says, as a clause for an error."""

from __future__ import annotations

_LFS = b"version https://git-lfs"
_MARKS = {
    _LFS: "is a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"<?xml": "is an XML or SVG file",
    b"<svg": "is an SVG file",
    b"%PDF": "is a PDF file",
    b"PK\x03\x04": "is a ZIP archive",
    b"\x1f\x8b": "is gzip data",
    b"BZh": "is bzip2 data",
    b"\xfd7zXZ\x00": "is xz data",
    b"\x28\xb5\x2f\xfd": "is zstandard data",
    b"\x93NUMPY": "is a .npy array",
    b"\x89HDF": "is an HDF5 file",
    b"\x89PNG": "is a PNG image",
    b"\xff\xd8\xff": "is a JPEG image",
}


def what_it_is(head: bytes) -> str | None:
    """What begins with these bytes, or None if they are of no kind that is often found in the place of another.

    Args:
        head: the first bytes of the file; 512 are enough.
    """
    if not head.strip(b"\0"):
        return "is empty" if not head else "holds zeros only"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "is an HTML page: the download got an error page or needs a login"
    return next((what for mark, what in _MARKS.items() if head.lstrip().startswith(mark)), None)
