"""Networks drawn into files, in the format that their names end in."""

from __future__ import annotations

from pathlib import Path

from tdfx.drawing.dot import to_dot
from tdfx.drawing.figure import save_figure
from tdfx.drawing.picture import picture
from tdfx.errors import InputError
from tdfx.files import replacing, write_text
from tdfx.plots import check_matplotlib
from tdfx.records.network_graph import NetworkGraph

FORMATS = (".dot", ".svg", ".png")


def check_format(path: str | Path) -> str:
    """The ending of a file's name, without the dot.

    Raises:
        InputError: no picture is written under such a name, or matplotlib, which it takes, is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"cannot draw {str(path)!r}: expected a name that ends in {', '.join(FORMATS)}")
    if suffix != ".dot":
        check_matplotlib()
    return suffix.removeprefix(".")


def draw(network: NetworkGraph, path: str | Path) -> None:
    """Draws a network; see ``NetworkGraph.draw``.

    Raises:
        InputError: as for ``check_format``, or the path cannot be written.
    """
    kind = check_format(path)
    shown = picture(network)
    if kind == "dot":
        write_text(path, to_dot(shown))
        return
    with replacing(path) as staged:
        save_figure(shown, staged, kind)
