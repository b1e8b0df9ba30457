"""The losses of m tasks over one batch, pulled back to the outputs of layers, and their Gramian."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import linalg
from jaxmtl.engine import execute, factors
from jaxmtl.engine.heads import Forward, Split, stages
from jaxmtl.engine.paths import Part
from jaxmtl.engine.plan import Group, Plan
from jaxmtl.engine.primitives import rule_of
from jaxmtl.engine.program import DATA, Use
from jaxmtl.engine.task_plan import largest_output, num_outputs

Table = tuple[jax.Array, jax.Array, jax.Array]  # what `Layers.table` returns


class Layers:
    """One forward pass, whose cotangents are pulled back to the outputs of all uses."""

    def __init__(
        self, plan: Plan, parts: Split, leaves: list[jax.Array], constants: list[jax.Array]
    ) -> None:
        """Evaluates the losses.

        Args:
          plan: Of the losses over one batch.
          parts: Which of its steps one task alone depends on.
          leaves: The parameters.
          constants: What the losses close over, data among them.
        """
        self.plan, self.parts = plan, parts
        self.leaves, self.constants = leaves, constants
        cuts = stages(plan.program, parts, largest_output(plan.program), num_outputs)
        self.forward = Forward(plan.program, cuts, leaves, constants)
        self.losses, self.aux = self.forward.losses, self.forward.aux

    def table(self, dtype: jnp.dtype, scaled: bool) -> Table:
        """Returns ``J J^T``, whether rows are not zero, and their exponents.

        If ``scaled``, each row is divided by two to the power of its exponent. Each group has
        exponents of its own at first, so that no layer waits for the cotangents of the others.
        """
        env = execute.shared_env(self.plan.program, self.leaves, self.constants)
        held: dict[Use, list[jax.Array]] = {}
        waiting = [group for group in self.plan.groups if self.plan.counts(group)]
        found: list[Table] = []

        def consume(taps: dict[Use, list[jax.Array]]) -> jax.Array | None:
            held.update(taps)
            tables: list[Table] = []
            for group in list(waiting):
                if all(use in held for use in group.uses):
                    waiting.remove(group)
                    last = tables[-1][0] if tables else None
                    tables.append(self._of_group(env, group, held, last, dtype, scaled))
                    for use in group.uses:
                        del held[use]
            found.extend(tables)
            return _sum(block for block, _, _ in tables) if tables else None

        self.forward.pull_tasks(consume)
        return _sum_of_tables(found, self.losses.shape[0], dtype)

    def _of_group(
        self,
        env: execute.Env,
        group: Group,
        cotangents: dict[Use, list[jax.Array]],
        last: jax.Array | None,
        dtype: jnp.dtype,
        scaled: bool,
    ) -> Table:
        """Returns the part of a group in the Gramian; ``last`` is that of the group before."""
        m = self.losses.shape[0]
        tasks, some = self._selected(group, cotangents)
        if tasks is not None and len(tasks) > 1 and group.method != "factors":
            some = linalg.after(last, some)  # the rows of one group at a time
        block, nonzero, exponent = self._block(env, group, some, tasks, dtype, scaled)
        if tasks is None:
            return block, nonzero, exponent
        at = jnp.asarray(tasks)
        return (
            jnp.zeros((m, m), dtype).at[at[:, None], at].set(block),
            jnp.zeros((m,), bool).at[at].set(nonzero),
            jnp.zeros((m,), exponent.dtype).at[at].set(exponent),
        )

    def _selected(
        self, group: Group, cotangents: dict[Use, list[jax.Array]]
    ) -> tuple[list[int] | None, list[list[jax.Array]]]:
        """Returns the tasks that depend on a group, None for all, and the cotangents of each."""
        m, of_use = self.losses.shape[0], self.parts.of_use
        known = [of_use.get(use) for use in group.uses]
        tasks = None if None in known else sorted({i for i in known if i is not None})
        order = range(m) if tasks is None else tasks
        found = []
        for use, task in zip(group.uses, known, strict=True):
            some = cotangents[use]
            if task is not None:  # zeros for the other tasks
                place, count = list(order).index(task), len(order)
                some = [_at(x, place, count) for x in some]
            found.append(some)
        return tasks, found

    def _block(
        self,
        env: execute.Env,
        group: Group,
        cotangents: list[list[jax.Array]],
        tasks: list[int] | None,
        dtype: jnp.dtype,
        scaled: bool,
    ) -> Table:
        """Returns the part of a group in the Gramian of some tasks, as `table` does."""
        count = cotangents[0][0].shape[0]
        nonzero, exponent = jnp.ones((count,), bool), jnp.zeros((count,), jnp.int32)
        if scaled:
            nonzero, exponent = linalg.row_exponents(cotangents, count, dtype)

        def columns(x: jax.Array, first: int, last: int) -> jax.Array:
            return linalg.scale_rows(x, -exponent[first:last], dtype) if scaled else x

        def both(table: jax.Array) -> jax.Array:
            return linalg.ldexp(table, -exponent[:, None]) if scaled else table

        if group.method == "factors":
            total = jnp.zeros((count, count), dtype)
            outers = [
                self._factors(part, cotangents[group.uses.index(part.use)], env)
                for part in group.parts
            ]
            for (i, j), pairing in group.pairings.items():
                block = both(
                    factors.products_of_tasks(outers[i], outers[j], pairing, columns, dtype)
                )
                if outers[i] is outers[j]:
                    block = linalg.mirrored(block)
                else:
                    block = linalg.written(block)
                    block = block + block.T
                total = total + block
            return total, nonzero, exponent
        push, pull = self._maps(env, group)
        if not group.chunk_size:
            if tasks is None:
                rows = jax.vmap(pull)(cotangents)
            else:
                rows = self._rows_apart(env, group, cotangents, tasks)
            total = _sum(factors.by_blocks(x, x, columns, 0, True, dtype) for x in rows)
            return linalg.mirrored(both(total)), nonzero, exponent

        def column(j: jax.Array) -> jax.Array:
            one = jax.tree.map(lambda x: x[j], cotangents)
            if scaled:
                one = jax.tree.map(lambda x: x[None], one)
                one = linalg.scale_rows(one, -exponent[j][None], dtype)
                one = jax.tree.map(lambda x, y: x[0].astype(y.dtype), one, cotangents)
            pushed = push(pull(one))
            return _sum(
                linalg.row_products(x, y[None], dtype)[:, 0]
                for x, y in zip(jax.tree.leaves(cotangents), jax.tree.leaves(pushed), strict=True)
            )

        if group.chunk_size >= count:
            block = jax.vmap(column, out_axes=1)(jnp.arange(count))
        else:
            block = lax.map(column, jnp.arange(count), batch_size=group.chunk_size).T
        return both(block), nonzero, exponent

    def _rows_apart(
        self, env: execute.Env, group: Group, cotangents: list[list[jax.Array]], tasks: list[int]
    ) -> list[jax.Array]:
        """Returns the rows of tasks that have uses of their own, each pulled through these."""
        rows = []
        for place, task in enumerate(tasks):
            chosen = [k for k, use in enumerate(group.uses) if self.parts.of_use[use] == task]
            own = dataclasses.replace(group, uses=[group.uses[k] for k in chosen])
            _, pull = self._maps(env, own)
            rows.append(pull([[x[place] for x in cotangents[k]] for k in chosen]))
        return [jnp.stack(leaf) for leaf in zip(*rows, strict=True)]

    def _factors(self, part: Part, cotangents: list[jax.Array], env: execute.Env) -> factors.Outer:
        """Returns X, of one row, and Y of a part."""
        use = part.use
        x = rule_of(use).left(use, self.forward.residuals[use][0][None], part.factors)
        return factors.Outer(
            *part.arrange(x, cotangents[0], lambda value: execute.resolve(env, value))
        )

    def _maps(
        self, env: execute.Env, group: Group
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Returns the map from parameters to the outputs of a group of uses, and its transpose."""
        plan = self.plan
        wanted = [leaf for leaf in group.leaves if plan.in_gramian[leaf]]
        for use in group.uses:  # so that nothing is first computed inside a map
            for v in use.ins:
                if v.kind != DATA:
                    execute.resolve(env, v)

        def outputs(inputs: list[jax.Array]) -> list[list[jax.Array]]:
            if group.method == "rows":
                values = {group.values[0]: inputs[0]}
            else:
                given = list(self.leaves)
                for leaf, x in zip(wanted, inputs, strict=True):
                    given[leaf] = x
                fresh = execute.shared_env(plan.program, given, self.constants)
                values = {v: execute.resolve(fresh, v) for v in group.values}
            found = []
            for use in group.uses:
                known = {v: execute.resolve(env, v) for v in use.ins if v.kind != DATA}
                known.update(zip(use.data, self.forward.residuals[use], strict=True))
                known.update((v, values[v]) for v in use.params)
                fun = execute.over_loops(use, use.loops, data_varies=True)
                outs = fun(*(known[v] for v in use.ins))
                found.append([outs[k] for k in use.tapped])
            return found

        if group.method == "rows":
            inputs = [execute.resolve(env, group.values[0])]
        else:
            inputs = [self.leaves[leaf] for leaf in wanted]
        _, push = jax.linearize(outputs, inputs)
        transpose = jax.linear_transpose(push, inputs)
        return push, lambda cotangents: transpose(cotangents)[0]


def _sum(tables: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, tables)


def _at(x: jax.Array, place: int, count: int) -> jax.Array:
    """Returns zeros but for the one row x (1, *s) in its place."""
    if count == 1:
        return x
    return jnp.pad(x, ((place, count - 1 - place), *((0, 0),) * (x.ndim - 1)))


def _sum_of_tables(found: Sequence[Table], m: int, dtype: jnp.dtype) -> Table:
    """Adds tables whose rows and columns are in scales of their own, in one scale for each row."""
    lowest = jnp.iinfo(jnp.int32).min // 4
    nonzero, top = jnp.zeros((m,), bool), jnp.full((m,), lowest, jnp.int32)
    for _, some, exponent in found:
        nonzero |= some
        top = jnp.where(some, jnp.maximum(top, exponent), top)
    top = jnp.where(top == lowest, 0, top)
    total = jnp.zeros((m, m), dtype)
    for table, _, exponent in found:
        shift = jnp.minimum(exponent - top, 0)
        total = total + linalg.ldexp(linalg.ldexp(table, shift[:, None]), shift[None, :])
    return total, nonzero, top
