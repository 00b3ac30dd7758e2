"""Draws the figures of docs/concepts.md: `python docs/figures/draw.py`.

Each figure draws its background and follows the color scheme of the system, so that it is legible on light and dark
pages.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

STYLE = """
  .card { fill: #f7f8fa; stroke: #d5d9e0; }
  .box { fill: #ffffff; stroke: #5b6473; }
  .a { fill: #cfe0ff; stroke: #3a5fb0; }
  .b { fill: #d9f0d4; stroke: #3f8540; }
  .c { fill: #ffe3c2; stroke: #b0702a; }
  .ghost { fill: none; stroke: #7b8494; stroke-dasharray: 4 3; }
  .group { fill: none; stroke: #a3abb9; }
  .line { fill: none; stroke: #3c4352; stroke-width: 1.5; }
  .head { fill: #3c4352; }
  .cut { stroke: #b03a3a; stroke-width: 2; stroke-dasharray: 6 4; }
  text { font: 13px system-ui, sans-serif; fill: #1d2230; }
  .small { font-size: 11.5px; fill: #4a5263; }
  .title { font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #1e222b; stroke: #3a4150; }
    .box { fill: #2a303c; stroke: #98a2b5; }
    .a { fill: #27406f; stroke: #8fb1f5; }
    .b { fill: #28502b; stroke: #8ed08f; }
    .c { fill: #5e4120; stroke: #f0b878; }
    .ghost { stroke: #98a2b5; }
    .group { stroke: #5b6579; }
    .line { stroke: #c9d0de; }
    .head { fill: #c9d0de; }
    .cut { stroke: #f08a8a; }
    text { fill: #eef1f7; }
    .small { fill: #b9c1d0; }
  }
"""


class Figure:
    """Elements of an SVG, in the order in which they are drawn.

    Args:
        width: In pixels.
        height: In pixels.
        description: For readers who do not see it.
    """

    def __init__(self, width: int, height: int, description: str) -> None:
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="{escape(description)}">\n<style>{STYLE}</style>\n'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>'
        )
        self.elements: list[str] = []
        self.rect(0.5, 0.5, width - 1, height - 1, "card", corner=10)

    def rect(self, x: float, y: float, width: float, height: float, kind: str, corner: float = 4) -> None:
        """Adds a rectangle of a class."""
        shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{corner:g}"'
        self.elements.append(f'<rect class="{kind}" {shape}/>')

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """Adds a line of text; `y` is its baseline."""
        self.elements.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, text: str, kind: str = "box") -> None:
        """Adds a rectangle with centered lines of text."""
        self.rect(x, y, width, height, kind)
        lines = text.split("\n")
        for number, line in enumerate(lines):
            baseline = y + height / 2 + 4.5 + (number - (len(lines) - 1) / 2) * 16
            self.text(x + width / 2, baseline, line, anchor="middle")

    def arrow(self, *points: tuple[float, float], both: bool = False) -> None:
        """Adds a line through points that ends in an arrow head."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        start = ' marker-start="url(#head)"' if both else ""
        self.elements.append(f'<polyline class="line" points="{path}" marker-end="url(#head)"{start}/>')

    def cut(self, x: float, top: float, bottom: float) -> None:
        """Adds a vertical line where the model is cut."""
        self.elements.append(f'<line class="cut" x1="{x:g}" y1="{top:g}" x2="{x:g}" y2="{bottom:g}"/>')

    def svg(self) -> str:
        """Returns the file."""
        return "\n".join([self.head, *self.elements, "</svg>"]) + "\n"


def mesh() -> Figure:
    """`dp2-tp2-pp2` on eight ranks."""
    figure = Figure(720, 330, "The mesh of dp2-tp2-pp2: eight ranks by stage, replica and shard")
    for stage, blocks in enumerate(("embed, blocks 0 to 3", "blocks 4 to 7, head")):
        x = 20 + stage * 360
        figure.rect(x, 40, 320, 230, "group", corner=8)
        figure.text(x, 28, f"pp: stage {stage}", "title")
        figure.text(x + 320, 28, blocks, "small", anchor="end")
        for replica in range(2):
            y = 60 + replica * 115
            figure.text(x + 159, y + 12, f"dp: replica {replica}", "small", anchor="middle")
            for part in range(2):
                rank = stage * 4 + replica * 2 + part
                figure.box(x + 14 + part * 160, y + 20, 130, 50, f"rank {rank}\ntp: half {part}", "ab"[replica])
            figure.arrow((x + 146, y + 45), (x + 172, y + 45), both=True)
        figure.arrow((x + 79, 132), (x + 79, 193), both=True)
        figure.arrow((x + 239, 132), (x + 239, 193), both=True)
    figure.arrow((321, 105), (393, 105), both=True)
    figure.arrow((321, 220), (393, 220), both=True)
    figure.text(20, 294, "tp: activations, in every block   ·   dp: gradients, once per step", "small")
    figure.text(20, 313, "pp: activations and their gradients at the cut, once per microbatch", "small")
    return figure


def _one_f_one_b(microbatches: int) -> list[list[tuple[str, int, float, float]]]:
    """Returns pass, microbatch, start and end on two ranks; a backward pass takes as long as two forward passes."""
    orders = [
        [("F", 0), *[(k, m + (k == "F")) for m in range(microbatches - 1) for k in "FB"], ("B", microbatches - 1)],
        [(k, m) for m in range(microbatches) for k in "FB"],
    ]
    ends: dict[tuple[str, int, int], float] = {}
    rows: list[list[tuple[str, int, float, float]]] = [[], []]
    clock = [0.0, 0.0]
    while any(orders):
        for rank, order in enumerate(orders):
            if not order:
                continue
            kind, microbatch = order[0]
            other = ("F", microbatch, 0) if kind == "F" and rank else ("B", microbatch, 1) if kind == "B" else None
            needed = other if other != (kind, microbatch, rank) else None
            if needed is not None and needed not in ends:
                continue
            start = max(clock[rank], ends[needed] if needed else 0.0)
            clock[rank] = ends[kind, microbatch, rank] = start + (1 if kind == "F" else 2)
            rows[rank].append((kind, microbatch, start, clock[rank]))
            order.pop(0)
    return rows


def stages() -> Figure:
    """A model cut into two stages, and the 1F1B schedule."""
    figure = Figure(720, 290, "A model cut into two stages, and the order of forward and backward passes")
    modules = ["embed", "block 0", "block 1", "block 2", "block 3", "head", "loss"]
    figure.text(20, 30, "One model", "title")
    for number, name in enumerate(modules):
        figure.box(20 + number * 98, 44, 78, 36, name, "a" if number < 3 else "b")
        if number:
            figure.arrow((number * 98, 62), (number * 98 + 19, 62))
    figure.cut(304, 36, 92)
    figure.text(304, 108, "cut: hidden states are sent", "small", anchor="middle")
    figure.text(20, 140, "One step with 4 microbatches, schedule 1F1B", "title")
    unit = 40
    for rank, row in enumerate(_one_f_one_b(4)):
        y = 156 + rank * 48
        figure.text(20, y + 23, f"rank {rank}")
        for kind, microbatch, start, end in row:
            figure.box(
                90 + start * unit,
                y,
                (end - start) * unit,
                36,
                f"{kind}{microbatch}",
                "ab"[rank] if kind == "F" else "c",
            )
    figure.text(
        20, 275, "F: forward, B: backward, with the number of the microbatch. The gaps are the bubble.", "small"
    )
    return figure


def ghosts() -> Figure:
    """The same step on two stages."""
    figure = Figure(720, 250, "Both ranks run the same step; weights of other stages are ghosts")
    modules = ["embed", "block 0", "block 1", "block 2", "block 3", "head", "loss"]
    for rank in range(2):
        y = 44 + rank * 100
        figure.text(20, y - 14, f"rank {rank}: training_step", "title")
        for number, name in enumerate(modules):
            own = number < 3 if rank == 0 else number >= 3
            if rank == 0 and not own:
                continue
            figure.box(20 + number * 98, y, 78, 36, name, "ab"[rank] if own else "ghost")
            if number:
                figure.arrow((number * 98, y + 18), (number * 98 + 19, y + 18))
    figure.text(310, 66, "sends the hidden states and leaves the step", "small")
    figure.arrow((255, 81), (255, 112), (353, 112), (353, 142))
    figure.text(362, 116, "replaces the ghost at the entry of block 2", "small")
    figure.box(20, 206, 40, 22, "", "ghost")
    figure.text(70, 222, "ghost: shape, dtype and device, but no storage. Nothing is computed.", "small")
    return figure


def regions() -> Figure:
    """A column-wise and a row-wise layer."""
    figure = Figure(720, 270, "A tensor region: a column-wise layer, an activation, a row-wise layer, an all-reduce")
    figure.box(20, 116, 70, 40, "x")
    figure.rect(118, 18, 434, 226, "group", corner=8)
    figure.text(130, 38, "region: no communication", "small")
    for rank in range(2):
        y, kind = 52 + rank * 104, "ab"[rank]
        figure.text(130, y + 70, f"rank {rank}", "small")
        figure.box(130, y, 116, 52, "up: half of the\noutput channels", kind)
        figure.box(280, y, 96, 52, "activation\n(own half)", kind)
        figure.box(410, y, 128, 52, "down: half of the\ninput channels", kind)
        figure.arrow((91, 136), (110, 136), (110, y + 26), (129, y + 26))
        figure.arrow((247, y + 26), (279, y + 26))
        figure.arrow((377, y + 26), (409, y + 26))
        figure.arrow((539, y + 26), (566, y + 26), (566, 136), (581, 136))
    figure.box(582, 116, 72, 40, "all-reduce", "c")
    figure.arrow((655, 136), (674, 136))
    figure.box(675, 116, 28, 40, "y")
    return figure


def relayout() -> Figure:
    """From `fsdp4` to `pp4`."""
    figure = Figure(720, 280, "A change from fsdp4 to pp4: what each rank keeps and receives")
    figure.text(60, 30, "fsdp4", "title")
    figure.text(420, 30, "pp4", "title")
    for rank in range(4):
        y = 46 + rank * 48
        figure.text(14, y + 22, f"rank {rank}", "small")
        for block in range(4):
            x = 60 + block * 66
            figure.rect(x, y, 58, 34, "ghost")
            figure.rect(x + rank * 14.5, y, 14.5, 34, "a" if block == rank else "box", corner=0)
            figure.rect(x + 360, y, 58, 34, "ghost")
            if block == rank:
                figure.rect(x + 360, y, 58, 34, "c")
                figure.rect(x + 360 + rank * 14.5, y, 14.5, 34, "a", corner=0)
    figure.arrow((336, 136), (404, 136))
    for block in range(4):
        for x in (60, 420):
            figure.text(x + block * 66 + 29, 250, f"block {block}", "small", anchor="middle")
    for x, kind, text in ((60, "a", "kept"), (150, "c", "received, once"), (290, "box", "sent to its new rank")):
        figure.rect(x, 258, 14, 14, kind, corner=2)
        figure.text(x + 20, 270, text, "small")
    return figure


FIGURES: tuple[Callable[[], Figure], ...] = (mesh, stages, ghosts, regions, relayout)


def main() -> None:
    """Writes all figures beside this file."""
    for figure in FIGURES:
        (Path(__file__).parent / f"{figure.__name__}.svg").write_text(figure().svg())


if __name__ == "__main__":
    main()
