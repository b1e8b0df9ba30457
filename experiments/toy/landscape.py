"""The landscape of Liu et al. 2021 (CAGrad): two objectives of two parameters, and its front.

Above the axis x2 = 0 lie two narrow logarithmic valleys, one per objective, which cross at steep
angles; below it two bowls with centers x1 = 7 and x1 = -7, whose minima are the Pareto front.

**The form.** Three papers print the formulas, each with other slips, collected in ``FORMS``:

* MoCo, appendix F.1: a square of the bowls has x1 for x2, the second valley has -7 for 3 and
  -tanh(-x2) for +tanh(-x2). Without x2 the bowls have no floor: both losses fall as x2 does, and
  no point is optimal for any weights.
* Aligned-MTL, appendix C: the bowls are exchanged, hence the optimum of every task weighting but
  the equal one is mirrored at x1 = 0; -tanh(-x2) in the second valley.
* LDC-MTL, appendix A.3: -tanh(-x2) in the second valley.

``PUBLISHED`` is the one that gives what the papers draw. Its front lies above x2 = -8.3551 at
x1 = 0; their bar runs from x1 = -7 to 7 at -8.3552. Figure 1 of LDC-MTL shows the losses of the
starts (9, 9) and (-8.5, 7.5), which one can read off as about (0.8, 6.7) and (0.65, 7.9): this form
has (0.794, 6.691) and (0.655, 7.901), the form printed there (0.794, -6.205) and (0.655, 8.160).

**Reference**: Liu et al. 2021 ("Conflict-averse gradient descent"), figure 2 and their code.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FLOOR = 5e-6  # of the argument of the logarithms


class Form(NamedTuple):
    """A way to write the landscape; the defaults give the published figures."""

    second_valley: float = 3.0  # offset of x1 in the second valley
    sign: float = 1.0  # of tanh(-x2) there
    bowls: tuple[float, float] = (7.0, -7.0)  # centers in x1
    floor: bool = True  # whether the bowls' second square is of x2, or of x1


PUBLISHED = Form()
FORMS = {
    "published figures": PUBLISHED,
    "MoCo, printed": Form(second_valley=-7.0, sign=-1.0, floor=False),
    "Aligned-MTL, printed": Form(sign=-1.0, bowls=(-7.0, 7.0)),
    "LDC-MTL, printed": Form(sign=-1.0),
}


def losses(x: jax.Array, form: Form = PUBLISHED) -> jax.Array:
    """Returns both losses, (2,), at the point x of shape (2,)."""
    x1, x2 = x[0], x[1]
    first = jnp.abs(0.5 * (-x1 - 7) - jnp.tanh(-x2))
    second = jnp.abs(0.5 * (-x1 + form.second_valley) + form.sign * jnp.tanh(-x2) + 2)
    valleys = jnp.log(jnp.maximum(jnp.stack([first, second]), FLOOR)) + 6
    depth = x2 if form.floor else x1
    bowls = ((x1 - jnp.asarray(form.bowls)) ** 2 + 0.1 * (depth + 8) ** 2) / 10 - 20
    above = jnp.maximum(jnp.tanh(0.5 * x2), 0)
    below = jnp.maximum(jnp.tanh(-0.5 * x2), 0)
    return above * valleys + below * bowls


def losses_at(points: np.ndarray, form: Form = PUBLISHED) -> np.ndarray:
    """Returns the losses (..., 2) at points (..., 2)."""
    flat = jnp.asarray(points).reshape(-1, 2)
    return np.asarray(_losses_at(flat, form)).reshape(np.shape(points))


@partial(jax.jit, static_argnames="form")
def _losses_at(points: jax.Array, form: Form) -> jax.Array:
    return jax.vmap(lambda x: losses(x, form))(points)


def minimize_weighted(
    alphas: np.ndarray, form: Form = PUBLISHED, half_width: float = 12.0
) -> np.ndarray:
    """Returns argmin of ``alpha L1 + (1 - alpha) L2`` over a square, (k, 2) for (k,) alphas.

    A search by nested grids, without gradients, in float64: 97 x 97 points, then again around the
    best one, in a square five times narrower, until it is narrower than a ten-thousandth.
    """
    with jax.enable_x64(True):
        centers, width = jnp.zeros((len(alphas), 2)), half_width
        while width > 1e-4:
            centers = _search(centers, jnp.asarray(alphas), width, form, half_width)
            width /= 5
        return np.asarray(centers)


@partial(jax.jit, static_argnames=("form", "half_width"))
def _search(
    centers: jax.Array, alphas: jax.Array, width: jax.Array, form: Form, half_width: float
) -> jax.Array:
    """Returns the best points (k, 2) of grids around the centers (k, 2)."""
    offsets = np.linspace(-1, 1, 97)
    grid = np.stack(np.meshgrid(offsets, offsets, indexing="ij"), axis=-1).reshape(-1, 2)

    def best_of(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        center, alpha = pair
        points = jnp.clip(center[None, :] + width * grid, -half_width, half_width)
        return points[jnp.argmin(_losses_at(points, form) @ jnp.stack([alpha, 1 - alpha]))]

    return lax.map(best_of, (centers, alphas))


@cache
def pareto_set() -> np.ndarray:
    """Returns 201 points (201, 2) of the Pareto set, from the optimum of L2 to that of L1.

    Both bowls are convex in x1 and share their dependence on x2, so that the front is convex and
    every point of it minimizes a weighted sum.
    """
    return minimize_weighted(np.linspace(0, 1, 201))


def distance(points: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Returns the distances (...) of points (..., 2) to a polygonal line (k, 2)."""
    start, side = line[:-1], np.diff(line, axis=0)
    gap = np.asarray(points)[..., None, :] - start
    along = np.clip(np.sum(gap * side, -1) / np.sum(side**2, -1), 0, 1)
    return np.linalg.norm(gap - along[..., None] * side, axis=-1).min(axis=-1)
