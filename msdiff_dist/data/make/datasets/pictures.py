"""Image files and SVG drawings of any size to squares of one size, on white, in several processes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from msdiff_dist.data.image_files import UNREADABLE, ImageReading, read_image
from msdiff_dist.data.make.datasets.labelled_image import Collection, LabelledImage, Split, tenth_apart
from msdiff_dist.data.make.datasets.svg import check_resvg, drawn_svg
from msdiff_dist.data.make.processes import in_processes
from msdiff_dist.data.make.shard_writer import DatasetInfo, encode_image


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A sample that is not drawn yet.

    Attributes:
        name: of the picture in its source.
        content: text of an SVG file, or path of an image file or SVG file.
        caption: of the sample.
        label: of its class.
    """

    name: str
    content: str | Path
    caption: str
    label: int


def drawn(
    pictures: Sequence[Picture],
    info: DatasetInfo,
    split: Split,
    size: int,
    nproc: int,
    mode: str = "RGB",
    left_out: Sequence[tuple[str, str]] = (),
) -> Collection:
    """The pictures of a split, a fixed tenth of them for test, in a fixed shuffled order.

    Args:
        size: height and width in pixels. A picture that is not square is centred.
        mode: L or RGB, of all images.
        left_out: what is skipped already. Pictures that cannot be drawn, or are white all over, are added.

    Raises:
        DataError: there are SVG files among them, and resvg is not installed.
    """
    if any(_is_svg(picture.content) for picture in pictures):
        check_resvg(info.name)
    order = tenth_apart(len(pictures), split)
    skipped = list(left_out)
    images = in_processes(
        functools.partial(draw, size=size, mode=mode), (pictures[i].content for i in order), nproc, preload=__name__
    )
    return Collection(info=info, images=_samples(pictures, order, images, skipped), most=len(order), left_out=skipped)


def _samples(
    pictures: Sequence[Picture], order: Sequence[int], images: Iterable[bytes | str], skipped: list[tuple[str, str]]
) -> Iterator[LabelledImage]:
    for i, image in zip(order, images, strict=True):
        picture = pictures[i]
        if isinstance(image, str):
            skipped.append((picture.name, image))
        else:
            yield LabelledImage(
                key=f"{i:06d}", image=image, caption=picture.caption, label=picture.label, source=picture.name
            )


def draw(content: str | Path, size: int, mode: str) -> bytes | str:
    """The PNG file of a picture, or the reason why there is none."""
    try:
        if _is_svg(content):
            image = drawn_svg(content if isinstance(content, str) else content.read_text(encoding="utf-8"), size)
        else:
            image = read_image(Path(content), ImageReading())
        if image.size != (size, size):
            image = ImageOps.pad(image.convert(mode), (size, size), Image.Resampling.LANCZOS, color="white")
        if image.mode != mode:
            image = image.convert(mode)
    except UNREADABLE as e:
        return str(e)
    darkest = image.convert("L").getextrema()[0]
    return "is white all over" if darkest == 255 else encode_image(image)


def _is_svg(content: str | Path) -> bool:
    return isinstance(content, str) or content.suffix.lower() == ".svg"
