"""The task route: m losses over one batch.

They are pulled back to the outputs of layers (`Layers`), or at most ``chunk_size`` gradients at a
time are pulled back and pushed forward again (`Linear`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxmtl import arguments, linalg
from jaxmtl.engine import execute, linearity
from jaxmtl.engine.build import REMAT, build
from jaxmtl.engine.heads import Stage, pull, split
from jaxmtl.engine.pieces import has_open_rule
from jaxmtl.engine.plan import describe
from jaxmtl.engine.program import Program, as_function
from jaxmtl.engine.prune import prune
from jaxmtl.engine.route import Options, Pull
from jaxmtl.engine.spread import stacked_last
from jaxmtl.engine.task_pass import Layers
from jaxmtl.engine.task_plan import make_task_plan
from jaxmtl.types import PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["losses", "inputs", "push", "vjp"],
    meta_fields=["is_linear", "chunk_size", "reason"],
)
@dataclasses.dataclass
class Linear:
    """Losses linearised at some inputs.

    Attributes:
      losses: ``(m,)``.
      inputs: What they were linearised in, a list of arrays.
      push: ``inputs -> [(m,)]``, the map J, or None where rows have to be compared.
      vjp: ``[(m,)] -> (inputs,)``, the map J^T, where there is no forward mode.
      is_linear: Whether this map is linear; where it is not, J is the rows of unit cotangents.
      chunk_size: How many rows exist at a time.
      reason: Why there is no forward mode.
    """

    losses: jax.Array
    inputs: list[jax.Array]
    push: Callable[..., Any] | None
    vjp: Callable[..., Any] | None
    is_linear: bool
    chunk_size: int | None
    reason: str | None

    def row(self, cotangent: jax.Array) -> list[jax.Array]:
        """Returns one backward pass, one array per input."""
        push: Any = self.push
        pullback = self.vjp or jax.linear_transpose(push, self.inputs)
        (grads,) = pullback([cotangent.astype(self.losses.dtype)])
        return list(grads)

    def pull(self, weights: jax.Array, wanted: Sequence[bool]) -> list[jax.Array]:
        """Returns ``J^T w``, one array per wanted input."""

        def row(cotangent: jax.Array) -> list[jax.Array]:
            return list(itertools.compress(self.row(cotangent), wanted))

        if self.is_linear:
            return row(weights)
        return weighted_rows(row, self.losses, weights, self.chunk_size)

    def rows(self, first: jax.Array | int = 0, count: int | None = None) -> list[jax.Array]:
        """Returns rows of J, one array ``(count, *shape)`` per input; the last again at the end."""
        units = linalg.units(self.losses)
        if count is not None:
            units = units[jnp.minimum(first + jnp.arange(count), len(units) - 1)]
        return jax.vmap(self.row)(units)


def weighted_rows(
    row: Callable[[jax.Array], list[jax.Array]],
    losses: jax.Array,
    weights: jax.Array,
    chunk_size: int | None,
) -> list[jax.Array]:
    """Returns the weighted sum of the rows of unit cotangents, ``chunk_size`` of them at a time."""
    m = losses.shape[0]
    size = min(chunk_size or m, m)
    count = -(-m // size)
    padded = jnp.pad(weights, (0, count * size - m)).reshape(count, size)
    units = linalg.units(losses)[jnp.minimum(jnp.arange(count * size), m - 1)]

    def step(total: list[jax.Array], chunk: Any) -> tuple[list[jax.Array], None]:
        some, units = chunk
        rows = jax.vmap(row)(units)
        sums = [linalg.sum_of_rows(some, x, y.dtype) for x, y in zip(rows, total, strict=True)]
        return [x + y for x, y in zip(total, sums, strict=True)], None

    like = jax.eval_shape(row, units[0])
    start = [jnp.zeros(x.shape, linalg.accumulation_dtype(x)) for x in like]
    chunks = padded, units.reshape(count, size, m)
    if count == 1:
        total, _ = step(start, jax.tree.map(lambda x: x[0], chunks))
    else:
        total, _ = lax.scan(step, start, chunks)
    return [x.astype(y.dtype) for x, y in zip(total, like, strict=True)]


def trace(
    fun: Callable[..., tuple[jax.Array, Any]], inputs: Sequence[jax.Array]
) -> tuple[Any, tuple[Any, Any]]:
    """Returns the jaxpr of ``inputs -> (losses, aux)``, and the shapes of the two."""
    closed, (losses, aux) = jax.make_jaxpr(fun, return_shape=True)(list(inputs))
    arguments.check_task_losses(losses.shape)
    return closed, (losses, aux)


def linearize(
    fun: Callable[..., tuple[jax.Array, Any]],
    inputs: Sequence[jax.Array],
    chunk_size: int | None = None,
    needs_push: bool = True,
) -> tuple[Linear, Any]:
    """Linearises ``inputs -> (losses, aux)``.

    Args:
      fun: Function of a list of arrays.
      inputs: Where to linearize it.
      chunk_size: How many rows may exist at a time.
      needs_push: Whether rows will be compared; otherwise one backward pass is all.

    Returns:
      The `Linear`, and aux.
    """
    inputs = list(inputs)
    closed, (losses, aux) = trace(fun, inputs)
    flat = as_function(closed)
    is_open = has_open_rule(closed.jaxpr)

    def split(inputs: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        first, *rest = jax.tree.leaves(fun(inputs)) if is_open else flat(*inputs)
        return [first], rest

    narrow = _narrow(closed, inputs)
    custom = first_custom(closed.jaxpr)
    push: Any = None
    vjp: Any = None
    is_linear = True
    if needs_push and not narrow and not custom:
        (losses,), push, rest = jax.linearize(split, inputs, has_aux=True)
    else:
        found: Any = jax.vjp(split, inputs, has_aux=True)
        (losses,), vjp, rest = found
        if custom:
            is_linear = linearity.is_linear(jax.make_jaxpr(vjp)([losses]))
        if not narrow and is_linear:
            push = jax.tree_util.Partial(_transposed, vjp, losses)
    linear = Linear(losses, inputs, push, vjp, is_linear, chunk_size, narrow or custom)
    return linear, jax.tree.unflatten(jax.tree.structure(aux), rest)


def _transposed(vjp: Callable[..., Any], losses: jax.Array, rows: list[jax.Array]) -> Any:
    (found,) = jax.linear_transpose(lambda cotangent: vjp(cotangent)[0], [losses])(rows)
    return found


def _narrow(closed: Any, inputs: Sequence[jax.Array]) -> str | None:
    """Returns why pushed rows would be rounded, at which small eigenvalues are lost, or None."""
    if any(jnp.finfo(x.dtype).bits < 32 for x in inputs):
        return "parameters are narrower than float32 and their rows are accumulated in float32"

    def is_narrow(eqn: Any) -> str | None:
        for v in eqn.outvars:
            dtype = getattr(v.aval, "dtype", bool)
            if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
                return f"{eqn.primitive.name} computes in {dtype}, and Gramians in float32"
        return None

    return _first(closed.jaxpr, is_narrow)


def first_custom(jaxpr: Any) -> str | None:
    """Returns what has no forward mode, or may have a backward pass that is not linear, or None."""

    def is_custom(eqn: Any) -> str | None:
        if eqn.primitive.name == "custom_vjp_call":
            return "custom_vjp_call has no forward mode"
        if any(hasattr(v.aval, "inner_aval") for v in eqn.outvars):
            return "mutable arrays have no forward mode"
        return None

    return _first(jaxpr, is_custom)


def _first(jaxpr: Any, find: Callable[[Any], str | None]) -> str | None:
    """Returns the first finding among the equations that depend on the inputs."""
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        is_reached = any(not isinstance(v, jex.Literal) and v in reached for v in eqn.invars)
        is_state = any(hasattr(v.aval, "inner_aval") for v in eqn.outvars)
        if not is_reached and not is_state:
            continue
        reached.update(eqn.outvars)
        found = find(eqn)
        if found or eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
            if found:
                return found
            continue
        for inner in jex.jaxprs_in_params(eqn.params):
            found = _first(getattr(inner, "jaxpr", inner), find)
            if found:
                return found
    return None


class Tasks:
    """The losses of m tasks, linearised in what their Gramian is taken with respect to.

    See `Route`; a subclass sets ``pullback``, and ``of`` to the name of what it is.
    """

    of = "the parameters"
    features: Any = None
    pullback: jax.tree_util.Partial

    def __init__(self, linear: Linear, aux: Any) -> None:
        self._linear = lambda: linear
        self.losses = linear.losses
        self.aux = aux

    @property
    def linear(self) -> Linear:
        """The losses, linearised."""
        return self._linear()

    def gramian(self) -> jax.Array:
        """Returns the ``(m, m)`` Gramian, symmetric to the last bit."""
        return linalg.symmetric(self.cross(self))

    def balanced_gramian(self) -> tuple[jax.Array, jax.Array]:
        """Returns the Gramian as `linalg.balanced_gramian` does, safe from overflow."""
        table, nonzero, exponent = self._table(self, scaled=True)
        return linalg.in_one_scale(linalg.symmetric(table), nonzero, exponent)

    def cross(self, other: "Tasks") -> jax.Array:
        """Returns ``J_1 J_2^T``, one chunk of columns after the other."""
        return self._table(other, scaled=False)[0]

    def _table(self, other: "Tasks", scaled: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns ``J_1 J_2^T``, and of J_2 whether rows are not zero, and their exponents.

        If ``scaled``, of two equal sides, each row is divided by two to the power of its exponent.
        """
        a, b = self.linear, other.linear
        dtype = linalg.accumulation_dtype(a.inputs, a.losses)
        if a.push is None:
            return _by_rows(a, b, dtype, scaled)
        num_b = b.losses.shape[0]
        size = min(a.chunk_size or 1, num_b)
        num_chunks = -(-num_b // size)
        unit = jnp.pad(linalg.units(b.losses), ((0, num_chunks * size - num_b), (0, 0)))

        def column(cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            rows = [x[None] for x in b.row(cotangent)]
            nonzero, exponent = _exponents(rows, 1, dtype, scaled)
            rows = linalg.scale_rows(rows, -exponent, dtype) if scaled else rows
            inputs = [x[0].astype(y.dtype) for x, y in zip(rows, a.inputs, strict=True)]
            (losses,) = a.push(inputs)  # type: ignore[misc]
            return losses.astype(dtype), nonzero[0], exponent[0]

        if num_chunks == 1:
            table, nonzero, exponent = jax.vmap(column)(unit)
        elif size == 1:
            table, nonzero, exponent = lax.map(column, unit)
        else:
            found = lax.map(jax.vmap(column), unit.reshape(num_chunks, size, num_b))
            table, nonzero, exponent = jax.tree.map(
                lambda x: x.reshape(-1, *x.shape[2:])[:num_b], found
            )
        table = table.T
        if scaled:
            table = linalg.ldexp(table, -exponent[:, None])
        return table, nonzero, exponent

    def explain(self) -> str:
        """Tells how rows are contracted."""
        linear, m = self.linear, self.losses.shape[0]
        some = f"gradients of {self.of}, {min(linear.chunk_size or 1, m)} at a time"
        if linear.vjp is None:
            return f"{some}, pushed through the linearised losses"
        if linear.push is not None:
            return f"{some}, pushed through the transposed backward pass: {linear.reason}"
        text = f"all gradients of {self.of} at once, row against row: {linear.reason}"
        if linear.chunk_size is not None and linear.chunk_size < m:
            blocks = -(-m // linear.chunk_size)
            pulls = linear.chunk_size * blocks * (blocks + 1) // 2
            text = f"{some}, row against row in {pulls} backward passes: {linear.reason}"
        if not linear.is_linear:
            text += "; a backward pass is not linear, so that the pullback is a sum of rows"
        return text


def _exponents(
    rows: list[jax.Array], m: int, dtype: jnp.dtype, scaled: bool
) -> tuple[jax.Array, jax.Array]:
    if scaled:
        return linalg.row_exponents(rows, m, dtype)
    return jnp.ones((m,), bool), jnp.zeros((m,), jnp.int32)


def _by_rows(
    a: Linear, b: Linear, dtype: jnp.dtype, scaled: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `Tasks._table` from products of rows, two chunks of which exist at a time."""
    num_a, num_b = a.losses.shape[0], b.losses.shape[0]
    size = min(a.chunk_size or max(num_a, num_b), max(num_a, num_b))

    def chunk(linear: Linear, position: jax.Array | int) -> Any:
        count = min(size, linear.losses.shape[0])
        rows = linear.rows(position * size, count)
        nonzero, exponent = _exponents(rows, count, dtype, scaled)
        rows = linalg.scale_rows(rows, -exponent, dtype) if scaled else rows
        return rows, nonzero, exponent

    def products(x: list[jax.Array], y: list[jax.Array]) -> jax.Array:
        total: Any = jnp.zeros((), dtype)
        for some, others in zip(x, y, strict=True):
            total = total + linalg.row_products(some, others, dtype)
        return total

    of_a, of_b = -(-num_a // size), -(-num_b // size)
    if of_a == of_b == 1:
        rows, nonzero, exponent = chunk(b, 0)
        return products(rows if a is b else chunk(a, 0)[0], rows), nonzero, exponent
    if a is not b:

        def line(i: jax.Array) -> jax.Array:
            rows = chunk(a, i)[0]
            return lax.map(lambda j: products(rows, chunk(b, j)[0]), jnp.arange(of_b))

        table = lax.map(line, jnp.arange(of_a))  # (chunks, chunks', size, size)
        table = table.transpose(0, 2, 1, 3).reshape(of_a * table.shape[2], -1)
        return table[:num_a, :num_b], jnp.ones((num_b,), bool), jnp.zeros((num_b,), jnp.int32)

    # Chunk i, then the chunks before it: each step pulls one and compares it with chunk i.
    pairs = jnp.asarray([(i, j) for i in range(of_a) for j in (i, *range(i))])

    def step(held: Any, pair: jax.Array) -> tuple[Any, Any]:
        rows, *about = chunk(a, pair[1])
        held = [jnp.where(pair[0] == pair[1], x, y) for x, y in zip(rows, held, strict=True)]
        return held, (products(held, rows), *about)

    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: chunk(a, 0)[0]))
    _, (blocks, nonzero, exponent) = lax.scan(step, start, pairs)
    table = jnp.zeros((of_a, of_a, size, size), dtype).at[pairs[:, 0], pairs[:, 1]].set(blocks)
    lower = table.transpose(0, 2, 1, 3).reshape(of_a * size, of_a * size)[:num_a, :num_a]
    table = linalg.mirrored(lower)
    diagonal = jnp.asarray([i * (i + 1) // 2 for i in range(of_a)])
    return table, nonzero[diagonal].reshape(-1)[:num_a], exponent[diagonal].reshape(-1)[:num_a]


class PerTask(Tasks):
    """The losses of m tasks over one batch, their Gramian with respect to shared parameters."""

    def __init__(
        self,
        options: Options,
        params: PyTree,
        call: Callable[[PyTree], tuple[jax.Array, Any]],
        needs_gramian: bool = True,
        data: Sequence[Any] = (),
    ) -> None:
        """Evaluates ``call``, the losses function with its data, and linearises it.

        Args:
          options: What the user asked for.
          params: The parameters.
          call: ``params -> (losses, aux)``.
          needs_gramian: Whether the Gramian will be asked for.
          data: Arrays that ``call`` closes over and that are no part of the model.
        """
        leaves, treedef = arguments.parameters(params)
        shared = arguments.shared_leaves(options.shared, params)
        self._params = params

        def of_leaves(wanted: Sequence[bool]) -> tuple[Linear, Any]:
            def losses(inputs: list[jax.Array]) -> tuple[jax.Array, Any]:
                found = iter(inputs)
                full = [next(found) if w else x for x, w in zip(leaves, wanted, strict=True)]
                return call(jax.tree.unflatten(treedef, full))

            inputs = [x for x, w in zip(leaves, wanted, strict=True) if w]
            return linearize(losses, inputs, options.chunk_size, needs_gramian)

        self.layers: Layers | None = None
        self._why_not = ""
        if needs_gramian:
            traced = trace(lambda leaves: call(jax.tree.unflatten(treedef, leaves)), leaves)
            traced = stacked_last(traced[0], leaves), traced[1]
            self.layers, self._why_not = _layers(traced, leaves, shared, options.chunk_size, data)
        if self.layers is not None:
            aux = jax.tree.unflatten(jax.tree.structure(traced[1][1]), self.layers.aux)
            self.losses, self.aux = self.layers.losses, aux
            self._linear = functools.cache(lambda: of_leaves(shared)[0])
            layers = self.layers
            residual: Any = layers.leaves, layers.constants, layers.forward.pulls
            one = functools.partial(
                _pull_layers, layers.plan.program, layers.forward.stages, self.losses.dtype
            )
            as_gradients = Pull(treedef, shared, one)
        else:
            # Where no rows are compared, one forward pass serves all parameters.
            parts = [(True,) * len(leaves)]
            if needs_gramian and not all(shared):
                parts = [shared, tuple(not flag for flag in shared)]
            found = [of_leaves(part) for part in parts]
            super().__init__(*found[0])
            residual = [linear for linear, _ in found]
            one = functools.partial(_pull, parts)
            as_gradients = Pull(treedef, shared, one, needs_gramian)
        self.pullback = jax.tree_util.Partial(as_gradients, residual)

    def _table(self, other: Tasks, scaled: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        if self.layers is not None and other is self:
            return self.layers.table(linalg.accumulation_dtype(self.layers.leaves), scaled)
        return super()._table(other, scaled)

    def explain(self) -> str:
        """Tells for every parameter which path it takes, or how whole gradients are contracted."""
        if self.layers is None:
            return super().explain() + (f"; {self._why_not}" if self._why_not else "")
        found = jax.tree_util.tree_leaves_with_path(self._params)
        names = [jax.tree_util.keystr(path) or "params" for path, _ in found]
        leaves = [leaf for _, leaf in found]
        own = [False] * len(leaves)
        return describe(self.layers.plan, names, leaves, own, "rows of the tasks")


def _layers(
    traced: Any,
    leaves: list[jax.Array],
    shared: tuple[bool, ...],
    chunk_size: int | None,
    data: Sequence[Any],
) -> tuple[Layers | None, str]:
    """Returns the losses pulled back to the outputs of layers, or why that is not done."""
    closed, (losses, _) = traced
    m = losses.shape[0]
    if chunk_size is not None and chunk_size < m:
        return None, "without chunk_size the gradients of dense layers need not be formed"
    if _narrow(closed, leaves) or first_custom(closed.jaxpr) or has_open_rule(closed.jaxpr):
        return None, ""
    if _has_remat(closed.jaxpr):
        return None, "so that what is computed again in the backward pass is not stored"
    if jax.sharding.get_abstract_mesh().size > 1:
        return None, "so that gradients and no activations are sent between devices"
    known = {id(x) for x in data}
    program = prune(build(closed, len(leaves), [id(x) in known for x in closed.consts]))
    if any(use.probed for use in program.uses):
        return None, ""
    parts = split(program)
    plan, reason = make_task_plan(program, shared, m, parts.of_use)
    if reason and chunk_size is None:
        return None, reason
    return Layers(plan, parts, leaves, list(map(jnp.asarray, closed.consts))), ""


def _has_remat(jaxpr: Any) -> bool:
    """Tells whether parts of a function are computed again, but for the body of a scan."""
    return any(
        eqn.primitive.name in REMAT
        or any(
            _has_remat(getattr(inner, "jaxpr", inner))
            for inner in jex.jaxprs_in_params(eqn.params)
            if eqn.primitive.name != "scan"
        )
        for eqn in jaxpr.eqns
    )


def _pull_layers(
    program: Program,
    stages: list[Stage],
    dtype: jnp.dtype,
    residual: Any,
    weights: jax.Array,
    wanted: Sequence[bool],
) -> list[jax.Array]:
    leaves, constants, pulls = residual
    cotangents = pull(stages, pulls, weights.astype(dtype))
    return execute.pull_to_leaves(program, leaves, constants, cotangents)


def _pull(
    parts: Sequence[Sequence[bool]],
    residual: Sequence[Linear],
    weights: jax.Array,
    wanted: Sequence[bool],
) -> list[Any]:
    """Returns ``J^T w`` for the wanted leaves, each linearised in one of the parts."""
    grads: list[Any] = [None] * len(wanted)
    for part, linear in zip(parts, residual, strict=True):
        leaves = [i for i, flag in enumerate(part) if flag]
        flags = [wanted[i] for i in leaves]
        if any(flags):
            found = linear.pull(weights, flags)
            for i, grad in zip(itertools.compress(leaves, flags), found, strict=True):
                grads[i] = grad
    return grads
