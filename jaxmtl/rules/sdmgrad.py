"""SDMGrad: direction-oriented multi-objective learning with independent batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import base, checks, tasks
from jaxmtl.compiled import compiled
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


class SDMGradState(NamedTuple):
    """State of `sdmgrad`.

    Attributes:
      simplex_weights: (m,) w, on the simplex, where the next call starts; absent tasks keep theirs.
    """

    simplex_weights: jax.Array


@compiled("num_steps")
def _descend(
    cross: jax.Array,
    pull: jax.Array,
    start: jax.Array,
    task_mask: jax.Array,
    eta: jax.Array | float,
    inertia: jax.Array | float,
    num_steps: int,
) -> jax.Array:
    """Returns the (m,) simplex weights after the steps, with ``pull`` the weights lambda p."""

    def step(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w, velocity = carry
        velocity = inertia * velocity + cross @ (w + pull)
        return tasks.project_finite(w - eta * velocity, task_mask), velocity

    return lax.fori_loop(0, num_steps, step, (start, jnp.zeros_like(start)))[0]


@method("common direction near a preferred one, from independent batches", "Xiao 2023")
def sdmgrad(
    lam: float = 0.3,
    *,
    form: str = "paper",
    step_size: float | None = None,
    num_steps: int = 20,
    momentum: float | None = None,
    preference: jax.Array | None = None,
    num_tasks: int,
) -> Aggregator:
    """Looks for a common direction near a preferred one, with three independent batches.

    From the w of the last call, ``num_steps`` times ``w <- proj_simplex(w - eta (G12 w +
    lambda G12 p))`` with ``G12 = J_1 J_2^T`` from two independent batches; then, with the rows J
    of a third, the update ``J^T (w + lambda p) / (1 + lambda)``.

    Use it with noisy gradients and independent batches where the direction should stay near the
    mean; ``lam`` sets how near.

    Args:
      lam: lambda, at least 0.
      form: ``"paper"``: the steps above, eta = 0.1; ``"code"``: ``G12`` is divided by the
        square of the mean of its diagonal's square roots (negative entries count as 0) plus 1e-8,
        eta = 10, momentum 0.5.
      step_size: eta in place of the form's.
      num_steps: At least 1. Paper and code use one pair of batches for all, here too.
      momentum: In place of the form's, in [0, 1); it starts anew at each call.
      preference: (m,) p, 1/m if None.
      num_tasks: m, required; the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` that reads ``cross_gramian`` (m, m), from `jaxmtl.cross_gramian`, and not the
      Gramian; its inner state is an `SDMGradState`, 1/m at the start.

    Raises:
      ValueError: ``num_tasks`` is missing, a number out of range, ``preference`` of another length;
        when tracing, ``cross_gramian`` is missing or of a wrong shape.

    **Properties**: weighted, permutation-equivariant (with the preference permuted alike);
    conflicting. The step is absolute: not scale-free (up to the 1e-8, the code's form is). Absent
    tasks leave the simplex and keep their weight; the preference of the others is scaled to its
    total.

    **Reference**: Xiao, Ban and Ji 2023, algorithm 1.

    **Differs from** LibMTL, which is ``form="code", step_size=5``. A step of 10 seldom settles:
    the code's w is then sensitive to rounding, so that other implementations, right as they are,
    agree for a few calls only (the norm of the difference, at m = 8: 1e-12, then 0.7 at the sixth
    call, in 80-bit arithmetic too). In the authors' own code
    the three batches are views of one tensor, so that its gradients are not independent.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.sdmgrad(1.0, num_steps=1, num_tasks=2).weighting
    >>> cross = jnp.diag(jnp.array([1.0, 3.0]))
    >>> print(weighting.update(None, weighting.init(), cross_gramian=cross)[0])
    [0.55 0.45]
    """
    checks.check_choice("form", form, ("paper", "code"))
    checks.check_range("lam", lam, 0)
    eta = {"paper": 0.1, "code": 10.0}[form] if step_size is None else step_size
    inertia = {"paper": 0.0, "code": 0.5}[form] if momentum is None else momentum
    checks.check_range("step_size", eta, 0, closed="right")
    checks.check_range("momentum", inertia, 0, 1, closed="left")
    checks.check_int("num_steps", num_steps)

    def init() -> SDMGradState:
        return SDMGradState(tasks.uniform(num_tasks))

    def weigh(
        state: SDMGradState,
        task_mask: jax.Array,
        cross_gramian: jax.Array,
        preference: jax.Array | None,
    ) -> tuple[jax.Array, SDMGradState]:
        cross = cross_gramian
        if form == "code":
            roots = jnp.sqrt(jnp.maximum(jnp.diagonal(cross_gramian), 0))
            cross = cross_gramian / (jnp.mean(roots, where=task_mask) ** 2 + 1e-8)
        pull = lam * tasks.shares(preference, task_mask, cross_gramian.dtype)
        start = tasks.on_present(state.simplex_weights.astype(cross_gramian.dtype), task_mask)
        w = _descend(cross, pull, start, task_mask, eta, inertia, num_steps)
        kept = jnp.where(task_mask, w, state.simplex_weights)
        return (w + pull) / (1 + lam), SDMGradState(kept)

    return base.from_weighting(weigh, init=init, num_tasks=num_tasks, preference=preference)
