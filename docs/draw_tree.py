"""Draw how slices are dealt to ranks, and the tree that their gradients are summed along.

    python docs/draw_tree.py [docs/tree.svg]

Every node, lane and arrow follows from dml_core.gather: `slices_of` says who holds which slice, and `tree` what is
added and sent.
"""

import sys
from pathlib import Path

from dml_core.gather import slices_of, tree

SLICES, WORLDS = 8, (1, 3)
COLUMN, ROW, MARGIN, GAP, TOP = 47, 64, 100, 26, 98  # pixels: of a slice, of a level, and around them
WIDTH, HEIGHT, CORNER = 41, 28, 10  # of a node; of a bent line
STYLE = """
svg { --paper: #fff; --ink: #1f2328; --faint: #636c76; --line: #8c959f; --send: #c2410c;
  --node0: #1d4ed8; --node1: #15803d; --node2: #7e22ce; --lane0: #e6eefc; --lane1: #e3f4e8; --lane2: #f1e8fb }
@media (prefers-color-scheme: dark) { svg { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --line: #7d8590;
  --send: #fb923c; --node0: #2f5fd0; --node1: #1f7a3d; --node2: #7c3fc4;
  --lane0: #131f38; --lane1: #11281a; --lane2: #231636 } }
text { font: 16px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--ink) }
.title { font-size: 18px; font-weight: 600 } .faint { fill: var(--faint) } .middle { text-anchor: middle }
.end { text-anchor: end } .node { fill: #fff; text-anchor: middle; font-size: 15px }
path { fill: none; stroke: var(--line); stroke-width: 1.6 } .send { stroke: var(--send); stroke-width: 2.8 }
.copy { stroke: var(--send); stroke-width: 1.8; stroke-dasharray: 5 4 }
marker path { fill: var(--line); stroke: none } marker .of-send { fill: var(--send) }
"""


class Panel:
    """The tree over slices on so many ranks.

    Args:
        slices: S.
        world: W.
        left: Where its lanes begin.
    """

    def __init__(self, slices: int, world: int, left: int):
        self.slices, self.world, self.left = slices, world, left
        self.shares = [slices_of(rank, world, slices) for rank in range(world)]
        self.holder = [rank for rank, share in enumerate(self.shares) for _ in share]
        self.levels = [*tree(slices, world)]

    def x(self, column: float) -> float:
        """The middle of the column of a slice."""
        return self.left + COLUMN * (column + 0.5)

    def node(self, first: int, last: int, rank: int, row: float) -> str:
        """A sum of the slices first .. last, in the column of the first."""
        x, y = self.x(first) - WIDTH / 2, y_of(row) - HEIGHT / 2
        label = f"{first}" if first == last else f"{first}–{last}"
        box = f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="14" fill="var(--node{rank})"/>'
        return f'{box}<text class="node" x="{self.x(first):g}" y="{y + 19:g}">{label}</text>'

    def lanes(self) -> str:
        """A lane for each rank, with the rows of the global batch at its head."""
        parts, bottom = [], y_of(len(self.levels) + 1) + 34
        for rank, share in enumerate(self.shares):
            x, width = self.x(share.start - 0.5), COLUMN * len(share)
            place = f'x="{x + 2:g}" y="{TOP - 44}" width="{width - 4}" height="{bottom - TOP + 44:g}" rx="8"'
            parts.append(f'<rect {place} fill="var(--lane{rank})"/>')
            parts.append(f'<text class="middle" x="{x + width / 2:g}" y="{TOP - 22}">rank {rank}</text>')
        return "\n".join(parts)

    def draw(self) -> str:
        """Lanes, lines, and nodes on top of them."""
        lines, nodes, row_of = [], [], [0] * self.slices
        nodes += [self.node(number, number, rank, 0) for number, rank in enumerate(self.holder)]
        for row, level in enumerate(self.levels, 1):
            for left, right, to, source in level:
                down = f"M{self.x(left):g} {y_of(row_of[left]):g}V{y_of(row) - HEIGHT / 2 - 1:g}"
                lines.append(f'<path d="{down}" marker-end="url(#added)"/>')
                across = f"M{self.x(right):g} {y_of(row_of[right]):g}V{y_of(row) - CORNER:g}"
                across += f"q0 {CORNER} -{CORNER} {CORNER}H{self.x(left) + WIDTH / 2 + 1:g}"
                sent = to != source
                kind = 'class="send" marker-end="url(#sent)"' if sent else 'marker-end="url(#added)"'
                lines.append(f'<path d="{across}" {kind}/>')
                row_of[left] = row
                nodes.append(self.node(left, min(left + (1 << row), self.slices) - 1, to, row))
        last = len(self.levels) + 1
        for rank, share in enumerate(self.shares[1:], 1):
            bend = y_of(last) - ROW / 2 - CORNER
            copy = f"M{self.x(0):g} {y_of(last - 1):g}V{bend:g}q0 {CORNER} {CORNER} {CORNER}"
            copy += f"H{self.x(share.start) - CORNER:g}q{CORNER} 0 {CORNER} {CORNER}V{y_of(last) - HEIGHT / 2 - 1:g}"
            lines.append(f'<path class="copy" d="{copy}" marker-end="url(#sent)"/>')
            box = self.node(0, self.slices - 1, rank, last)
            nodes.append(f'<g transform="translate({self.x(share.start) - self.x(0):g})">{box}</g>')
        messages = sum(merge.to != merge.source for level in self.levels for merge in level)
        what = f"{messages} messages, 1 broadcast" if messages else "nothing is sent"
        plural = "s" if self.world > 1 else ""
        title = f'<text class="title" x="{self.left + 2}" y="28">{self.world} worker{plural}: {what}</text>'
        return "\n".join([title, self.lanes(), *lines, *nodes])


