"""Convolutions: products of patches, or the gradient of each example by shifted inputs.

The gradient with respect to the kernel at one offset is a matrix product of the inputs shifted by
this offset and the output's cotangents. Written so, it takes the operations of an ordinary weight
gradient; as the transpose of a mapped convolution it would be a grouped convolution, which XLA runs
about 80 times slower on CPU. The weighted sum over examples takes the same form.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl.engine.factors import Factors
from jaxmtl.engine.primitives.primitive import Primitive
from jaxmtl.engine.program import PARAM, Use

_MAX_OFFSETS = 128


def _has_gradients(use: Use) -> bool:
    """Tells whether ``_gradients`` covers this use: one kernel for all steps, of moderate size."""
    if use.name != "conv_general_dilated" or len(use.ins) != 2:
        return False
    if use.ins[1].kind != PARAM or use.ins[0].kind == PARAM or use.ins[1].loops:
        return False
    params = use.eqn.params
    spatial = [use.ins[1].aval.shape[a] for a in params["dimension_numbers"].rhs_spec[2:]]
    return params["batch_group_count"] == 1 and math.prod(spatial) <= _MAX_OFFSETS


def _gradients(use: Use, x: jax.Array, y: jax.Array, summed: bool = False) -> jax.Array:
    """Returns the gradient of the kernel for each example, or their sum.

    Args:
      use: A supported convolution.
      x: Its inputs, ``(examples, *loops, *input shape)``.
      y: Cotangents of its outputs, ``(examples, *loops, *output shape)``.
      summed: Whether to sum over the examples.

    Returns:
      ``(examples, *kernel shape)``, or ``kernel shape``.
    """
    out_spec = use.eqn.params["dimension_numbers"].out_spec
    kernel = use.ins[1].aval
    groups = use.eqn.params["feature_group_count"]
    dtype = jnp.result_type(x, y)
    lhs_spec, rhs_spec, _ = use.eqn.params["dimension_numbers"]
    depth = len(use.loops)
    x, y = _in_batch(x, depth, lhs_spec[0]), _in_batch(y, depth, out_spec[0])
    y = lax.transpose(y, [0, out_spec[0] + 1, *(a + 1 for a in out_spec[2:]), out_spec[1] + 1])
    window = [kernel.shape[a] for a in rhs_spec[2:]]
    per_group = kernel.shape[rhs_spec[1]], kernel.shape[rhs_spec[0]] // groups
    products = [
        _one_offset(shifted, y, groups, per_group, summed, dtype) for shifted in _shifted(use, x)
    ]
    lead = 0 if summed else 1
    stacked = jnp.stack(products, axis=lead)
    stacked = stacked.reshape(*stacked.shape[:lead], *window, *stacked.shape[lead + 1 :])
    # Now (examples, *window, inputs, outputs); to the kernel's own order.
    order = [lead + len(window) + 1, lead + len(window), *range(lead, lead + len(window))]
    inverse = [0] * len(rhs_spec)
    for axis, source in zip(rhs_spec, order, strict=True):
        inverse[axis] = source
    return lax.transpose(stacked, [*range(lead), *inverse]).astype(kernel.dtype)


def _in_batch(x: jax.Array, depth: int, batch: int) -> jax.Array:
    """Returns ``(examples, *loops, *shape)`` with the steps of all loops in the batch axis."""
    if not depth:
        return x
    loops, rest = range(1, 1 + depth), range(1 + depth, x.ndim)
    x = lax.transpose(x, [0, *rest[:batch], *loops, *rest[batch:]])
    shape = (*x.shape[: 1 + batch], -1, *x.shape[2 + batch + depth :])
    return x.reshape(shape)


def _shifted(use: Use, x: jax.Array) -> list[jax.Array]:
    """Returns what each offset of the kernel meets, ``(examples, batch, *space, channels)``."""
    params = use.eqn.params
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    x = lax.transpose(x, [0, lhs_spec[0] + 1, *(a + 1 for a in lhs_spec[2:]), lhs_spec[1] + 1])
    padding = [(0, 0, 0), (0, 0, 0)]
    padding += [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [*padding, (0, 0, 0)])
    space = [use.outs[0].aval.shape[a] for a in out_spec[2:]]
    found = []
    for offset in itertools.product(*(range(use.ins[1].aval.shape[a]) for a in rhs_spec[2:])):
        starts = [o * d for o, d in zip(offset, params["rhs_dilation"], strict=True)]
        strides = params["window_strides"]
        limits = [s + (n - 1) * w + 1 for s, n, w in zip(starts, space, strides, strict=True)]
        ends = [*x.shape[:2], *limits, x.shape[-1]]
        found.append(lax.slice(x, [0, 0, *starts, 0], ends, [1, 1, *strides, 1]))
    return found


def _factors(use: Use) -> Factors | None:
    """Returns the factors of a convolution without groups; X are the patches that it meets."""
    if not _has_gradients(use) or use.eqn.params["feature_group_count"] != 1:
        return None
    _, rhs_spec, out_spec = use.eqn.params["dimension_numbers"]
    depth = len(use.loops)
    # Of X: steps, batch and space, then the window and the channels.
    positions = depth + 1 + len(rhs_spec) - 2
    own = [*rhs_spec[2:], rhs_spec[1]]
    left = tuple((axis, positions + i) for i, axis in enumerate(own))
    return Factors((), left, ((rhs_spec[0], depth + out_spec[1]),))


def _patches(use: Use, x: jax.Array, factors: Factors) -> jax.Array:
    """Returns ``(examples, *positions, *window, channels)``, positions as in the cotangent."""
    steps = x.shape[: 1 + len(use.loops)]
    x = x.reshape(-1, *x.shape[len(steps) :])
    _, rhs_spec, out_spec = use.eqn.params["dimension_numbers"]
    window = [use.ins[1].aval.shape[a] for a in rhs_spec[2:]]
    patches = jnp.stack(_shifted(use, x), axis=-2)
    places = dict(zip((out_spec[0], *out_spec[2:]), range(1, patches.ndim), strict=False))
    order = [places[axis] for axis in sorted(places)]
    patches = lax.transpose(patches, [0, *order, patches.ndim - 2, patches.ndim - 1])
    return patches.reshape(*steps, *patches.shape[1:-2], *window, patches.shape[-1])


def _one_offset(
    x: jax.Array,
    y: jax.Array,
    groups: int,
    per_group: tuple[int, int],
    summed: bool,
    dtype: jnp.dtype,
) -> jax.Array:
    """Returns ``(examples, inputs per group, outputs)``, without examples if summed."""
    positions = range(0 if summed else 1, x.ndim - 1)
    inputs, outputs = per_group
    examples = [] if summed else [0]
    if groups == 1:
        numbers = ((positions, positions), (examples, examples))
        return lax.dot_general(x, y, numbers, preferred_element_type=dtype)
    x = x.reshape(*x.shape[:-1], groups, inputs)
    y = y.reshape(*y.shape[:-1], groups, outputs)
    if inputs * outputs <= 16:
        # Groups this narrow are sums of elementwise products rather than matrix products.
        parts = [
            jnp.sum(x[..., i, None] * y, axis=tuple(positions), dtype=dtype) for i in range(inputs)
        ]
        found = jnp.stack(parts, axis=-3)  # (..., inputs, groups, outputs)
    else:
        batch = [*examples, x.ndim - 2]
        numbers = ((positions, positions), (batch, batch))
        found = lax.dot_general(x, y, numbers, preferred_element_type=dtype)
        found = jnp.moveaxis(found, -3, -2)
    return found.reshape(*found.shape[:-2], groups * outputs)


RULES = {
    "conv_general_dilated": Primitive(
        factors=_factors,
        left=_patches,
        has_gradients=_has_gradients,
        gradients=_gradients,
        reason="convolution: the gradients of examples are products of shifted inputs",
        is_linear=True,
    )
}
