"""The route of separate data: one loss function and one batch per task, each on its own."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmtl import arguments, linalg, separate
from jaxmtl.engine.route import Options, Pull

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaves", "tasks", "rows"],
    meta_fields=["of_leaves", "in_turn"],
)
@dataclasses.dataclass
class Residual:
    """What the pullback needs.

    Attributes:
      leaves: The parameters.
      tasks: The differentiated losses, empty where there are rows.
      rows: For each leaf its rows ``(k, *leaf.shape)``, None where no task depends on it or rows
        are not kept.
      of_leaves: For each leaf, the tasks of these rows.
      in_turn: Whether one gradient is to be added before the next is computed.
    """

    leaves: list[jax.Array]
    tasks: list[separate.Task]
    rows: list[jax.Array | None]
    of_leaves: tuple[tuple[int, ...], ...]
    in_turn: bool


class Separate:
    """The losses of m tasks, each on its own batch, their Gramian; see `Route`."""

    features: Any = None

    def __init__(
        self,
        options: Options,
        params: PyTree,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        needs_gramian: bool = True,
    ) -> None:
        leaves, treedef = arguments.parameters(params)
        self._params, self._leaves = params, leaves
        self._shared = arguments.shared_leaves(options.shared, params)
        self._tasks, self.aux = separate.evaluate(
            options.losses_fn, options.has_aux, leaves, treedef, args, kwargs
        )
        self.losses = jnp.stack([task.loss for task in self._tasks])
        m = len(self._tasks)
        self._names = self.aux.names or tuple(str(i) for i in range(m))
        self._size = min(options.chunk_size or m, m)
        self._rows: separate.Rows | None = None
        if needs_gramian and self._size == m:
            self._rows = separate.stack(
                {i: t.gradient() for i, t in enumerate(self._tasks)}, len(leaves)
            )
        kept = self._rows or []
        residual = Residual(
            leaves,
            [] if self._rows else self._tasks,
            [rows for _, rows in kept],
            tuple(tasks for tasks, _ in kept),
            self._size < m,
        )
        self.pullback = jax.tree_util.Partial(Pull(treedef, self._shared, _pull), residual)

    def gramian(self) -> jax.Array:
        """Returns the ``(m, m)`` Gramian, symmetric to the last bit."""
        return linalg.symmetric(self.cross(self))

    def balanced_gramian(self) -> tuple[jax.Array, jax.Array]:
        """Returns the Gramian as `linalg.balanced_gramian` does, safe from overflow."""
        if self._rows is None:
            table, largest = self._in_turn(self, scaled=True)
            exponent = jnp.frexp(largest)[1]
            return linalg.in_one_scale(linalg.symmetric(table), largest > 0, exponent)
        m, dtype = len(self._tasks), linalg.accumulation_dtype(self._leaves, self.losses)
        largest = jnp.zeros((m,), dtype)
        for (tasks, x), counts in zip(self._rows, self._shared, strict=True):
            if counts and x is not None and x.size:
                top = jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim))).astype(dtype)
                largest = largest.at[np.array(tasks)].max(linalg.whole(top))
        exponent = jnp.frexp(largest)[1]
        scaled: separate.Rows = [
            (tasks, x if x is None else linalg.scale_rows(x, -exponent[np.array(tasks)], dtype))
            for tasks, x in self._rows
        ]
        table = self._products(scaled, scaled, (m, m))
        return linalg.in_one_scale(linalg.symmetric(table), largest > 0, exponent)

    def cross(self, other: "Separate") -> jax.Array:
        """Returns ``J_1 J_2^T``."""
        shape = (len(self._tasks), len(other._tasks))
        if self._rows is not None and other._rows is not None:
            return self._products(self._rows, other._rows, shape)
        return self._in_turn(other)[0]

    def _in_turn(self, other: "Separate", scaled: bool = False) -> tuple[jax.Array, jax.Array]:
        """Returns ``J_1 J_2^T`` from one block of kept gradients after the other.

        Args:
          other: The losses of the second batch.
          scaled: Whether each row is divided by two to the power of its exponent.

        Returns:
          The table, and the ``(m,)`` largest entries of J_1 by which its rows were scaled.
        """
        m, num_columns, size = len(self._tasks), len(other._tasks), self._size
        dtype = linalg.accumulation_dtype(self._leaves, self.losses)
        plan = self._schedule(other)
        of_block = np.full((len(plan), size), m)  # m stands for no task
        compared = np.full((len(plan), num_columns), num_columns)
        for k, (block, others) in enumerate(plan):
            of_block[k, : len(block)] = block
            compared[k, others] = others
        users = [
            [sum(leaf in self._counted(task) for task in route._tasks) for route in (self, other)]
            for leaf in range(len(self._leaves))
        ]
        # The gradient of a leaf that one task alone depends on meets only itself.
        own = [other is self and a == 1 for a, _ in users]
        met = [leaf for leaf, (a, b) in enumerate(users) if a and b and not own[leaf]]

        def gradient(task: separate.Task | None) -> tuple[dict[int, jax.Array], jax.Array]:
            grads = task.gradient() if task else {}
            largest = jnp.zeros((), dtype)
            if scaled:
                for leaf, x in grads.items():
                    if self._shared[leaf] and x.size:
                        top = linalg.whole(jnp.max(jnp.abs(x)))
                        largest = jnp.maximum(largest, top.astype(dtype))
                exponent = jnp.frexp(largest)[1]
                grads = {i: linalg.ldexp(x.astype(dtype), -exponent) for i, x in grads.items()}
            return grads, largest

        def kept(i: int) -> tuple[list[jax.Array], jax.Array, jax.Array]:
            grads, largest = gradient(self._tasks[i] if i < m else None)
            square = jnp.zeros((), dtype)
            rows = []
            for leaf, like in enumerate(self._leaves):
                if leaf in grads and own[leaf]:
                    x = grads[leaf][None]
                    square = square + linalg.row_products(x, x, dtype)[0, 0]
                if leaf in met:
                    zeros = jnp.zeros_like(like, dtype if scaled else like.dtype)
                    rows.append(grads.get(leaf, zeros))
            return rows, square, largest

        def column(j: int, rows: list[jax.Array]) -> jax.Array:
            grads, _ = gradient(other._tasks[j] if j < num_columns else None)
            total = jnp.zeros((size,), dtype)
            for leaf, x in zip(met, rows, strict=True):
                if leaf in grads:
                    total = total + linalg.row_products(x, grads[leaf][None], dtype)[:, 0]
            return total

        branches = [functools.partial(kept, i) for i in range(m + 1)]
        columns = [functools.partial(column, j) for j in range(num_columns + 1)]

        def strip(block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            start, tasks, others = block
            rows, squares, largest = lax.map(lambda i: lax.switch(i, branches), tasks)
            table = lax.map(lambda j: lax.switch(j, columns, rows), others).T
            if other is not self:
                return table, largest
            inner = jnp.diag(squares)
            for x in rows:
                inner = inner + linalg.row_products(x, x, dtype)
            padded = jnp.pad(table, ((0, 0), (0, len(plan) * size - num_columns)))
            at = (jnp.zeros_like(start), start)
            return lax.dynamic_update_slice(padded, inner, at), largest

        starts = jnp.arange(len(plan)) * size
        blocks = (starts, jnp.asarray(of_block), jnp.asarray(compared))
        table, largest = lax.map(strip, blocks)
        table = table.reshape(-1, table.shape[-1])[:m, :num_columns]
        if other is self:
            number = np.arange(m) // size
            table = jnp.where(number[:, None] <= number[None, :], table, table.T)
        return table, largest.reshape(-1)[:m]

    def _schedule(self, other: "Separate") -> list[tuple[list[int], list[int]]]:
        """Returns blocks of tasks, and of each the tasks of the other batch to compare it with."""
        m, plan = len(self._tasks), []
        for start in range(0, m, self._size):
            block = list(range(start, min(start + self._size, m)))
            counted = set().union(*(self._counted(self._tasks[i]) for i in block))
            first = block[-1] + 1 if other is self else 0
            later = range(first, len(other._tasks))
            plan.append((block, [j for j in later if counted & self._counted(other._tasks[j])]))
        return plan

    def _counted(self, task: separate.Task) -> set[int]:
        return {leaf for leaf in task.leaves if self._shared[leaf]}

    def _products(
        self, left: separate.Rows, right: separate.Rows, shape: tuple[int, int]
    ) -> jax.Array:
        """Returns the inner products of rows; zero rows are not multiplied."""
        dtype = linalg.accumulation_dtype(self._leaves, self.losses)
        blocks: dict[Any, jax.Array] = {}
        for (i, x), (j, y), counts in zip(left, right, self._shared, strict=True):
            if x is not None and y is not None and counts:
                product = linalg.row_products(x, y, dtype)
                blocks[i, j] = blocks[i, j] + product if (i, j) in blocks else product
        total = jnp.zeros(shape, dtype)
        for (i, j), block in blocks.items():
            total = total + _placed(block, i, j, shape)
        return total

    def explain(self) -> str:
        """Tells which losses depend on each parameter, and how many gradients are computed."""
        m = len(self._tasks)
        text = f"{m} losses on separate batches, one forward pass each; "
        if self._rows is not None:
            text += f"all {m} gradients at once, {m} pulls"
        else:
            plan = self._schedule(self)
            pulls = sum(len(block) + len(others) for block, others in plan)
            text += (
                f"{self._size} gradients at a time, and the one compared with them: {pulls} pulls "
                f"for the Gramian, {m} for the weighted sum"
            )
        found = jax.tree_util.tree_leaves_with_path(self._params)
        names = [jax.tree_util.keystr(path) or "params" for path, _ in found]
        shapes = [f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for _, leaf in found]
        width, longest = max(map(len, names)), max(map(len, shapes))
        lines = [text]
        for leaf, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            users = [n for n, t in zip(self._names, self._tasks, strict=True) if leaf in t.leaves]
            reason = f"rows of {', '.join(users)}"
            if not users:
                reason = "unused: no loss depends on it"
            elif not self._shared[leaf]:
                reason = f"not shared: left out of the Gramian; used by {', '.join(users)}"
            elif len(users) == m:
                reason = "rows of all losses"
            lines.append(f"{name:<{width}}  {shape:<{longest}}  {reason}")
        return "\n".join(lines)


def _placed(
    block: jax.Array, rows: tuple[int, ...], columns: tuple[int, ...], shape: tuple[int, int]
) -> jax.Array:
    """Returns a matrix of zeros but for the block at these rows and columns."""
    if block.shape == shape:
        return block
    inside, index = [], []
    for positions, size in zip((rows, columns), shape, strict=True):
        inside.append(np.isin(np.arange(size), positions))
        index.append(np.cumsum(inside[-1]) - 1)
    known = inside[0][:, None] & inside[1][None, :]
    return jnp.where(known, block[np.maximum(index[0], 0)][:, np.maximum(index[1], 0)], 0)


def _pull(residual: Residual, weights: jax.Array, wanted: Sequence[bool]) -> list[jax.Array]:
    """Returns ``J^T w`` for the wanted leaves; what other leaves get is undefined.

    A task of weight 0, such as an absent one, adds nothing, whatever its batch holds.
    """
    leaves = residual.leaves
    if residual.rows:
        grads = list(leaves)
        for i, (rows, tasks) in enumerate(zip(residual.rows, residual.of_leaves, strict=True)):
            if not wanted[i]:
                continue
            if rows is None:
                grads[i] = jnp.zeros_like(leaves[i])
                continue
            dtype = linalg.accumulation_dtype(leaves)
            chosen = weights if len(tasks) == weights.size else weights[np.array(tasks)]
            rows = jnp.where(linalg.column(chosen, rows) == 0, 0, rows)
            grads[i] = linalg.sum_of_rows(chosen, rows, dtype).astype(leaves[i].dtype)
        return grads
    totals = {
        i: jnp.zeros_like(leaf, linalg.accumulation_dtype(leaf))
        for i, leaf in enumerate(leaves)
        if wanted[i]
    }

    def add(i: int, totals: dict[int, jax.Array]) -> dict[int, jax.Array]:
        grads = residual.tasks[i].pull(weights[i])
        present = {leaf: jnp.where(weights[i] == 0, 0, grads[leaf]) for leaf in grads}
        return totals | {leaf: totals[leaf] + x for leaf, x in present.items() if wanted[leaf]}

    branches = [functools.partial(add, i) for i in range(len(residual.tasks))]
    if residual.in_turn:
        order = jnp.arange(len(branches))
        totals, _ = lax.scan(lambda t, i: (lax.switch(i, branches, t), None), totals, order)
    else:
        for branch in branches:
            totals = branch(totals)
    return [totals[i].astype(leaf.dtype) if i in totals else leaf for i, leaf in enumerate(leaves)]
