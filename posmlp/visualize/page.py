"""The page that holds all figures: one HTML file that needs no other."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

from .style import DPI

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1f2d3a; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 8px; overflow-wrap: anywhere; }
p, figcaption { max-width: 46rem; margin: 0; color: #4d5965; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: 20px 0 0; font-size: 0.94rem; }
th, td { text-align: left; vertical-align: top; padding: 4px 20px 4px 0; border-bottom: 1px solid #e6e9ec; }
th { font-weight: 600; white-space: nowrap; }
td { overflow-wrap: anywhere; }
figure { margin: 44px 0 0; }
.picture { overflow-x: auto; margin-bottom: 10px; }
img { display: block; max-width: 100%; height: auto; }
@media (max-width: 700px) { img { max-width: max(100%, 640px); } }
"""
_SCREEN_DPI = 96  # a page's pixels in an inch


@dataclass(frozen=True)
class Plate:
    """A figure on the page: its PNG file, a title, how to read it, and what is said where it is not seen."""

    path: Path
    title: str
    caption: str
    alt: str


def write_page(
    path: Path, title: str, lead: str, facts: Sequence[tuple[str, str]], plates: Sequence[Plate]
) -> None:
    """Write the page: a title, a sentence, a table of facts, and the figures with their images inside."""
    root = Element("html", lang="en")
    head = SubElement(root, "head")
    SubElement(head, "meta", charset="utf-8")
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    _add(head, "title", title)
    _add(head, "style", _STYLE)
    main = SubElement(SubElement(root, "body"), "main")
    _add(main, "h1", title)
    _add(main, "p", lead)
    table = SubElement(SubElement(main, "table"), "tbody")
    for name, value in facts:
        row = SubElement(table, "tr")
        _add(row, "th", name, scope="row")
        _add(row, "td", value)
    for plate in plates:
        _add_plate(main, plate)
    text = "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"
    path.write_bytes(text.encode("utf-8", "replace"))  # names of files need not be Unicode


def _add(parent: Element, tag: str, text: str, **attributes: str) -> Element:
    """An element with text, which the writer escapes."""
    element = SubElement(parent, tag, attributes)
    element.text = text
    return element


def _add_plate(parent: Element, plate: Plate) -> None:
    data = plate.path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])  # where a PNG file has its size
    figure = SubElement(parent, "figure")
    _add(figure, "h2", plate.title)
    source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
    SubElement(
        SubElement(figure, "div", {"class": "picture"}), "img", src=source, alt=plate.alt,
        width=str(width * _SCREEN_DPI // DPI), height=str(height * _SCREEN_DPI // DPI),
    )  # fmt: skip
    _add(figure, "figcaption", plate.caption)
