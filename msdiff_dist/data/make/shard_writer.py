"""Writing shards: plain USTAR archives, complete or absent, and the same bytes for the same samples."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from PIL import Image

from msdiff_dist.data.index import INDEX_NAME
from msdiff_dist.errors import DataError
from msdiff_dist.files.atomic import atomic_folder, atomic_write, check_place, is_free, writing

Fields = Mapping[str, bytes]  # file extension -> content


DATASET_INFO = "dataset.json"
"""What a set of shards is called, its licence and its classes; written beside the shards."""


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Whose work a part of a data set is, for licences that ask for it."""

    part: str
    author: str
    licence: str
    url: str


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What `dataset.json` says about a folder of shards."""

    name: str
    licence: str
    origin: str
    classes: tuple[str, ...] = ()
    attributions: tuple[Attribution, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WrittenDataset:
    """A complete folder of shards.

    Attributes:
        bytes: size of all shards together.
        class_counts: samples by label; labels without samples are absent.
        left_out: what was skipped, by name, each with the reason.
    """

    out: Path
    info: DatasetInfo
    shards: int
    samples: int
    bytes: int
    class_counts: Mapping[int, int]
    left_out: tuple[tuple[str, str], ...] = ()


def encode_image(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def even_sizes(samples: int, shards: int) -> Iterator[int]:
    """Sizes of `shards` shards that hold `samples` together and differ by one at most."""
    return (samples * (i + 1) // shards - samples * i // shards for i in range(shards))


def write_shard(path: Path, samples: Iterable[tuple[str, Fields]]) -> int:
    """Write one shard of (key, fields), complete or not at all; returns its number of samples."""
    count = 0

    def write(stream: IO[bytes]) -> None:
        nonlocal count
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for key, fields in samples:
                count += 1
                for extension, content in fields.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")  # mtime, uid and gid 0: reproducible
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))

    atomic_write(path, write)
    return count


def write_index(folder: Path, name: str, counts: Mapping[str, int]) -> None:
    """Write `index.json` (wids format) for shards that lie in `folder`. `counts`: samples by file name."""
    shardlist = [
        {"url": shard, "nsamples": n, "filesize": (folder / shard).stat().st_size} for shard, n in counts.items()
    ]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name, "shardlist": shardlist}
    atomic_write(folder / INDEX_NAME, json.dumps(index, indent=1) + "\n")


def check_output(out: Path) -> None:
    """Check that shards can be written to `out`.

    Raises:
        DataError: `out` exists and is not an empty folder.
        WriteError: it cannot be written.
    """
    if not is_free(out):
        raise DataError("--out", str(out), "exists and is not an empty folder", "Name another folder, or remove it.")
    check_place("--out", out, "new folder")


def write_dataset(
    out: Path, info: DatasetInfo, samples: Iterable[tuple[str, Fields]], sizes: Iterable[int]
) -> WrittenDataset:
    """Write a folder of shards `00000.tar`..., `index.json` and `dataset.json`, complete or not at all.

    Args:
        out: must not exist or be empty.
        sizes: samples of each shard; the last ones stay unused if there are fewer samples.

    Raises:
        DataError: the folder is in use or cannot be written, or there are no samples.
    """
    out = out.resolve()
    check_output(out)
    with writing("--out", out, DataError), atomic_folder(out) as aside:
        counts: dict[str, int] = {}
        class_counts: Counter[int] = Counter()
        tallied = _tally(samples, class_counts)
        # A shard is begun only if there is a sample for it, so no empty shard is written.
        for size in filter(None, sizes):
            first = next(tallied, None)
            if first is None:
                break
            name = f"{len(counts):05d}.tar"
            counts[name] = write_shard(aside / name, itertools.chain([first], itertools.islice(tallied, size - 1)))
        if not counts:
            raise DataError("--out", str(out), "there are no samples to write", "Check the source.")
        write_index(aside, info.name, counts)
        written = WrittenDataset(
            out=out,
            info=info,
            shards=len(counts),
            samples=sum(counts.values()),
            bytes=_bytes(aside),
            class_counts=dict(sorted(class_counts.items())),
        )
        (aside / DATASET_INFO).write_text(json.dumps(_description(written), indent=1, ensure_ascii=False) + "\n")
    return written


def _tally(samples: Iterable[tuple[str, Fields]], counts: Counter[int]) -> Iterator[tuple[str, Fields]]:
    """The samples unchanged, while their labels are counted."""
    for key, fields in samples:
        if "cls" in fields:
            counts[int(fields["cls"])] += 1
        yield key, fields


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def _description(written: WrittenDataset) -> dict[str, object]:
    info = written.info
    attributions = {"attributions": [asdict(part) for part in info.attributions]} if info.attributions else {}
    return {
        "name": info.name,
        "licence": info.licence,
        "origin": info.origin,
        "samples": written.samples,
        "shards": written.shards,
        "classes": [
            {"label": label, "name": name, "samples": written.class_counts.get(label, 0)}
            for label, name in enumerate(info.classes)
        ],
        **attributions,
    }
