"""Arrows as SVG, which follow the page into light and dark; no library draws them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# In a page the theme's own text color; on a card of its own, fixed.
STYLE = """
.mtl text { font: 13px system-ui, sans-serif; fill: currentColor; }
.mtl .task1 { stroke: #0e86d4; fill: #0e86d4; } .mtl .task2 { stroke: #e0761a; fill: #e0761a; }
.mtl .task3 { stroke: #2c9d5b; fill: #2c9d5b; }
.mtl .update { stroke: currentColor; fill: currentColor; }
.mtl line { stroke-width: 2; } .mtl line.update { stroke-width: 4; }
.mtl .cone { fill: currentColor; fill-opacity: 0.1; stroke: none; }
.mtl text.task1, .mtl text.task2, .mtl text.task3, .mtl text.update { stroke: none; }
"""


class Arrow(NamedTuple):
    """An arrow from the origin."""

    end: np.ndarray  # (2,)
    kind: str  # "task1", "task2", "task3" or "update"
    label: str


def _arrow(arrow: Arrow, origin: np.ndarray, unit: float) -> str:
    end = arrow.end * np.array([unit, -unit])
    length = float(np.linalg.norm(end))
    x0, y0 = origin
    if length < 2:
        return f'<circle class="{arrow.kind}" cx="{x0:.1f}" cy="{y0:.1f}" r="4"/>'
    along = end / length
    across = np.array([-along[1], along[0]])
    width = 8.0 if arrow.kind == "update" else 6.0
    head = min(1.7 * width, length)
    tip, base = origin + end, origin + end - head * along
    corners = (tip, base + width * across / 1.6, base - width * across / 1.6)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    place = tip + 13 * along
    anchor = "start" if along[0] > 0.3 else "end" if along[0] < -0.3 else "middle"
    return (
        f'<line class="{arrow.kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{base[0]:.1f}" '
        f'y2="{base[1]:.1f}"/><polygon class="{arrow.kind}" points="{points}"/>'
        f'<text class="{arrow.kind}" x="{place[0]:.1f}" y="{place[1] + 4:.1f}" '
        f'text-anchor="{anchor}">{arrow.label}</text>'
    )


def _cone(gradients: np.ndarray, origin: np.ndarray, radius: float) -> str:
    """Shades the steps that make no loss worse, to first order: <g_i, step> <= 0 for all i."""
    angles = np.linspace(0, 2 * np.pi, 1441)
    steps = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    good = (steps @ gradients.T <= 1e-9).all(axis=1)
    if good.all() or not good.any():
        return ""
    first = int(np.flatnonzero(good & ~np.roll(good, 1))[0])  # the cone is one arc
    arc = [i % 1440 for i in range(first, first + 1440) if good[i % 1440]]
    edge = origin + radius * steps[arc] * np.array([1, -1])
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [origin, *edge])
    return f'<polygon class="cone" points="{points}"/>'


def picture(
    panels: Sequence[tuple[Sequence[Arrow], str]],
    gradients: np.ndarray,
    *,
    card: bool = False,
    size: float = 250,
) -> str:
    """Returns an SVG with a panel for each list of arrows, the cone of good steps behind them.

    Args:
      panels: Arrows and a caption, for each panel.
      gradients: (m, 2), for the cone.
      card: Whether to put it on a white card, for pages whose colors are not known.
      size: Height of a panel.
    """
    ends = np.concatenate([[a.end for a in arrows] for arrows, _ in panels] + [np.zeros((1, 2))])
    low, high = ends.min(axis=0), ends.max(axis=0)
    margin, caption = 42.0, 34.0 if any(text for _, text in panels) else 0.0
    unit = min((size * 1.45 - 2 * margin) / (high - low)[0], (size - 2 * margin) / (high - low)[1])
    width = (high - low)[0] * unit + 2 * margin
    height = (high - low)[1] * unit + 2 * margin + caption
    width = max(width, 260.0) if caption else width
    parts = []
    for i, (arrows, text) in enumerate(panels):
        spare = (width - (high - low)[0] * unit) / 2
        origin = np.array([i * width + spare - low[0] * unit, margin + high[1] * unit])
        parts.append(
            _cone(gradients, origin, 0.55 * unit * float(np.linalg.norm(ends, axis=1).max()))
        )
        parts.extend(_arrow(arrow, origin, unit) for arrow in arrows)
        if text:
            place = f'x="{(i + 0.5) * width:.1f}" y="{height - 12:.1f}"'
            parts.append(f'<text {place} text-anchor="middle">{text}</text>')
    total = width * len(panels)
    background = (
        f'<rect width="{total:.0f}" height="{height:.0f}" rx="10" fill="#fff"/>' if card else ""
    )
    color = ' color="#222"' if card else ""
    title = "; ".join(text for _, text in panels if text) or "the update beside the gradients"
    return (
        '<svg class="mtl" xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {total:.0f} {height:.0f}" width="{total:.0f}" role="img"{color}>'
        f"<title>{title}</title>"
        f"{f'<style>{STYLE}</style>' if card else ''}{background}{''.join(parts)}</svg>\n"
    )
