"""ExcessMTL: weights follow estimates of the tasks' excess risks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, linalg, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator

SHIFT = 1e-7  # of the squared gradients and of the baselines, as the authors and TorchJD add


class ExcessMTLState(NamedTuple):
    """State of `excess_mtl`.

    Attributes:
      squares: S, sums of squared gradients: leaves (m, *leaf.shape) in the dtype of the
        parameter, at least float32.
      baseline: (m,) sums of the excess risks of the steps of the warm-up.
      seen: (m,) int32, in how many steps the task was present.
      simplex_weights: (m,) w, of sum 1; absent tasks keep theirs.
      mtl_weights: (m,) weights of the last step.
    """

    squares: Any
    baseline: jax.Array
    seen: jax.Array
    simplex_weights: jax.Array
    mtl_weights: jax.Array


@method("weights to tasks whose excess risk falls least", "He 2024", logs_weights=True)
def excess_mtl(
    step_size: float = 1.0,
    *,
    num_tasks: int,
    warmup_steps: int = 1,
    total: str = "one",
) -> Aggregator:
    """Gives weight to the tasks whose excess risk has fallen least.

    ``S += g^2`` per coordinate, ``e_i = g_i . (S_i + 1e-7)^(-1/2) g_i``, ``w_i <- w_i exp(eta e_i /
    (e0_i + 1e-7))``, scaled to sum 1; e0 is the mean of e over the warm-up, in which w stays.

    Use it where labels of some tasks are noisy: a loss that cannot fall further loses its weight.

    Args:
      step_size: eta, positive.
      num_tasks: m, required.
      warmup_steps: Steps of the warm-up: 1 is the authors' code and LibMTL (the first call only
        sets e0); the paper's appendix has 3 epochs; 0 is TorchJD's default: the first call sets e0
        and already takes a step, with e in place of e/e0.
      total: ``"one"``: the weights sum to 1 (paper, TorchJD); ``"tasks"``: to m (authors' code and
        LibMTL).

    Returns:
      An `Aggregator` whose inner state is an `ExcessMTLState`; ``weighting`` is None.

    Raises:
      ValueError: ``num_tasks`` is missing, a number out of range, ``total`` unknown.

    **Properties**: weighted, permutation-equivariant; conflicting. The 1e-7 are absolute: not
    scale-free. In float32, gradients above 1e19 overflow when squared: the step is skipped. Absent
    tasks leave the simplex and keep their state.

    **Reference**: He et al. 2024, eq. 6-9 and algorithm 1.

    **Differs from** the authors' code and LibMTL in the 1e-7 beside e0.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> aggregator = jaxmtl.excess_mtl(num_tasks=2)
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0.5 1. ]
    """
    m = num_tasks
    checks.check_range("step_size", step_size, 0, closed="right")
    checks.check_choice("total", total, ("one", "tasks"))
    checks.check_int("warmup_steps", warmup_steps, 0)

    def init(params: Any) -> ExcessMTLState:
        zero = jnp.zeros((m,))
        seen = jnp.zeros((m,), jnp.int32)
        return ExcessMTLState(linalg.zero_rows(params, m), zero, seen, zero + 1 / m, zero)

    def aggregate(
        jacobian: Any, state: ExcessMTLState, task_mask: jax.Array
    ) -> tuple[Any, ExcessMTLState]:
        squares = jax.tree.map(
            lambda s, g: s + jnp.square(g.astype(s.dtype)), state.squares, jacobian
        )

        def excess(s: jax.Array, g: jax.Array) -> jax.Array:
            terms = jnp.square(g.astype(s.dtype)) / jnp.sqrt(s + SHIFT)
            return jnp.sum(terms, axis=tuple(range(1, s.ndim)))

        parts = jax.tree.leaves(jax.tree.map(excess, squares, jacobian))
        risk = linalg.whole(functools.reduce(jnp.add, parts))
        warming = state.seen < max(warmup_steps, 1)
        baseline = state.baseline + jnp.where(warming & task_mask, risk, 0)
        moves = state.seen >= warmup_steps
        ratio = risk / (baseline / max(warmup_steps, 1) + SHIFT)
        if warmup_steps == 0:
            ratio = jnp.where(state.seen == 0, risk, ratio)
        logits = jnp.log(tasks.on_present(state.simplex_weights.astype(risk.dtype), task_mask))
        logits = jnp.where(task_mask, logits, 0) + jnp.where(moves, step_size * ratio, 0)
        w = jax.nn.softmax(logits, where=task_mask)
        weights = w * jnp.sum(task_mask) if total == "tasks" else w
        kept = jnp.where(task_mask, w, state.simplex_weights)
        new = ExcessMTLState(squares, baseline, state.seen + task_mask, kept, weights)
        return linalg.combine(jacobian, weights), new

    return base.from_rows(aggregate, init=init, num_tasks=num_tasks)
