"""Pictures as text in Graphviz' language."""

from __future__ import annotations

from tdfx.drawing.picture import END, JOIN, Picture, color

SHAPES = {JOIN: "circle", END: "plaintext"}


def to_dot(picture: Picture) -> str:
    """A directed graph from top to bottom, for ``dot``."""
    title = _quoted("\n".join((picture.title, picture.about)))
    lines = [
        f"digraph {_quoted(picture.title)} {{",
        f'  label={title}; labelloc="t"; fontname="Helvetica";',
        '  node [style="filled,rounded" fontname="Helvetica" fontsize=10];',
    ]
    for box in picture.boxes.values():
        options = {
            "label": "\n".join(box.lines),
            "shape": SHAPES.get(box.kind, "box"),
            "fillcolor": color(box.kind),
            "penwidth": "2" if box.critical else "1",
        }
        text = " ".join(f"{key}={_quoted(value)}" for key, value in options.items())
        lines.append(f"  {_quoted(box.name)} [{text}];")
    lines += [f"  {_quoted(source)} -> {_quoted(user)};" for source, user in picture.edges]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    """A double-quoted string: there a backslash starts an escape, of which a line break is one."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
