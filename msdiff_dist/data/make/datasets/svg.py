"""SVG to pixels by resvg, which is installed with the extra `data`."""

from __future__ import annotations

import io
import re
from importlib.util import find_spec
from xml.parsers import expat

from PIL import Image

from msdiff_dist.errors import DataError

MOST_NESTED = 100
"""Of elements in each other that are drawn. Icons have eight at most; resvg's own recursion ends its process at 300."""
_IMAGE = re.compile("[iI]mage")  # <image>, <feImage>
_OF_OTHERS = re.compile(r"""href\s*=\s*["']\s*(?!data:|#)""")


def check_resvg(of: str) -> None:
    """Check that SVG can be drawn.

    Raises:
        DataError: resvg is not installed.
    """
    if find_spec("resvg_py") is None:
        problem = "is drawn from SVG files by resvg, which is not installed"
        raise DataError("DATASET", of, problem, "Install it: pip install resvg-py")


def drawn_svg(svg: str, size: int) -> Image.Image:
    """The drawing on white, in RGB, `size` pixels wide and high.

    Raises:
        ValueError: it cannot be drawn, is nested too deep, or would show another file; the message is a clause.
    """
    import resvg_py

    # resvg opens the files of this machine that an SVG names.
    if _IMAGE.search(svg) and _OF_OTHERS.search(svg):
        raise ValueError("shows an image that is another file")
    # No element is nested deeper than there are ends of elements, unless entities stand for some.
    if (svg.count("</") > MOST_NESTED or "<!ENTITY" in svg) and (depth := _depth(svg)) > MOST_NESTED:
        raise ValueError(f"has elements nested {depth} deep")
    # Fonts of the machine would make the same command draw other images elsewhere.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


def _depth(svg: str) -> int:
    """How deep elements are nested."""
    depth = deepest = 0

    def begin(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = begin, end
    try:
        parser.Parse(svg, True)
    except expat.ExpatError as e:
        raise ValueError(f"is no XML ({e})") from e
    return deepest
