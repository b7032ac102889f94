"""Plain text tables and numbers for people."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def align(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Columns padded to their widest entry, those in ``right`` aligned right, under a header and a rule."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def count(value: float) -> str:
    """A number with K, M or G: 12, 3.46K, 41.2M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        # Three digits of 999.6 are 1000, which is one of the next unit.
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}" if abs(value) < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:g}"


def seconds(value: float | None) -> str:
    """Milliseconds, seconds from one on, or a dash for None."""
    if value is None:
        return "-"
    return f"{1e3 * value:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def share(part: float, whole: float) -> str:
    """A percentage."""
    return f"{100 * part / whole:.1f}%" if whole else "-"
