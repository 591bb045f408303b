"""Makes glm4_helpers/fonts/CourseSansSC-Regular.otf, the Chinese glyphs for figures on machines without a Chinese font.

    python images/subset_font.py /usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc

Needs fontTools (matplotlib installs it) and Noto Sans CJK. Only to be run again when more characters are needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "glm4_helpers" / "fonts" / "CourseSansSC-Regular.otf"
FAMILY = "Course Sans SC"
SIMPLIFIED_CHINESE = 2


def characters() -> set[str]:
    """ASCII, GB 2312's punctuation, full-width forms and 3,755 level 1 characters, and all that the rows use."""
    rows = [0x21, 0x23, *range(0x30, 0x58)]
    codes = (bytes([row + 0x80, cell + 0x80]) for row in rows for cell in range(0x21, 0x7F))
    standard = "".join(code.decode("gb2312", "ignore") for code in codes)
    data = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "data").rglob("*.json"))]
    ascii_characters = "".join(map(chr, range(32, 127)))
    return {character for character in ascii_characters + standard + "".join(data) if character.isprintable()}


def main(source: str) -> None:
    options = subset.Options()
    options.layout_features = []
    options.hinting = False
    options.name_IDs = [0, 1, 2, 3, 4, 5, 6, 13, 14]
    font = TTFont(source, fontNumber=SIMPLIFIED_CHINESE)
    worker = subset.Subsetter(options)
    worker.populate(text="".join(sorted(characters())))
    worker.subset(font)
    # A name of its own, so that it is never mistaken for the full font.
    for record in font["name"].names:
        names = {1: FAMILY, 3: f"{FAMILY} Regular subset", 4: f"{FAMILY} Regular", 6: "CourseSansSC-Regular"}
        record.string = names.get(record.nameID, record.toUnicode())
    font["CFF "].cff.fontNames[0] = "CourseSansSC-Regular"
    TARGET.parent.mkdir(exist_ok=True)
    font.save(TARGET)
    print(f"{TARGET.name}: {len(font.getGlyphOrder()):,} glyphs, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