def y_of(row: float) -> float:
    """The middle of a row: 0 for the slices, then the levels."""
    return TOP + 16 + ROW * row


def draw(slices: int = SLICES, worlds: tuple[int, ...] = WORLDS) -> str:
    """Return the picture, as SVG."""
    panels = [Panel(slices, world, MARGIN + number * (slices * COLUMN + GAP)) for number, world in enumerate(worlds)]
    levels = len(panels[0].levels)
    width, height = panels[-1].left + slices * COLUMN + 10, y_of(levels + 1) + 84
    rows = ["slices", *(f"level {level}" for level in range(1, levels + 1)), "broadcast"]
    names = [
        f'<text class="faint end" x="{MARGIN - 10}" y="{y_of(row) + 5:g}">{name}</text>'
        for row, name in enumerate(rows)
    ]
    y, x = height - 22, MARGIN + 2
    legend = [
        f'<path d="M{x} {y - 5}h40" marker-end="url(#added)"/>',
        f'<text x="{x + 50}" y="{y}">added within a rank</text>',
        f'<path class="send" d="M{x + 264} {y - 5}h40" marker-end="url(#sent)"/>',
        f'<text x="{x + 314}" y="{y}">sent: one gradient</text>',
        f'<path class="copy" d="M{x + 526} {y - 5}h40" marker-end="url(#sent)"/>',
        f'<text x="{x + 576}" y="{y}">the sum, broadcast</text>',
    ]
    marker = (
        '<marker id="{}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" markerHeight="9" '
        'markerUnits="userSpaceOnUse" orient="auto"><path class="{}" d="M0 0L10 5L0 10z"/></marker>'
    )
    listed = ", ".join(map(str, worlds[:-1])) + f" and {worlds[-1]}"
    about = f"The tree over the gradients of {slices} slices, with {listed} workers"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">'
    return "\n".join(
        [
            head,
            f"<title>{about}</title>",
            f"<style>{STYLE}</style>",
            f"<defs>{marker.format('added', 'of-add')}{marker.format('sent', 'of-send')}</defs>",
            '<rect width="100%" height="100%" rx="10" fill="var(--paper)"/>',
            *names,
            *(panel.draw() for panel in panels),
            *legend,
            "</svg>\n",
        ]
    )


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("tree.svg"))
    path.write_text(draw())


if __name__ == "__main__":
    main()
