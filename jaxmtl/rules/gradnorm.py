"""GradNorm: weights that equalise the rates of training through the gradient norms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmtl import base, checks, linalg, tasks
from jaxmtl.learned import LearnedState, init_learned, learn
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


class GradNormState(NamedTuple):
    """State of `gradnorm`.

    Attributes:
      weights: w (m,), of sum m, or its logits, and the leaves of its optimizer's state.
      initial: (m,) l_0, the first losses of each task.
      known: (m,) bool, the tasks whose first loss has been seen.
    """

    weights: LearnedState
    initial: jax.Array
    known: jax.Array


@method("weights learned until gradient norms follow training rates", "Chen 2018")
def gradnorm(
    alpha: float = 1.5,
    *,
    num_tasks: int,
    weights: str = "scaled",
    initial_losses: jax.Array | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Aggregator:
    """Equalises the gradient norms of the tasks, more for those that lag behind.

    ``sum_i w_i l_i``, with w a step on ``sum_i |w_i |g_i| - sg(mean_j(w_j |g_j|) r_i^alpha)|``
    after each use, ``r_i = (l_i / l_i0) / mean_j (l_j / l_j0)``; w is then scaled to sum m.

    Use it where tasks train at different speeds and norms of gradients, on the last shared layer
    for instance, should follow.

    Args:
      alpha: Strength with which slow tasks are pulled, at least 0.
      num_tasks: m, required; the state logs ``mtl_weights``.
      weights: How w has the sum m: ``"scaled"``: w itself is stepped, then scaled (the paper);
        ``"softmax"``: ``w = m softmax(v)``, and v is stepped along the objective (LibMTL).
      initial_losses: (m,) positive l_0; the first losses seen if None.
      optimizer: Steps w from ones, or v from zeros, after its use; SGD with rate 0.025 by default.

    Returns:
      An `Aggregator` that reads ``losses`` and the Gramian's diagonal, whose inner state is a
      `GradNormState`. The paper takes the norms on the last shared layer: mark it alone in
      ``shared=``; ``head_weights`` gives all other parameters the same w.

    Raises:
      ValueError: ``num_tasks`` is missing, ``alpha`` is negative, or ``initial_losses`` are not
        positive or of another length.

    **Properties**: weighted, permutation-equivariant, linear under scaling of the gradients at
    the same state, conflicting. The step of w is absolute in the norms' units: not scale-free.
    Weights below 0 are set to 0 before scaling (all at 0: to 1). Losses and l_0 at or below the
    least normal number count as that number, and a ratio is at most the square root of the largest.
    Absent tasks leave sums and means and keep w; the others are scaled to sum to their number.

    **Reference**: Chen et al. 2018 (GradNorm), eq. 1-2 and algorithm 1.

    **Differs from** LibMTL, which is ``weights="softmax"`` with the network's own optimizer, and
    from public JAX code, which forgets the stop-gradient or leaves w out of the objective.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.gradnorm(num_tasks=2).weighting
    >>> state, gramian = weighting.init(), jnp.diag(jnp.array([1.0, 4.0]))
    >>> for _ in range(2):
    ...     weights, state = weighting.update(gramian, state, losses=jnp.ones(2))
    >>> print([f"{w:.3f}" for w in weights])
    ['1.038', '0.962']
    """
    checks.check_range("alpha", alpha, 0)
    checks.check_choice("weights", weights, ("scaled", "softmax"))
    softmax = weights == "softmax"
    given = checks.check_vector("initial_losses", initial_losses, num_tasks, sign="positive")
    stepper = optax.sgd(0.025) if optimizer is None else optimizer

    def init() -> GradNormState:
        start = jnp.zeros((num_tasks,)) if softmax else jnp.ones((num_tasks,))
        weights = init_learned(stepper, start)
        initial = jnp.ones((num_tasks,)) if given is None else jnp.asarray(given)
        known = jnp.full((num_tasks,), given is not None)
        return GradNormState(weights, initial.astype(weights.values.dtype), known)

    def slowness(losses: jax.Array, initial: jax.Array, task_mask: jax.Array) -> jax.Array:
        ratio = tasks.positive_part(losses)[0] / tasks.positive_part(initial)[0]
        ratio = jnp.minimum(ratio, jnp.sqrt(jnp.finfo(ratio.dtype).max))
        return ratio / jnp.mean(ratio, where=task_mask)

    def scaled(values: jax.Array, task_mask: jax.Array) -> jax.Array:
        if softmax:
            return jax.nn.softmax(values, where=task_mask) * jnp.sum(task_mask)
        return tasks.scale_to_count(values, task_mask)

    def weigh(
        gramian: jax.Array,
        state: GradNormState,
        losses: jax.Array,
        task_mask: jax.Array,
        log2_scale: jax.Array,
    ) -> tuple[jax.Array, GradNormState]:
        losses = losses.astype(gramian.dtype)
        initial = jnp.where(task_mask & ~state.known, losses, state.initial)
        norms = linalg.ldexp(jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0)), log2_scale)
        weights = scaled(state.weights.values, task_mask)
        products = weights * norms
        target = jnp.mean(products, where=task_mask) * slowness(losses, initial, task_mask) ** alpha
        gradient = jnp.where(task_mask, jnp.sign(products - target) * norms, 0)
        if softmax:  # to the logits: the derivative of m softmax(v)
            gradient = weights * (gradient - jnp.mean(weights * gradient, where=task_mask))
            moved = learn(stepper, gradient, state.weights, task_mask)
            return weights, GradNormState(moved, initial, state.known | task_mask)
        moved = learn(stepper, gradient, state.weights, task_mask)
        values = jnp.maximum(moved.values, 0)
        values = tasks.keep_absent(
            tasks.scale_to_count(values, task_mask), state.weights.values, task_mask
        )
        moved = moved._replace(values=values)
        return weights, GradNormState(moved, initial, state.known | task_mask)

    def head_weights(state: GradNormState, task_mask: jax.Array | None) -> jax.Array:
        return scaled(state.weights.values, tasks.all_present(num_tasks, task_mask))

    return base.from_weighting(weigh, init=init, num_tasks=num_tasks, head_weights=head_weights)
