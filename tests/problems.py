"""What tests of many methods share: pytrees of parameters, gradients in their form, inputs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import BY_NAME, INPUTS

SHAPES = {"a": (2, 3), "b": (), "c": (0,), "d": (1,)}  # 8 numbers: matrix, scalar, nothing, vector


def some(values, quick=1):
    """Parameters, or tuples of them, for a test that compiles much: the first ones are quick."""
    return [
        pytest.param(
            *(x if isinstance(x, tuple) else (x,)), marks=[pytest.mark.slow] * (i >= quick)
        )
        for i, x in enumerate(values)
    ]


# For a test that takes ``precision``: float64 is quick.
WIDE_FIRST = pytest.mark.parametrize("precision", some(["float64", "float32"]), indirect=True)


def _is_shape(x):
    return isinstance(x, tuple) and all(isinstance(i, int) for i in x)


def size_of(shapes=SHAPES):
    """The number of parameters."""
    return sum(map(math.prod, jax.tree.leaves(shapes, is_leaf=_is_shape)))


def params_of(shapes=SHAPES, dtype=None, fill=0):
    """Parameters of one number; ``shapes`` is a pytree whose leaves are shapes."""
    return jax.tree.map(
        lambda shape: jnp.full(shape, fill, dtype or float), shapes, is_leaf=_is_shape
    )


def rows_of(matrix, shapes=SHAPES, dtype=None):
    """Splits the columns of a matrix (m, n) over the leaves: gradients as a pytree."""
    matrix, start = np.asarray(matrix), 0

    def leaf(shape):
        nonlocal start
        block = matrix[:, start : start + math.prod(shape)]
        start += math.prod(shape)
        return jnp.asarray(block.reshape(len(matrix), *shape), dtype or float)

    return jax.tree.map(leaf, shapes, is_leaf=_is_shape)


def flat(update):
    """The leaves of an update as one vector (n,), in float64."""
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(update)])


def flat_rows(tree, lead=1):
    """The leaves as one matrix (m, n), or as (*lead axes, n); works on traced leaves too."""
    leaves = jax.tree.leaves(tree)
    xp = jnp if any(isinstance(x, jax.core.Tracer) for x in leaves) else np  # float64 stays
    return xp.concatenate([xp.reshape(x, (*np.shape(x)[:lead], -1)) for x in leaves], lead)


def normal(seed, *shape):
    """Gaussian numbers by a seed; those of a layer keep the size of what enters it."""
    scale = np.sqrt(shape[-2]) if len(shape) > 1 else 1
    values = np.random.default_rng(seed).normal(size=shape) / scale
    return jnp.asarray(values, jnp.result_type(float))


def indices(seed, high, *shape):
    """Whole numbers below ``high``, by a seed."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape))


def tasks_of(name):
    """The number of tasks on which a method is tested: three, where it takes so few."""
    return max(3, BY_NAME[name].min_tasks)


def inputs_of(name, m, tasks=slice(None), dtype=None):
    """Losses and whatever else a method reads, of m tasks or of those at ``tasks``."""
    inputs = {}
    for key in sorted({"losses", *BY_NAME[name].inputs}):
        value = INPUTS[key](m)[tasks]
        value = value[:, tasks] if value.ndim == 2 else value
        inputs[key] = value.astype(dtype) if dtype else value
    return inputs
