"""Two equations whose solutions are networks: Burgers' equation and the lid-driven cavity.

An equation gives residuals at single points, so that any optimizer can be put behind them: means
of squares for first-order methods, the residuals themselves for Gauss-Newton. The reference
solutions are read from files (``burgers_shock.mat``, ``ldc_Re100.mat``).
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.io

Params = list[dict[str, jax.Array]]
Batch = dict[str, tuple[jax.Array, jax.Array]]  # by condition: points (b, 2) and targets (b, q)


def initial_params(key: jax.Array, sizes: Sequence[int]) -> Params:
    """Returns the layers of a tanh network, Glorot's normal weights and zero biases."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (a, b)) * np.sqrt(2 / (a + b)), "b": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def network(params: Params, z: jax.Array) -> jax.Array:
    """Returns the outputs (q,) at one point (2,)."""
    for layer in params[:-1]:
        z = jnp.tanh(z @ layer["w"] + layer["b"])
    out: jax.Array = z @ params[-1]["w"] + params[-1]["b"]
    return out


def derivatives(f: Callable[[jax.Array], jax.Array], z: jax.Array, axis: int) -> jax.Array:
    """Returns f, its first and its second derivative along an axis, stacked (3, q)."""
    unit = jnp.zeros_like(z).at[axis].set(1)

    def once(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(f, (z,), (unit,))

    (value, first), (_, second) = jax.jvp(once, (z,), (unit,))
    return jnp.stack([value, first, second])


class Equation(NamedTuple):
    """An equation with its conditions.

    Attributes:
      name: For tables.
      conditions: Names of what must hold, the equation itself first.
      weights: By condition, the factor of its mean square in the loss.
      sizes: Of the network's layers.
      residuals: ``residuals(condition, params, z, target) -> (q,)`` at one point.
      draw: ``draw(key, counts) -> batch``: points and targets, a batch for each condition.
      solution: From the parameters and points (k, 2) to what the reference knows, (k, p).
      file: Of the reference solution.
      read: From the file's arrays to points (k, 2), values (k, p) and the shape of the grid.
    """

    name: str
    conditions: tuple[str, ...]
    weights: dict[str, float]
    sizes: tuple[int, ...]
    residuals: Callable[[str, Params, jax.Array, jax.Array], jax.Array]
    draw: Callable[[jax.Array, dict[str, int]], Batch]
    solution: Callable[[Params, jax.Array], jax.Array]
    file: str
    read: Callable[[dict[str, np.ndarray]], tuple[np.ndarray, np.ndarray, tuple[int, int]]]

    def losses_fn(self, params: Params, batch: Batch) -> jax.Array:
        """Returns the weighted mean square of each condition's residuals."""
        losses = []
        for name in self.conditions:
            points, targets = batch[name]
            residuals = jax.vmap(functools.partial(self.residuals, name), (None, 0, 0))(
                params, points, targets
            )
            losses.append(self.weights[name] * jnp.mean(jnp.sum(residuals**2, axis=1)))
        return jnp.stack(losses)

    def one_residual(
        self, params: Params, z: jax.Array, target: jax.Array, kind: jax.Array, factor: jax.Array
    ) -> jax.Array:
        """Returns the residuals (q,) of whichever condition ``kind`` counts, times a factor.

        One function for all points, as Gauss-Newton needs it. What a point does not need is
        computed too and left out: dear only for the few points of the border.
        """
        all_of_them = jnp.stack(
            [self.residuals(name, params, z, target) for name in self.conditions]
        )
        return factor * jnp.sum(jnp.where(kind[:, None] == 1, all_of_them, 0), axis=0)

    def points(self, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns points, targets, kinds and factors of all conditions for `one_residual`.

        Half the mean square of all residuals is then half the sum of `losses_fn`, over q.
        """
        total = sum(len(points) for points, _ in batch.values())
        parts = []
        for i, name in enumerate(self.conditions):
            points, targets = batch[name]
            count = len(points)
            kind = jnp.zeros((count, len(self.conditions))).at[:, i].set(1)
            factor = jnp.full(count, np.sqrt(self.weights[name] * total / count))
            parts.append((points, targets, kind, factor))
        joined = [jnp.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        return joined[0], joined[1], joined[2], joined[3]


class Reference(NamedTuple):
    """A reference solution.

    Attributes:
      points: (k, 2).
      values: (k, p).
      shape: Of the grid that the points form.
    """

    points: jax.Array
    values: jax.Array
    shape: tuple[int, int]

    def error(self, found: jax.Array) -> jax.Array:
        """Returns the relative L2 error of values (k, p)."""
        error: jax.Array = jnp.linalg.norm(found - self.values) / jnp.linalg.norm(self.values)
        return error


def load_reference(equation: Equation, data_dir: Path) -> Reference:
    """Returns the reference solution from a folder.

    Raises:
      FileNotFoundError: The file is not there.
    """
    path = data_dir / equation.file
    if not path.exists():
        raise FileNotFoundError(f"expected the reference solution {path}, which is not there")
    points, values, shape = equation.read(scipy.io.loadmat(path))
    return Reference(jnp.asarray(points), jnp.asarray(values), shape)


def burgers() -> Equation:
    """``u_t + u u_x = 0.01 / pi u_xx`` on [-1, 1] x [0, 1], from ``-sin(pi x)``; 0 at both ends.

    A shock forms at x = 0: three in ten points are drawn within 0.1 of it.
    """
    viscosity = 0.01 / np.pi

    def residuals(name: str, params: Params, z: jax.Array, target: jax.Array) -> jax.Array:
        def u(z: jax.Array) -> jax.Array:
            return network(params, z)

        if name != "equation":
            return u(z) - target
        value, u_x, u_xx = derivatives(u, z, 0)
        u_t: jax.Array = jax.jvp(u, (z,), (jnp.array([0.0, 1.0], z.dtype),))[1]
        residual: jax.Array = u_t + value * u_x - viscosity * u_xx
        return residual

    def draw(key: jax.Array, counts: dict[str, int]) -> Batch:
        inside, x, t, side, near = jax.random.split(key, 5)
        points = jax.random.uniform(inside, (counts["equation"], 2))
        across = 2 * points[:, 0] - 1
        shock = 0.1 * across
        across = jnp.where(jax.random.bernoulli(near, 0.7, across.shape), across, shock)
        points = jnp.stack([across, points[:, 1]], 1)
        x0 = jax.random.uniform(x, (counts["initial"],), minval=-1)
        ends = jax.random.rademacher(side, (counts["boundary"],), x0.dtype)
        times = jax.random.uniform(t, (counts["boundary"],))
        return {
            "equation": (points, jnp.zeros((len(points), 1))),
            "initial": (jnp.stack([x0, 0 * x0], 1), -jnp.sin(jnp.pi * x0)[:, None]),
            "boundary": (jnp.stack([ends, times], 1), jnp.zeros((len(times), 1))),
        }

    def read(file: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        x, t = np.meshgrid(file["x"].ravel(), file["t"].ravel(), indexing="ij")
        return np.stack([x.ravel(), t.ravel()], 1), file["usol"].reshape(-1, 1), x.shape

    return Equation(
        "Burgers",
        ("equation", "initial", "boundary"),
        {"equation": 1.0, "initial": 1.0, "boundary": 1.0},
        (2, 16, 16, 16, 1),
        residuals,
        draw,
        lambda params, points: jax.vmap(network, (None, 0))(params, points),
        "burgers_shock.mat",
        read,
    )


def cavity() -> Equation:
    """Steady flow in a unit square whose lid moves, Reynolds number 100: velocities and pressure.

    The reference knows u and v. The lid's speed jumps at its corners, so that points closer than
    0.01 to them are not drawn.
    """
    viscosity = 0.01

    def residuals(name: str, params: Params, z: jax.Array, target: jax.Array) -> jax.Array:
        def fields(z: jax.Array) -> jax.Array:
            return network(params, z)

        if name != "equation":
            return jnp.append((fields(z) - target)[:2], 0)  # the pressure is free
        (value, along_x, along_xx) = derivatives(fields, z, 0)
        (_, along_y, along_yy) = derivatives(fields, z, 1)
        u, v, _ = value
        momentum = u * along_x[:2] + v * along_y[:2] - viscosity * (along_xx + along_yy)[:2]
        momentum += jnp.stack([along_x[2], along_y[2]])
        return jnp.append(momentum, along_x[0] + along_y[1])

    def draw(key: jax.Array, counts: dict[str, int]) -> Batch:
        inside, lid, wall, side = jax.random.split(key, 4)
        points = jax.random.uniform(inside, (counts["equation"], 2))
        x = jax.random.uniform(lid, (counts["lid"],), minval=0.01, maxval=0.99)
        along = jax.random.uniform(wall, (counts["walls"],))
        which = jax.random.randint(side, along.shape, 0, 3)
        zero, one = jnp.zeros_like(along), jnp.ones_like(along)
        left, right = jnp.stack([zero, along], 1), jnp.stack([one, along], 1)
        floor = jnp.stack([along, zero], 1)
        walls = jnp.stack([left, right, floor])[which, jnp.arange(len(along))]
        moving = jnp.zeros((len(x), 3)).at[:, 0].set(1)
        return {
            "equation": (points, jnp.zeros((len(points), 3))),
            "lid": (jnp.stack([x, jnp.ones_like(x)], 1), moving),
            "walls": (walls, jnp.zeros((len(along), 3))),
        }

    def read(file: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        x, y = np.meshgrid(file["x"].ravel(), file["y"].ravel(), indexing="ij")
        points = np.stack([x.ravel(), y.ravel()], 1)
        return points, np.stack([file["u"].ravel(), file["v"].ravel()], 1), x.shape

    return Equation(
        "cavity",
        ("equation", "lid", "walls"),
        {"equation": 1.0, "lid": 1.0, "walls": 1.0},
        (2, 16, 16, 16, 3),
        residuals,
        draw,
        lambda params, points: jax.vmap(network, (None, 0))(params, points)[:, :2],
        "ldc_Re100.mat",
        read,
    )
