"""The picture of the README: two conflicting gradients, their mean and UPGrad.

    python notebooks/draw_conflict.py        # writes notebooks/_static/conflict.svg

The arrows are steps, against the gradients, computed by the library.
"""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxmtl

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER / "_ext"))
from arrows import Arrow, picture  # noqa: E402  beside this file, as for Sphinx

# The quiet gradient and the loud one, an obtuse angle apart.
GRADIENTS = jnp.array([[0.5, -1.0], [-2.2, 0.5]])


def aggregate(name: str, jacobian: jnp.ndarray) -> np.ndarray:
    """Returns the method's update of a Jacobian with respect to one array."""
    aggregator = jaxmtl.make(name, num_tasks=len(jacobian))
    params = jnp.zeros(jacobian.shape[1:])
    return np.asarray(aggregator.update(jacobian, aggregator.init(params), params)[0])


def make_picture() -> str:
    """Returns the SVG: left the step of the mean, right that of UPGrad."""
    panels = []
    for name, title in (("linear_scalarization", "mean"), ("upgrad", "UPGrad")):
        update = aggregate(name, GRADIENTS)
        changes = -np.asarray(GRADIENTS) @ update
        arrows = [
            Arrow(-np.asarray(g), f"task{i + 1}", f"−g{'₁₂'[i]}") for i, g in enumerate(GRADIENTS)
        ]
        arrows.append(Arrow(-update, "update", title))
        words = [f"loss {i + 1} {'rises' if c > 0 else 'falls'}" for i, c in enumerate(changes)]
        panels.append((arrows, f"{title}: {words[0]}, {words[1]}"))
    return picture(panels, np.asarray(GRADIENTS), card=True)


if __name__ == "__main__":
    (FOLDER / "_static" / "conflict.svg").write_text(make_picture())
