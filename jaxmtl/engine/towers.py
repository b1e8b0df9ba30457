"""The rows of losses that end in a tower for each task.

A network of several tasks ends in layers that one task alone reads: a head, a decoder, a tower of
attention. A row that is pulled back from all losses at once, with zeros for the other tasks, passes
their towers too, m times m of them. Here every tower is passed once, by the cotangent of its own
loss; what several tasks read is passed by all cotangents together.

`towers_of` splits a traced function of the losses; `Towers.rows` evaluates and differentiates it.
"""

import collections
import dataclasses
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxmtl.engine.pieces import (
    CALLS,
    Piece,
    Values,
    inputs_of,
    opened,
    outputs_of,
    pieces_of,
    reads,
)
from jaxmtl.engine.program import is_float, operations
from jaxmtl.engine.spread import STACKED, stacked_last


@dataclasses.dataclass(eq=False)
class Towers:
    """A function ``leaves -> (losses, *others)``, cut by who depends on what.

    Attributes:
      closed: The whole.
      trunk: What several tasks depend on.
      heads: For each task, what it alone depends on.
      rest: What no task depends on, the vector of the losses included.
      losses: The variables of the m losses.
    """

    closed: Any
    trunk: Piece
    heads: list[Piece]
    rest: Piece
    losses: list[Any]

    def rows(self, leaves: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Returns what the function returns, and the Jacobian, one array (m, *s) per leaf."""
        jaxpr = self.closed.jaxpr
        values = inputs_of(self.closed, leaves)
        known = set(jaxpr.invars)
        wanted = {v for head in self.heads for v in head.ins}.union(self.losses)
        bounds = [v for v in self.trunk.outs if v in wanted and is_float(v.aval)]
        pull_trunk, shared = _differentiate(self.trunk, values, known, bounds)
        known.update(bounds)
        of_heads: list[Values] = []
        for head, loss in zip(self.heads, self.losses, strict=True):
            if loss not in head.outs:  # Another task depends on it, so that the trunk makes it.
                of_heads.append({loss: jnp.ones_like(values[loss])})
                continue
            pull, read = _differentiate(head, values, known, [loss])
            of_heads.append(dict(zip(read, pull([jnp.ones_like(values[loss])])[0], strict=True)))
        self.rest.add_to(values)

        def stacked(v: Any) -> jax.Array:
            zero = jnp.zeros_like(values[v])
            return jnp.stack([cotangents.get(v, zero) for cotangents in of_heads])

        rows: Values = {}
        if bounds:
            pulled = jax.vmap(pull_trunk)([stacked(v) for v in bounds])[0]
            rows.update(zip(shared, pulled, strict=True))
        for v in jaxpr.invars:
            if v not in rows:
                rows[v] = stacked(v)
            elif any(v in cotangents for cotangents in of_heads):
                rows[v] = rows[v] + stacked(v)
        return outputs_of(jaxpr, values), [rows[v] for v in jaxpr.invars]


def _differentiate(
    piece: Piece, values: Values, known: set[Any], wanted: Sequence[Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """Evaluates a piece and adds its outs to ``values``.

    Args:
      piece: The piece.
      values: What it reads.
      known: The variables that it may be differentiated in.
      wanted: Which of its outs to differentiate.

    Returns:
      The backward pass of these, and the variables that its results belong to.
    """
    read = [v for v in piece.ins if v in known]
    others = [v for v in piece.outs if v not in set(wanted)]

    def run(arrays: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        made = piece.run({**values, **dict(zip(read, arrays, strict=True))})
        return [made[v] for v in wanted], [made[v] for v in others]

    found, pull, rest = jax.vjp(run, [values[v] for v in read], has_aux=True)
    values.update(zip((*wanted, *others), (*found, *rest), strict=True))
    return pull, read


def towers_of(closed: Any, leaves: Sequence[jax.Array]) -> Towers | None:
    """Splits a traced function of the losses; returns None where that would gain nothing.

    The first output has to be a vector of losses that are stacked, as a dict of losses is, and then
    at most scaled, masked or averaged; one task alone has to depend on some product.
    """
    closed = stacked_last(closed, leaves)
    while True:
        jaxpr = closed.jaxpr
        made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        last = made.get(jaxpr.outvars[0])
        if last is None:
            return None
        losses = list(last.invars)
        if not _are_stacked(last, losses, made):
            return None
        tasks = _tasks(jaxpr, losses)
        calls = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in CALLS]
        calls = [eqn for eqn in calls if len({tasks[v] for v in eqn.outvars if tasks[v]}) > 1]
        if not calls:
            break
        closed = opened(closed, leaves, calls)
    m = len(losses)
    groups: dict[int, list[Any]] = {0: [], **{1 << i: [] for i in range(m)}}
    trunk: list[Any] = []
    for eqn in jaxpr.eqns:
        found = 0
        for v in eqn.outvars if eqn is not last else ():
            found |= tasks[v]
        groups.get(found, trunk).append(eqn)
    rest, *heads = groups.values()
    if not any(operations(eqn) for eqns in heads for eqn in eqns):
        return None
    first, *pieces, end = pieces_of(jaxpr, [trunk, *heads, rest])
    return Towers(closed, first, pieces, end, losses)


def _are_stacked(last: Any, losses: Sequence[Any], made: Container[Any]) -> bool:
    """Tells whether an equation makes a vector of several computed scalars."""
    if last.primitive.name not in STACKED:
        return False
    if any(isinstance(v, jex.Literal) or v not in made for v in losses):
        return False
    m = last.outvars[0].aval.shape[0]
    return m > 1 and len(losses) == len(set(losses)) == m


def _tasks(jaxpr: Any, losses: Sequence[Any]) -> dict[Any, int]:
    """Returns, for every variable, a bit for each task that depends on it."""
    tasks: dict[Any, int] = collections.defaultdict(int)
    tasks.update((v, 1 << i) for i, v in enumerate(losses))
    for eqn in reversed(jaxpr.eqns):
        found = 0
        for v in eqn.outvars:  # that of the losses has none
            found |= tasks[v]
        for v in reads(eqn):
            tasks[v] |= found
    return tasks
