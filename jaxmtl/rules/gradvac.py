"""Gradient vaccine: gradients are turned until their cosines reach a running target."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import base, checks, linalg, tasks
from jaxmtl.compiled import compiled
from jaxmtl.registry import method
from jaxmtl.types import Aggregator, PyTree


class GradVacState(NamedTuple):
    """State of `gradvac`.

    Attributes:
      mtl_step: int32 scalar, the number of draws so far.
      target: (m, m) running means of the cosines, phi; (k, m, m) with k parts of the parameters.
    """

    mtl_step: jax.Array
    target: jax.Array


@compiled()
def vaccinate_in_order(
    gramian: jax.Array,
    target: jax.Array,
    orders: jax.Array,
    beta: jax.Array | float,
    task_mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes GradVac's weights and new targets for given orders.

    Args:
      gramian: (m, m).
      target: (m, m), phi.
      orders: Int (m, k); row i lists the tasks that gradient i meets, in order.
      beta: Rate of the running mean.
      task_mask: (m,) bool; absent tasks are not met and have weight 0.

    Returns:
      (m,) weights and the new (m, m) targets.
    """
    m, dtype = gramian.shape[0], gramian.dtype
    eps = jnp.finfo(dtype).eps
    tasks = jnp.arange(m)
    present = jnp.ones((m,), bool) if task_mask is None else task_mask
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))

    def meet(k: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        coefficients, target = carry
        j = orders[:, k]
        products = coefficients @ gramian
        square = jnp.sum(products * coefficients, axis=1)
        running = jnp.sqrt(jnp.maximum(square, 0))
        product = jnp.take_along_axis(products, j[:, None], axis=1)[:, 0]
        defined = (running > 0) & (norms[j] > 0) & (j != tasks) & present[j] & present
        cosine = jnp.where(defined, product / jnp.where(defined, running * norms[j], 1), 0)
        cosine = jnp.clip(cosine, -1, 1)
        phi = target[tasks, j]
        # A target of +-1 is met only by parallel gradients; no finite step reaches it.
        reachable = 1 - phi * phi > eps
        turn = defined & reachable & (cosine < phi)
        sine_phi = jnp.sqrt(jnp.where(turn, 1 - phi * phi, 1))
        sine = jnp.sqrt(jnp.maximum(1 - cosine * cosine, 0))
        # Wang et al. 2021, eq. 3
        amount = running * (phi * sine - cosine * sine_phi)
        amount /= jnp.where(norms[j] > 0, norms[j], 1) * sine_phi
        coefficients = coefficients.at[tasks, j].add(jnp.where(turn, amount, 0))
        step = jnp.where(defined, beta * (cosine - phi), 0)
        return coefficients, target.at[tasks, j].add(step.astype(target.dtype))

    start = (jnp.diag(present.astype(dtype)), target.astype(dtype))
    if not orders.shape[1]:  # m = 1: nobody to meet
        return jnp.sum(start[0], axis=0), start[1]
    coefficients, target = lax.fori_loop(0, orders.shape[1], meet, start)
    return jnp.sum(coefficients, axis=0), target


@method("sum of gradients turned to running target cosines", "Wang 2021", "scale-free")
def gradvac(
    beta: float = 0.5,
    *,
    num_tasks: int,
    parts: str = "whole",
    reduction: str = "sum",
    seed: int = 0,
) -> Aggregator:
    """Turns each gradient until its cosine with the others reaches a running target; sums.

    For each task i, over the others in a fresh random order: with c the cosine of the
    *running* ``g_i`` and the raw ``g_j``, if ``c < phi_ij`` then ``g_i`` gains
    ``|g_i| (phi sqrt(1 - c^2) - c sqrt(1 - phi^2)) / (|g_j| sqrt(1 - phi^2)) g_j``; afterwards
    ``phi_ij <- (1 - beta) phi_ij + beta c``. The targets start at 0.

    Use it for many related tasks, such as languages, whose gradients should be as similar as they
    usually are.

    Args:
      beta: Rate of the running mean, in [0, 1].
      num_tasks: m, required for the (m, m) targets; the state logs ``mtl_weights``.
      parts: What has cosines, targets and weights of its own: ``"whole"``: all parameters
        together; ``"layer"``: the leaves that share all of their path but the last key (the kernel
        and the bias of a layer); ``"leaf"``: each leaf. With layers or leaves the rule needs the
        Jacobian: ``weighting`` is None, and nothing is logged.
      reduction: ``"sum"``, or ``"mean"``: that over the number of present tasks.
      seed: Seed of the orders; ``update(..., key=)`` overrides a draw.

    Returns:
      An `Aggregator` whose inner state is a `GradVacState`.

    Raises:
      ValueError: ``beta`` lies outside [0, 1], a word is unknown, or ``num_tasks`` is missing.

    **Properties**: weighted, of degree 1, permutation-equivariant in distribution;
    conflicting. Pairs with a zero gradient are passed over and keep their target.

    **Reference**: Wang et al. 2021, eq. 3 and algorithm 1.

    **Differs from** the paper in the default ``beta``, which is that of TorchJD and LibMTL, and in
    the default ``parts``.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> aggregator = jaxmtl.gradvac(num_tasks=2)
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0.5 1.5]
    """
    checks.check_range("beta", beta, 0, 1)
    checks.check_choice("parts", parts, ("whole", "layer", "leaf"))
    checks.check_choice("reduction", reduction, ("sum", "mean"))
    m = num_tasks

    def turned(
        gramian: jax.Array,
        state: GradVacState,
        task_mask: jax.Array,
        key: jax.Array | None,
    ) -> tuple[jax.Array, GradVacState]:
        orders = tasks.draw_orders(tasks.draw_key(seed, state.mtl_step, key), m)
        turn: Any = vaccinate_in_order
        if gramian.ndim == 3:  # every part meets the others in the same order
            turn = jax.vmap(turn, in_axes=(0, 0, None, None, None))
        weights, target = turn(gramian, state.target, orders, beta, task_mask)
        weights = tasks.reduced(weights, task_mask, reduction)
        return weights, GradVacState(state.mtl_step + 1, target)

    def start(*lead: int) -> GradVacState:
        return GradVacState(jnp.zeros((), jnp.int32), jnp.zeros((*lead, m, m)))

    def weigh(
        gramian: jax.Array, state: GradVacState, task_mask: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, GradVacState]:
        return turned(gramian, state, task_mask, key)

    def aggregate(
        jacobian: Any, state: GradVacState, task_mask: jax.Array, key: jax.Array | None
    ) -> tuple[Any, GradVacState]:
        places, count = part_of_leaves(jacobian, parts)
        leaves, structure = jax.tree.flatten(jacobian)
        members = [[x for x, p in zip(leaves, places, strict=True) if p == k] for k in range(count)]
        dtype = linalg.accumulation_dtype(jacobian)
        gramians = [linalg.balanced_gramian(part)[0].astype(dtype) for part in members]
        weights, state = turned(jnp.stack(gramians), state, task_mask, key)
        update = [
            linalg.combine(x, weights[p].astype(linalg.accumulation_dtype(x)))
            for x, p in zip(leaves, places, strict=True)
        ]
        return jax.tree.unflatten(structure, update), state

    if parts == "whole":
        return base.from_weighting(weigh, init=start, num_tasks=num_tasks)
    return base.from_rows(
        aggregate,
        init=lambda params: start(part_of_leaves(params, parts)[1]),
        num_tasks=num_tasks,
    )


def part_of_leaves(tree: PyTree, parts: str) -> tuple[list[int], int]:
    """Returns the number of the part to which each leaf belongs, and how many parts there are."""
    names = []
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        names.append(path if parts == "leaf" else path[:-1])
    order = list(dict.fromkeys(names))
    return [order.index(name) for name in names], len(order)
