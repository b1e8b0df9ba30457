"""The instance-wise route: one objective per example, from one backward pass."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import arguments, linalg
from jaxmtl.engine import execute, factors
from jaxmtl.engine.build import build
from jaxmtl.engine.factors import Outer
from jaxmtl.engine.paths import Part
from jaxmtl.engine.plan import Group, Plan, describe, make_plan, take_rows_in_remat
from jaxmtl.engine.primitives import rule_of
from jaxmtl.engine.program import DATA, PARAM, Use, Value
from jaxmtl.engine.prune import prune
from jaxmtl.engine.route import Options, Pull
from jaxmtl.engine.small import Products, constants
from jaxmtl.types import PyTree

# Of one group: those of each leaf for "leaf rows", those of its value for "rows".
Rows = dict[int, jax.Array]
_OF_VALUE = -1
Scaled = Callable[[jax.Array], jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaves", "constants", "residuals", "cotangents", "own", "kept"],
    meta_fields=["plan"],
)
@dataclasses.dataclass
class Pass:
    """What one forward and one backward pass leave behind.

    An example with k losses counts as k examples here, which differ in their cotangents.

    Attributes:
      plan: Static.
      leaves: The parameters that examples share.
      constants: Inputs that all examples share.
      residuals: Per use, its DATA operands, each ``(examples, *loops, *shape)``.
      cotangents: Per use, those of its tapped outputs, likewise.
      own: The gradients of the slices that examples own, ``(B, k, *shape)``.
      kept: Rows of groups from which the weighted sum is taken, by position of the group.
    """

    plan: Plan
    leaves: list[jax.Array]
    constants: list[jax.Array]
    residuals: list[tuple[jax.Array, ...]]
    cotangents: list[list[jax.Array]]
    own: list[jax.Array]
    kept: dict[int, Rows]

    def env(self) -> execute.Env:
        """Returns the values that all examples share, as far as they are known."""
        return execute.shared_env(self.plan.program, self.leaves, self.constants)

    def rows(self) -> dict[int, Rows]:
        """Returns the rows of all groups that form them whole, by position of the group."""
        plan = self.plan
        return {
            i: self.group_rows(group)
            for i, group in enumerate(plan.groups)
            if group.method != "factors" and plan.counts(group) and not _is_cut(group)
        }

    def group_rows(self, group: Group) -> Rows:
        """Returns the rows of a group that is not structured."""
        totals = self._rows_of_values(self.env(), group.uses)
        if group.method == "rows":
            return {_OF_VALUE: totals[group.values[0]]}

        def to_leaves(rows: list[jax.Array]) -> list[jax.Array]:
            cotangents = dict(zip(totals, rows, strict=True))
            grads = execute.pull_to_leaves(
                self.plan.program, self.leaves, self.constants, cotangents
            )
            return [grads[leaf] for leaf in group.leaves]

        found = jax.vmap(to_leaves)(list(totals.values()))
        return dict(zip(group.leaves, found, strict=True))

    def block_rows(self, group: Group, k: jax.Array | int) -> list[jax.Array]:
        """Returns the rows that count of one block of examples: k, k + blocks, and so on."""

        def cut(x: jax.Array) -> jax.Array:
            return factors.every(x, group.blocks, k)

        of_uses = {use.index for use in group.uses}
        some = dataclasses.replace(
            self,
            residuals=[
                tuple(map(cut, arrays)) if i in of_uses else arrays
                for i, arrays in enumerate(self.residuals)
            ],
            cotangents=[
                list(map(cut, arrays)) if i in of_uses else arrays
                for i, arrays in enumerate(self.cotangents)
            ],
        )
        rows = some.group_rows(group).items()
        return [x for leaf, x in rows if leaf == _OF_VALUE or self.plan.in_gramian[leaf]]

    def of_blocks(
        self, group: Group, function: Callable[[list[jax.Array], jax.Array], jax.Array]
    ) -> jax.Array:
        """Returns ``(examples,)`` values of a function of the rows of a block, and its number."""
        found = jax.lax.map(
            lambda k: function(self.block_rows(group, k), k), jnp.arange(group.blocks)
        )
        return found.T.reshape(-1)

    def products_of_blocks(
        self,
        other: "Pass",
        groups: tuple[Group, Group],
        scaled: Callable[[jax.Array, jax.Array], jax.Array],
        dtype: jnp.dtype,
    ) -> jax.Array:
        """Returns the inner products of rows, of which two blocks exist at a time.

        Args:
          other: Another pass, or the same.
          groups: The group in the plans of both.
          scaled: ``(rows of a block, its number) ->`` these in another scale.
          dtype: In what to accumulate.
        """
        group, of_other = groups

        def rows_of(done: "Pass", group: Group, k: jax.Array | int) -> list[jax.Array]:
            return [scaled(x, jnp.asarray(k)) for x in done.block_rows(group, k)]

        def step(held: list[jax.Array], pair: jax.Array) -> tuple[list[jax.Array], jax.Array]:
            def again() -> list[jax.Array]:
                return rows_of(self, group, pair[0])

            rows = rows_of(other, of_other, pair[1])
            if self is other:
                held = [
                    jnp.where(pair[0] == pair[1], x, y) for x, y in zip(rows, held, strict=True)
                ]
            else:
                held = jax.lax.cond(pair[1] == 0, again, lambda: held)
            products = (linalg.row_products(*z, dtype) for z in zip(held, rows, strict=True))
            return held, sum(products, jnp.zeros((), dtype))

        left, right = group.blocks, of_other.blocks
        order = [
            (i, j) for i in range(left) for j in ((i, *range(i)) if self is other else range(right))
        ]
        pairs = jnp.asarray(order)
        start = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: rows_of(self, group, 0)))
        _, found = jax.lax.scan(step, start, pairs)
        table = jnp.zeros((left, right, *found.shape[1:]), dtype)
        table = table.at[pairs[:, 0], pairs[:, 1]].set(found)
        if self is other:
            table = table.at[pairs[:, 1], pairs[:, 0]].set(found.transpose(0, 2, 1))
        return table.transpose(2, 0, 3, 1).reshape(left * found.shape[1], -1)

    def sum_over_steps(
        self,
        other: "Pass",
        position: int,
        product: Callable[[jax.Array, jax.Array], jax.Array],
        like: jax.Array,
    ) -> jax.Array:
        """Returns the sum of a product of rows, which are formed some steps of a scan at a time.

        Args:
          other: Another pass, or the same.
          position: Of the group in both plans.
          product: Of rows of one parameter and those of the other pass.
          like: Zeros of the shape of the sum.
        """
        groups = self.plan.groups[position], other.plan.groups[position]
        group = groups[0]

        def step(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
            mine = self._rows_of_steps(group, start)
            theirs = mine if self is other else other._rows_of_steps(groups[1], start)
            for leaf, rows in mine.items():
                if self.plan.in_gramian[leaf]:
                    total = total + product(rows, theirs[leaf])
            return total, None

        starts = jnp.arange(0, group.uses[0].loops[0].length, group.steps)
        return jax.lax.scan(step, like, starts)[0]

    def _rows_of_steps(self, group: Group, start: jax.Array) -> Rows:
        """Returns the rows of the entries of leaves that belong to some steps of a scan."""

        def cut(x: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, group.steps, axis)

        of_uses = {use.index for use in group.uses}
        some = dataclasses.replace(
            self,
            residuals=[
                tuple(cut(x, 1) for x in arrays) if i in of_uses else arrays
                for i, arrays in enumerate(self.residuals)
            ],
            cotangents=[
                [cut(x, 1) for x in arrays] if i in of_uses else arrays
                for i, arrays in enumerate(self.cotangents)
            ],
        )
        whole = self.env()
        slices = {v: cut(execute.resolve(whole, v), 0) for v in group.roots}
        totals = some._rows_of_values({**self.env(), **slices}, group.uses)
        inputs = [v for v in group.roots if v.kind == PARAM]

        def of_inputs(arrays: list[jax.Array]) -> list[jax.Array]:
            env = {**self.env(), **slices, **dict(zip(inputs, arrays, strict=True))}
            return [execute.resolve(env, v) for v in totals]

        _, pull = jax.vjp(of_inputs, [slices[v] for v in inputs])
        pulled = jax.vmap(lambda rows: pull(rows)[0])(list(totals.values()))
        found: Rows = {}
        for v, rows in zip(inputs, pulled, strict=True):
            # The plan makes roots of slices of leaves alone, which the type does not tell.
            leaf: Any = v.origin.leaf  # type: ignore[union-attr]
            found[leaf] = found[leaf] + rows if leaf in found else rows
        return found

    def _rows_of_values(self, env: execute.Env, uses: Sequence[Use]) -> dict[Any, jax.Array]:
        """Returns the rows of the PARAM operands of some uses, by operand."""
        for use in uses:  # so that nothing is first computed inside a map
            for v in use.ins:
                if v.kind != DATA:
                    execute.resolve(env, v)
        totals: dict[Any, jax.Array] = {}
        for use in uses:
            for value, rows in zip(use.params, self._rows_of_use(env, use), strict=True):
                totals[value] = totals[value] + rows if value in totals else rows
        return totals

    def _rows_of_use(self, env: execute.Env, use: Use) -> list[jax.Array]:
        """Returns per-example cotangents of the PARAM operands, ``(examples, *shape)`` each."""
        residual, cotangents = self.residuals[use.index], self.cotangents[use.index]
        rule = rule_of(use)
        if use.probed:
            return execute.probed_rows(use, cotangents)
        if rule.gradients is not None and rule.has_gradients(use):
            return [rule.gradients(use, residual[0], cotangents[0], summed=False)]
        return jax.vmap(lambda r, c: execute.pull(use, env, r, c))(residual, cotangents)

    def weighted_use(self, env: execute.Env, use: Use, weights: jax.Array) -> list[jax.Array]:
        """Returns the weighted sums over examples of the cotangents of the PARAM operands."""
        residual = self.residuals[use.index]
        if use.probed:
            rows = execute.probed_rows(use, self.cotangents[use.index])
            return [
                linalg.sum_of_rows(weights, x, linalg.accumulation_dtype(x)).astype(x.dtype)
                for x in rows
            ]
        cotangents = linalg.times_rows(weights, self.cotangents[use.index])
        rule = rule_of(use)
        if rule.gradients is not None and rule.has_gradients(use):
            return [rule.gradients(use, residual[0], cotangents[0], summed=True)]
        return execute.pull(use, env, residual, cotangents, over_examples=True)

    def pieces(self, group: Group, scaled: Scaled, dtype: jnp.dtype) -> "Pieces":
        """Returns what the gradients of a structured group are made of, in another scale."""
        env, small = self.env(), group.small
        if small is None:
            return Pieces([self._outer(part, env, scaled) for part in group.parts], None)

        def resolve(value: Value, known: dict[Value, jax.Array]) -> jax.Array:
            return execute.resolve({**self.env(), **known}, value)

        def known(part: Part, of_output: bool) -> tuple[jax.Array, jax.Array]:
            use = part.use
            if of_output:
                after: Any = use.after
                return self.residuals[after.index][0], scaled(self.cotangents[use.index][0])
            before: Any = use.before
            return self.residuals[use.index][0], scaled(self.cotangents[before.index][0])

        of_values = self._rows_of_values(env, small.uses)
        pulled = small.pull([of_values[v] for v in small.values], resolve)
        rows = {v: scaled(x) for v, x in pulled.items()}
        outers = [
            self._outer_of_sum(part, rows[part.use.outs[0]], env)
            if part.use in small.sums
            else self._outer(part, env, scaled)
            for part in group.parts
        ]
        products = small.products_of(rows, group.parts, outers, known, resolve, dtype)
        return Pieces(outers, products)

    def _outer_of_sum(self, part: Part, rows: jax.Array, env: execute.Env) -> Outer:
        """Returns X, which examples share, and Y of a sum of a parameter times constants."""
        x = constants(part, lambda value: execute.resolve(env, value))
        x = jnp.broadcast_to(x, (rows.shape[0], *x.shape))
        return Outer(*part.arrange(x, rows, lambda value: execute.resolve(env, value)))

    def _outer(self, part: Part, env: execute.Env, scaled: Scaled) -> Outer:
        """Returns X and Y of one part, Y in another scale."""
        use = part.use
        residual, cotangents = self.residuals[use.index], self.cotangents[use.index]
        if part.factors.compute is None:
            x, y = rule_of(use).left(use, residual[0], part.factors), cotangents[0]
            choice: list[jax.Array] = []
        else:
            known = {v: execute.resolve(env, v) for v in use.ins if v.kind != DATA}
            known.update(zip(use.data, residual, strict=True))
            mapped = part.factors.compute
            for loop in reversed((None, *use.loops)):  # over examples, then over the steps of each
                axes = [0 if v.kind == DATA or loop in v.loops else None for v in use.ins]
                mapped = jax.vmap(mapped, in_axes=axes + [0] * len(cotangents))
            x, y, *choice = mapped(*(known[v] for v in use.ins), *cotangents)
        found = part.arrange(x, scaled(y), lambda value: execute.resolve(env, value))
        return Outer(*found, *choice)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["outers", "products"], meta_fields=[]
)
@dataclasses.dataclass
class Pieces:
    """What the gradients of a structured group are made of, with a leading axis of examples."""

    outers: list[Outer]
    products: Products | None

    def table(self, other: "Pieces", group: Group, dtype: jnp.dtype) -> jax.Array:
        """Returns the inner products of the gradients of two passes, or of one with itself."""
        total = jnp.zeros((), dtype)
        left, right = self.outers, other.outers
        for (i, j), pairing in group.pairings.items():
            block = factors.inner_products(left[i], right[j], pairing, dtype)
            if i != j and self is other:
                block = block + block.T
            elif i != j:
                block = block + factors.inner_products(left[j], right[i], pairing, dtype)
            total = total + block
        if self.products is not None and other.products is not None:
            total = total + self.products.table(other.products, dtype)
        return total


def _structured_squares(done: Pass, group: Group, dtype: jnp.dtype, scaled: Scaled) -> jax.Array:
    """Returns the squared norms of the gradients of a structured group, each by itself."""

    def one(pieces: Pieces) -> jax.Array:
        alone = jax.tree.map(lambda x: x[None], pieces)
        return alone.table(alone, group, dtype)[0, 0]

    squares = jax.vmap(one)(done.pieces(group, scaled, dtype))
    return jnp.maximum(squares, 0)  # over several positions the sum can round to below zero


def _own_products(x: jax.Array, y: jax.Array, n: int, dtype: jnp.dtype) -> jax.Array:
    """Returns inner products of gradients (B k, *s) and (B l, *s) of slices that B = n own."""
    x, y = (z.reshape(n, -1, *z.shape[1:]) for z in (x, y))
    axes = range(2, x.ndim)
    blocks = factors.product(x, y, (axes, axes), ((0,), (0,)), dtype)
    same = jnp.eye(n, dtype=bool)[:, None, :, None]
    return jnp.where(same, blocks[:, :, None, :], 0).reshape(n * x.shape[1], n * y.shape[1])


def _forward_backward(
    fun: Callable[..., tuple[jax.Array, Any]],
    leaves: list[jax.Array],
    own: list[jax.Array],
    mapped: list[jax.Array],
    in_gramian: Sequence[bool],
    diagonal: bool,
    needs_gramian: bool,
) -> tuple[jax.Array, Any, Pass]:
    """Evaluates all examples and pulls their losses back to the outputs of all uses.

    Args:
      fun: ``(leaves, own, mapped) -> (losses, aux)`` of one example, with flat lists.
      leaves: The parameters that examples share.
      own: Parameters of which each example has a slice, stacked.
      mapped: The other inputs, stacked.
      in_gramian: For each leaf, whether it is part of the Gramian.
      diagonal: Whether norms alone are wanted.
      needs_gramian: Whether rows will be formed.

    Returns:
      The ``(m,)`` losses, aux with a leading axis of examples, and the `Pass`.
    """
    # What is static about a traced example leaves the map through this list: a jaxpr is no output
    # of a mapped function, and outside the map there is no example to trace it with.
    traced: list[Any] = []
    count = jax.tree.leaves((own, mapped))[0].shape[0]

    def one_example(own: list[jax.Array], mapped: list[jax.Array]) -> Any:
        closed, shapes = jax.make_jaxpr(fun, return_shape=True)(leaves, own, mapped)
        program = prune(build(closed, len(leaves)))
        plan = make_plan(program, in_gramian, count * math.prod(shapes[0].shape), diagonal)
        if needs_gramian:
            take_rows_in_remat(plan)
        traced.extend([plan, closed.consts, shapes])
        env = execute.shared_env(program, leaves, list(map(jnp.asarray, closed.consts)))
        taps = [
            [jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding) for s in tap]
            for tap in execute.tap_shapes(program)
        ]

        def losses(taps: list[list[jax.Array]], own: list[jax.Array]) -> Any:
            outs, residuals = execute.run(program, env, [*own, *mapped], taps)
            return outs[0], (outs[1:], residuals)

        value, pullback, (aux, residuals) = jax.vjp(losses, taps, own, has_aux=True)
        if not value.shape:
            return value, aux, residuals, *pullback(jnp.ones_like(value))
        value, units = value.reshape(-1), linalg.units(value.reshape(-1))
        of_units = jax.vmap(pullback)(units.reshape(-1, *shapes[0].shape))
        residuals = jax.tree.map(lambda x: jnp.broadcast_to(x, (*value.shape, *x.shape)), residuals)
        return value, aux, residuals, *of_units

    losses, aux, residuals, cotangents, of_own = jax.vmap(one_example)(own, mapped)
    plan, constants, (loss_shape, aux_shapes) = traced
    if loss_shape.shape:
        losses, residuals, cotangents = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (losses, residuals, cotangents)
        )
    else:
        of_own = [x[:, None] for x in of_own]
    done = Pass(plan, leaves, list(map(jnp.asarray, constants)), residuals, cotangents, of_own, {})
    return losses, jax.tree.unflatten(jax.tree.structure(aux_shapes), aux), done


def _by_rows(a: Group, b: Group) -> tuple[Group, Group]:
    """Returns a group in two plans, structured in one of them, with the rows of the other."""
    (method,) = {a.method, b.method} - {"factors"}
    return dataclasses.replace(a, method=method), dataclasses.replace(b, method=method)


def _is_cut(group: Group) -> bool:
    """Tells whether the rows of a group are never all there."""
    return group.steps > 0 or group.blocks > 1


class PerExample:
    """One objective, or several, per example; see `Route`."""

    features: Any = None

    def __init__(
        self,
        options: Options,
        params: PyTree,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        needs_gramian: bool = True,
        diagonal: bool = False,
    ) -> None:
        leaves, treedef = arguments.parameters(params)
        shared = arguments.shared_leaves(options.shared, params)
        examples = arguments.match(options.in_axes, params, args)
        common, own = examples.split(leaves)
        in_gramian, self._own_in_gramian = examples.split(shared)

        def one_example(
            common: list[jax.Array], own: list[jax.Array], mapped: list[jax.Array]
        ) -> tuple[jax.Array, Any]:
            params = jax.tree.unflatten(treedef, examples.join(common, own))
            losses, aux = options.call(params, *examples.arguments(mapped), **kwargs)
            arguments.check_example_losses(losses.shape)
            return losses, aux

        self.losses, self.aux, self._pass = _forward_backward(
            one_example, common, own, examples.mapped, in_gramian, diagonal, needs_gramian
        )
        self._rows = functools.cache(self._pass.rows)
        self._params, self._examples = params, examples
        groups = self._pass.plan.groups
        if needs_gramian and any(group.keep for group in groups):
            kept = {i: rows for i, rows in self._rows().items() if groups[i].keep}
            self._pass.kept = kept
        pull = Pull(treedef, shared, functools.partial(_pull, examples.own))
        self.pullback = jax.tree_util.Partial(pull, self._pass)

    def gramian(self) -> jax.Array:
        """Returns the ``(m, m)`` Gramian, symmetric to the last bit."""
        return linalg.symmetric(self.cross(self))

    def balanced_gramian(self) -> tuple[jax.Array, jax.Array]:
        """Returns the Gramian as `linalg.balanced_gramian` does, safe from overflow."""
        nonzero, exponent = self._exponents()
        return linalg.in_one_scale(
            linalg.symmetric(self._products(self, -exponent)), nonzero, exponent
        )

    def norms(self) -> jax.Array:
        """Returns the norms (m,) of the gradients, of a pass with ``diagonal``."""
        done, dtype = self._pass, self._dtype()
        _, exponent = self._exponents()

        def scaled(rows: jax.Array) -> jax.Array:
            return linalg.scale_rows(rows, -exponent, dtype)

        def squares(rows: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(scaled(rows)), axis=range(1, rows.ndim))

        total = jnp.zeros(self.losses.shape, dtype)
        for i, group in enumerate(done.plan.groups):
            if not done.plan.counts(group):
                continue
            if group.method == "factors":
                total = total + _structured_squares(done, group, dtype, scaled)
                continue
            if group.steps:
                total = done.sum_over_steps(done, i, lambda x, _: squares(x), total)
                continue
            if group.blocks > 1:

                def of_block(rows: list[jax.Array], k: jax.Array, group: Group = group) -> Any:
                    some = -factors.every(exponent, group.blocks, k)
                    return sum(
                        jnp.sum(
                            jnp.square(linalg.scale_rows(x, some, dtype)), axis=range(1, x.ndim)
                        )
                        for x in rows
                    )

                total = total + done.of_blocks(group, of_block)
                continue
            for leaf, rows in self._rows()[i].items():
                if leaf == _OF_VALUE or done.plan.in_gramian[leaf]:
                    total = total + squares(rows)
        for x, counts in zip(done.own, self._own_in_gramian, strict=True):
            if counts:
                total = total + squares(x.reshape(-1, *x.shape[2:]))
        return linalg.ldexp(jnp.sqrt(total), exponent)

    def _dtype(self) -> jnp.dtype:
        return linalg.accumulation_dtype(self._pass.leaves, self._pass.own)

    def _exponents(self) -> tuple[jax.Array, jax.Array]:
        """Returns which rows are not zero, and a power of two of the size of each."""
        done = self._pass
        used = [done.cotangents[use.index] for group in done.plan.groups for use in group.uses]
        m = self.losses.shape[0]
        own = [x.reshape(m, *x.shape[2:]) for x in done.own]

        def largest(rows: list[jax.Array], _: jax.Array) -> jax.Array:
            found = [jnp.max(jnp.abs(x), axis=range(1, x.ndim)) for x in rows]
            return functools.reduce(jnp.maximum, found)

        cut = [
            done.of_blocks(group, largest)
            for group in done.plan.groups
            if group.blocks > 1 and done.plan.counts(group)
        ]
        return linalg.row_exponents([used, self._rows(), own, cut], m, self._dtype())

    def cross(self, other: "PerExample") -> jax.Array:
        """Returns the inner products with the gradients of another batch."""
        return self._products(other)

    def _products(self, other: "PerExample", exponent: jax.Array | None = None) -> jax.Array:
        """Returns the inner products; with ``exponent`` of the rows times two to its power."""
        a, b = self._pass, other._pass
        dtype = linalg.accumulation_dtype(a.leaves, a.own)

        def scaled(rows: jax.Array) -> jax.Array:
            return rows if exponent is None else linalg.scale_rows(rows, exponent, dtype)

        def products(x: jax.Array, y: jax.Array) -> jax.Array:
            return linalg.row_products(scaled(x), scaled(y), dtype)

        total = jnp.zeros((self.losses.shape[0], other.losses.shape[0]), dtype)
        last = None
        for i, group in enumerate(a.plan.groups):
            if not a.plan.counts(group):
                continue
            # Two passes have two programs of equal structure.
            both = group, b.plan.groups[i]
            if group.method == both[1].method == "factors":
                mine = a.pieces(group, scaled, dtype)
                others = mine if a is b else b.pieces(both[1], scaled, dtype)
                total = total + mine.table(others, group, dtype)
                continue
            differ = group.method != both[1].method  # what is cheaper depends on how many there are
            if group.steps and not differ:
                total = a.sum_over_steps(b, i, products, total)
                continue
            if differ or max(g.blocks for g in both) > 1:
                both = _by_rows(*both) if differ else both

                def of_block(rows: jax.Array, k: jax.Array, group: Group = group) -> jax.Array:
                    if exponent is None:
                        return rows
                    return linalg.scale_rows(rows, factors.every(exponent, group.blocks, k), dtype)

                total = total + a.products_of_blocks(b, both, of_block, dtype)
                continue
            for leaf, rows in self._rows()[i].items():
                if leaf != _OF_VALUE and not a.plan.in_gramian[leaf]:
                    continue
                theirs = other._rows()[i][leaf]
                if rows.ndim > 2:  # Vectors may be cotangents, whose products layers share.
                    rows, theirs = linalg.after(last, (rows, theirs))
                last = products(rows, theirs)
                total = total + last
        for x, y, counts in zip(a.own, b.own, self._own_in_gramian, strict=True):
            if counts:
                x, y = (z.reshape(-1, *z.shape[2:]) for z in (x, y))
                total = total + _own_products(scaled(x), scaled(y), len(a.own[0]), dtype)
        return total

    def explain(self) -> str:
        """Tells for every parameter which path it takes, and why."""
        found = jax.tree_util.tree_leaves_with_path(self._params)
        names = [jax.tree_util.keystr(path) or "params" for path, _ in found]
        return describe(self._pass.plan, names, [leaf for _, leaf in found], self._examples.own)


def over_examples(
    options: Options, params: PyTree, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[PyTree], tuple[jax.Array, Any]]:
    """Returns the losses of all examples as a function of the parameters."""
    examples = arguments.match(options.in_axes, params, args)

    def call(params: PyTree) -> tuple[jax.Array, Any]:
        leaves, treedef = jax.tree.flatten(params)
        common, own = examples.split(leaves)

        def one_example(own: list[jax.Array], mapped: list[jax.Array]) -> tuple[jax.Array, Any]:
            params = jax.tree.unflatten(treedef, examples.join(common, own))
            losses, aux = options.call(params, *examples.arguments(mapped), **kwargs)
            arguments.check_example_losses(losses.shape)
            return losses.reshape(-1), aux

        losses, aux = jax.vmap(one_example)(own, examples.mapped)
        return losses.reshape(-1), aux

    return call


def _pull(
    own: tuple[bool, ...], done: Pass, weights: jax.Array, wanted: Sequence[bool]
) -> list[jax.Array]:
    """Returns ``J^T w`` for the wanted leaves; what other leaves get is undefined."""
    env = done.env()
    dtype = linalg.accumulation_dtype(done.leaves)
    common = [flag for flag, is_own in zip(wanted, own, strict=True) if not is_own]
    cotangents: dict[Any, jax.Array] = {}
    from_rows: dict[int, jax.Array] = {}

    def add(total: dict[Any, jax.Array], key: Any, x: jax.Array) -> None:
        total[key] = total[key] + x if key in total else x

    for i, group in enumerate(done.plan.groups):
        if not any(common[leaf] for leaf in group.leaves):
            continue
        kept = done.kept.get(i)
        if kept is None and group.bent:
            kept = done.group_rows(group)
        if kept is None:
            for use in group.uses:
                found = done.weighted_use(env, use, weights)
                for value, cotangent in zip(use.params, found, strict=True):
                    add(cotangents, value, cotangent)
            continue
        for leaf, rows in kept.items():
            total = linalg.sum_of_rows(weights, rows, dtype)
            if leaf == _OF_VALUE:
                add(cotangents, group.values[0], total.astype(group.values[0].aval.dtype))
            else:  # Groups of disjoint slices of one leaf each have rows of the whole leaf.
                add(from_rows, leaf, total)
    grads = execute.pull_to_leaves(done.plan.program, done.leaves, done.constants, cotangents)
    for leaf, grad in from_rows.items():
        grads[leaf] = grads[leaf] + grad.astype(grads[leaf].dtype)
    sides = iter(grads), iter([_weighted_slices(weights, x) for x in done.own])
    return [next(sides[is_own]) for is_own in own]


def _weighted_slices(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the weighted gradients (B, *s) of slices that examples own, from (B, k, *s)."""
    dtype = linalg.accumulation_dtype(rows)
    shaped = weights.astype(dtype).reshape(*rows.shape[:2], *(1,) * (rows.ndim - 2))
    return jnp.sum(shaped * rows.astype(dtype), axis=1).astype(rows.dtype)
