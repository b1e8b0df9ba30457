"""The instance-wise route: one objective per example, from one backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import linalg
from jaxmtl.engine import conv, execute, factors, gather, views
from jaxmtl.engine.build import build
from jaxmtl.engine.factors import Structure
from jaxmtl.engine.plan import Group, Plan, factors_of, make_plan, structure_of
from jaxmtl.engine.program import Use
from jaxmtl.engine.prune import prune

Array = Any


@dataclasses.dataclass
class Pass:
    """What one forward and one backward pass leave behind.

    Attributes:
      plan: static.
      leaves: the parameters.
      constants: inputs that all examples share.
      residuals: per use, its DATA operands, each `(examples, *loops, *shape)`.
      cotangents: per use, those of its tapped outputs, likewise.
    """

    plan: Plan
    leaves: list[Array]
    constants: list[Array]
    residuals: list[tuple[Array, ...]]
    cotangents: list[list[Array]]

    def env(self) -> execute.Env:
        """Return the values that all examples share, as far as they are known."""
        return execute.derive(self.plan.program, self.leaves, self.constants)


def forward_backward(
    fun: Callable[..., tuple[Array, Any]],
    leaves: Sequence[Array],
    args: Sequence[Array],
    axes: Sequence[int | None],
    num_examples: int,
    in_gramian: Sequence[bool],
) -> tuple[Array, Any, Pass]:
    """Evaluate all examples and pull their losses back to the outputs of all uses.

    Args:
      fun: `(leaves, args) -> (loss, aux)` of one example, with flat lists.
      leaves: the parameters.
      args: the other inputs, of which those with an axis are batched.
      axes: the axis of examples of each input, or None.
      num_examples: n.
      in_gramian: for each leaf, whether it is part of the Gramian.

    Returns:
      The `(n,)` losses, aux with a leading axis n, and the `Pass`.
    """
    batched = [i for i, axis in enumerate(axes) if axis is not None]
    traced: list[Any] = []

    def one_example(*example: Array) -> Any:
        inputs = list(args)
        for i, x in zip(batched, example, strict=True):
            inputs[i] = x
        closed, shapes = jax.make_jaxpr(fun, return_shape=True)(list(leaves), inputs)
        program = prune(build(closed, len(leaves), [axis is not None for axis in axes]))
        constants = [*closed.consts, *(x for i, x in enumerate(args) if axes[i] is None)]
        traced.extend([program, constants, jax.tree.structure(shapes[1])])
        env = execute.derive(program, leaves, constants)
        taps = [
            [jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding) for s in tap]
            for tap in execute.tap_shapes(program)
        ]

        def loss(taps: list[list[Array]]) -> Any:
            outs, residuals = execute.run(program, env, example, taps)
            return outs[0], (outs[1:], residuals)

        value, pullback, (aux, residuals) = jax.vjp(loss, taps, has_aux=True)
        (cotangents,) = pullback(jnp.ones_like(value))
        return value, aux, residuals, cotangents

    mapped = jax.vmap(one_example, in_axes=[axes[i] for i in batched])
    losses, aux, residuals, cotangents = mapped(*(args[i] for i in batched))
    program, constants, aux_tree = traced
    plan = make_plan(program, leaves, in_gramian, num_examples)
    done = Pass(plan, list(leaves), constants, residuals, cotangents)
    return losses, jax.tree.unflatten(aux_tree, aux), done


def _rows_of_use(done: Pass, env: execute.Env, use: Use) -> list[Array]:
    """Return per-example cotangents of the use's PARAM operands, `(examples, *shape)` each."""
    residual, cotangents = done.residuals[use.index], done.cotangents[use.index]
    if conv.supported(use):
        return [conv.gradients(use, residual[0], cotangents[0])]
    return jax.vmap(lambda r, c: execute.pull(use, env, r, c))(residual, cotangents)


def group_rows(done: Pass, group: Group) -> dict[int, Array] | Array:
    """Return the rows of a group: of its value for "rows", of each leaf for "leaf rows"."""
    env = done.env()
    for use in group.uses:  # so that nothing is first computed inside a map
        for v in use.ins:
            if v.kind != "data":
                execute.resolve(env, v)
    totals: dict[Any, Array] = {}
    for use in group.uses:
        for value, rows in zip(use.params, _rows_of_use(done, env, use), strict=True):
            totals[value] = totals[value] + rows if value in totals else rows
    if group.method == "rows":
        return totals[group.values[0]]
    values = list(totals)

    def to_leaves(*rows: Array) -> list[Array]:
        cotangents = dict(zip(values, rows, strict=True))
        grads = execute.pull_to_leaves(done.plan.program, done.leaves, done.constants, cotangents)
        return [grads[leaf] for leaf in group.leaves]

    found = jax.vmap(to_leaves)(*(totals[v] for v in values))
    return dict(zip(group.leaves, found, strict=True))


def _factors(done: Pass, group: Group, use: Use) -> tuple[factors.Factor, factors.Factor]:
    found = factors_of(use)
    assert found is not None
    names = views.keys(use.params[0], len(group.values) == 1)
    assert names is not None
    x, y = done.residuals[use.index][0], done.cotangents[use.index][0]
    if found.lookup is not None:
        x = gather.indices(use, x, found.lookup)
    return factors.arrange(found, names, use.params[0].shape, x, y)


