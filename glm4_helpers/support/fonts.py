"""Which fonts have Chinese glyphs: those of other systems by name, and the file that comes with the course.

Plots draw with them, the doctor looks for them; matplotlib is not needed to know their names.
"""

from __future__ import annotations

from pathlib import Path

SHIPPED_FONT = Path(__file__).parents[1] / "fonts" / "CourseSansSC-Regular.otf"
SHIPPED_FAMILY = "Course Sans SC"

CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Heiti SC",
    "PingFang HK",
    "Heiti TC",
    "STHeiti",
    "Songti SC",
    "SimSun",
    "Arial Unicode MS",
    "Noto Sans CJK JP",
)
"""Families with Chinese glyphs on Linux, macOS and Windows, in the order they are preferred; plots use the first one
installed."""
