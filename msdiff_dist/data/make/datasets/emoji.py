"""The Noto colour emoji, with their Unicode names."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from msdiff_dist.data.make.datasets.labelled_image import Dataset, LabelledImage, Split, tenth_apart
from msdiff_dist.data.make.shard_writer import DatasetInfo
from msdiff_dist.errors import DataError

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_PIXELS = 109  # the one size of the font's bitmaps


def emoji(source: Path | None, split: Split, size: int) -> Iterator[LabelledImage]:
    """The font's single-character images on white, captioned with their Unicode names. A fixed tenth is for test."""
    path = source or EMOJI_FONT
    if not path.is_file():
        remedy = "Install it (`apt-get install fonts-noto-color-emoji`) or give its file with --source."
        raise DataError("--source", str(path), "font not found", remedy)
    try:
        font = ImageFont.truetype(str(path), EMOJI_PIXELS, layout_engine=ImageFont.Layout.BASIC)
        characters = [chr(code) for code in range(0x80, 0x20000) if _is_emoji(chr(code), font)]
    except OSError as e:
        raise DataError("--source", str(path), f"is not Noto Color Emoji ({e})", "Give NotoColorEmoji.ttf.") from e
    for i in tenth_apart(len(characters), split):
        character = characters[i]
        # Drawn at (0, 0), the glyph fills the box from (left, top) to (right, bottom). Drawn at `at`, it is centred.
        left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
        edge = max(right - left, bottom - top)
        image = Image.new("RGB", (edge, edge), "white")
        at = ((edge - right - left) // 2, (edge - bottom - top) // 2)
        ImageDraw.Draw(image).text(at, character, font=font, embedded_color=True)
        caption = unicodedata.name(character).lower()
        yield LabelledImage(
            key=f"{ord(character):05x}", image=image.resize((size, size), Image.Resampling.LANCZOS), caption=caption
        )


def _is_emoji(character: str, font: ImageFont.FreeTypeFont) -> bool:
    """Whether the font has an image of a character that is a symbol with a name."""
    name = unicodedata.name(character, "")
    if unicodedata.category(character) not in ("So", "Sm", "Po", "Pd", "Ll") or name.startswith("REGIONAL INDICATOR"):
        return False
    _, top, _, bottom = font.getbbox(character)
    return bool(name) and bottom > top


EMOJI = Dataset(
    DatasetInfo(name="emoji", licence="SIL OFL 1.1", origin="Google: Noto Color Emoji, with Unicode names"), 64, emoji
)