def all_rows(done: Pass) -> dict[int, Any]:
    """Return the rows of all groups that are not structured, by position of the group."""
    return {
        i: group_rows(done, group)
        for i, group in enumerate(done.plan.groups)
        if group.method != "factors" and any(done.plan.in_gramian[leaf] for leaf in group.leaves)
    }


def cross_gramian(
    a: Pass, b: Pass, rows_a: dict[int, Any], rows_b: dict[int, Any], shape: tuple[int, int]
) -> Array:
    """Return the inner products of the gradients of two passes through one program."""
    dtype = factors.gramian_dtype(*a.leaves)
    total = jnp.zeros(shape, dtype)
    in_gramian = a.plan.in_gramian
    for i, group in enumerate(a.plan.groups):
        if not any(in_gramian[leaf] for leaf in group.leaves):
            continue
        if group.method == "factors":
            total = total + _structured(a, b, i, dtype)
        elif group.method == "rows":
            total = total + factors.rows_block(rows_a[i], rows_b[i], dtype)
        else:
            for leaf in group.leaves:
                if in_gramian[leaf]:
                    block = factors.rows_block(rows_a[i][leaf], rows_b[i][leaf], dtype)
                    total = total + block
    return total


def _structured(a: Pass, b: Pass, position: int, dtype: Any) -> Array:
    # Two passes have two programs of equal structure.
    group_a, group_b = a.plan.groups[position], b.plan.groups[position]
    alone = len(group_a.values) == 1
    structures = [cast(Structure, structure_of(use, alone)) for use in group_a.uses]
    left = [_factors(a, group_a, use) for use in group_a.uses]
    right = left if a is b else [_factors(b, group_b, use) for use in group_b.uses]
    total = jnp.zeros((), dtype)
    for i, p in enumerate(left):
        for j, q in enumerate(right):
            if a is b and j > i:
                continue
            pairing = structures[i].pairing(structures[j])
            assert pairing is not None
            block = factors.cross_block(p, q, pairing, dtype)
            total = total + (block if a is not b or i == j else block + block.T)
    return total


def gramian(done: Pass, rows: dict[int, Any], num_examples: int) -> Array:
    """Return the `(n, n)` Gramian of one pass, symmetric to the last bit."""
    total = cross_gramian(done, done, rows, rows, (num_examples, num_examples))
    # Fused into its own transpose, the sum would not round alike on both sides.
    total = lax.optimization_barrier(total)
    return (total + total.T) / 2


def kept_rows(done: Pass, rows: Callable[[], dict[int, Any]]) -> dict[int, Any]:
    """Return the rows from which the weighted sum is cheaper than from the uses."""
    if not any(group.keep for group in done.plan.groups):
        return {}
    return {i: r for i, r in rows().items() if done.plan.groups[i].keep}


def _weigh(weights: Array, cotangent: Array) -> Array:
    shaped = weights.reshape(weights.shape + (1,) * (cotangent.ndim - 1))
    return (cotangent * shaped).astype(cotangent.dtype)


def weighted_gradient(
    done: Pass, kept: dict[int, Any], weights: Array, wanted: Sequence[bool]
) -> list[Array]:
    """Return `J^T w` for the wanted leaves; what other leaves get is undefined."""
    env = done.env()
    dtype = factors.gramian_dtype(*done.leaves)
    cotangents: dict[Any, Array] = {}
    from_rows: dict[int, Array] = {}

    def add(value: Any, cotangent: Array) -> None:
        cotangents[value] = cotangents[value] + cotangent if value in cotangents else cotangent

    for i, group in enumerate(done.plan.groups):
        if not any(wanted[leaf] for leaf in group.leaves):
            continue
        if i in kept and group.method == "rows":
            value = group.values[0]
            add(value, linalg.sum_of_rows(weights, kept[i], dtype).astype(value.aval.dtype))
        elif i in kept:
            for leaf, rows in kept[i].items():
                # Groups of disjoint slices of one leaf each have rows of the whole leaf.
                grad = linalg.sum_of_rows(weights, rows, dtype)
                from_rows[leaf] = from_rows[leaf] + grad if leaf in from_rows else grad
        else:
            for use in group.uses:
                for value, cotangent in zip(
                    use.params, _weighted_use(done, env, use, weights), strict=True
                ):
                    add(value, cotangent)
    grads = execute.pull_to_leaves(done.plan.program, done.leaves, done.constants, cotangents)
    for leaf, grad in from_rows.items():
        grads[leaf] = grads[leaf] + grad.astype(grads[leaf].dtype)
    return grads


def _weighted_use(done: Pass, env: execute.Env, use: Use, weights: Array) -> list[Array]:
    residual = done.residuals[use.index]
    cotangents = [_weigh(weights, c) for c in done.cotangents[use.index]]
    if conv.supported(use):
        total = conv.gradients(use, residual[0], cotangents[0], summed=True)
        return [total]
    return execute.pull(use, env, residual, cotangents, over_examples=True)
