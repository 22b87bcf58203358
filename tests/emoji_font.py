"""A font of coloured bitmaps, as Noto Color Emoji keeps them."""

from io import BytesIO
from pathlib import Path
from typing import Any

from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables import C_B_D_T_, E_B_L_C_, BitmapGlyphMetrics
from PIL import Image


def write_font(path: Path, colours: dict[int, Any], size: tuple[int, int] = (136, 128)) -> None:
    """Write a font that draws characters as bitmaps of one colour each."""
    glyphs = [f"u{code:X}" for code in colours]
    builder = FontBuilder(1024)
    builder.setupGlyphOrder([".notdef", *glyphs])
    builder.setupCharacterMap(dict(zip(colours, glyphs, strict=True)))
    builder.setupPost()
    font = builder.font
    bitmaps = {}
    for name, colour in zip(glyphs, colours.values(), strict=True):
        file = BytesIO()
        Image.new("RGBA", size, colour).save(file, "png")
        bitmaps[name] = glyph = C_B_D_T_.cbdt_bitmap_format_17(b"", font)
        glyph.imageData = file.getvalue()
        glyph.metrics = BitmapGlyphMetrics.SmallGlyphMetrics()
        shape = {"height": size[1], "width": size[0], "BearingX": 0, "BearingY": 101}
        vars(glyph.metrics).update(shape, Advance=size[0])
    data, places = newTable("CBDT"), newTable("CBLC")
    data.version = places.version = 3.0
    data.strikeData = [bitmaps]
    places.strikes = [_strike(glyphs, font)]
    font["CBDT"], font["CBLC"] = data, places
    path.parent.mkdir(parents=True, exist_ok=True)
    font.save(path)


def _strike(glyphs: list[str], font: Any) -> Any:
    strike = E_B_L_C_.Strike()
    table = strike.bitmapSizeTable
    vars(table).update(colorRef=0, ppemX=109, ppemY=109, bitDepth=32, flags=1)
    vars(table).update(startGlyphIndex=1, endGlyphIndex=len(glyphs))
    for direction in ("hori", "vert"):
        line = E_B_L_C_.SbitLineMetrics()
        for name in E_B_L_C_.sstruct.getformat(E_B_L_C_.sbitLineMetricsFormat)[1]:
            setattr(line, name, 0)
        setattr(table, direction, line)
    places = E_B_L_C_.eblc_index_sub_table_1(b"", font)
    places.names, places.imageFormat, places.indexFormat = glyphs, 17, 1
    places.firstGlyphIndex, places.lastGlyphIndex = 1, len(glyphs)
    strike.indexSubTables = [places]
    return strike
