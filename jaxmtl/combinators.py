"""Combinators: an aggregator in, an aggregator out."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import base, checks, linalg, tasks
from jaxmtl.registry import method
from jaxmtl.rules.mgda import mgda
from jaxmtl.types import ASKS, Aggregator, Rule


def _tasks_of(inner: Rule, num_tasks: int | None, name: str) -> int:
    return checks.require_num_tasks(inner.num_tasks if num_tasks is None else num_tasks, name)


def _through(inner: Rule) -> dict[str, Any]:
    """Returns what a rule can be asked, for a state that holds the rule's own as ``inner``."""

    def ask(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda state, *args, **kwargs: function(state.inner, *args, **kwargs)

    asks = {name: getattr(inner, name) for name in ASKS}
    return {name: function and ask(function) for name, function in asks.items()}


class CRMOGMState(NamedTuple):
    """State of `cr_mogm`.

    Attributes:
      mtl_step: int32 scalar, the number of steps so far, k - 1.
      average: (m,) averaged weights, w_{k-1}.
      highest_rate: Scalar, the largest learning rate so far (0 unless alpha follows it).
      inner: The wrapped rule's own state.
    """

    mtl_step: jax.Array
    average: jax.Array
    highest_rate: jax.Array
    inner: Any


def _share_of(average: jax.Array, task_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns averaged weights on the present tasks, scaled to the total of all, and their share.

    Without a positive total there is nothing to share: the weights are then taken as they are.
    """
    kept = jnp.where(task_mask, average, 0)
    total, part = jnp.sum(average), jnp.sum(kept)
    shared = (total > 0) & (part > 0)
    scale = jnp.where(shared, total / jnp.where(shared, part, 1), 1)
    # Without absent tasks no bit may change.
    scale = jnp.where(jnp.all(task_mask), 1, scale)
    # All of the total lies with absent tasks: the present ones start alike.
    equal = jnp.maximum(total, 0) * tasks.equal_shares(task_mask, average.dtype)
    return jnp.where((part == 0) & (total > 0), equal, kept * scale), 1 / scale


def _give_back(
    average: jax.Array, share: jax.Array, old: jax.Array, task_mask: jax.Array
) -> jax.Array:
    """Returns the averaged weights of all tasks: those of absent ones keep their share."""
    total, before = jnp.sum(jnp.where(task_mask, average, 0)), jnp.sum(old)
    rounding = 8 * jnp.finfo(average.dtype).eps
    shared = (share != 1) & (before > 0) & (total > 0)
    before = jnp.where(jnp.abs(total - before) <= rounding * total, total, before)
    rest = old * jnp.where(shared, total / jnp.where(shared, before, 1), 1)
    return jnp.where(task_mask, average * jnp.where(shared, share, 1), rest)


@method(
    "another rule's weights, averaged over steps",
    "Zhou 2022",
    "scale-free",
    example=lambda: {"aggregator": mgda()},
)
def cr_mogm(
    aggregator: Aggregator,
    *,
    alpha: float | Callable[[jax.Array], jax.Array] | str = 0.9,
    learning_rate: float | Callable[[jax.Array], jax.Array] | None = None,
    initial_weights: jax.Array | str | None = None,
    num_tasks: int | None = None,
) -> Aggregator:
    """Averages another rule's weights over the steps.

    ``w_k = alpha_k w_{k-1} + (1 - alpha_k) v_k`` with v_k the weights of the wrapped rule, so
    that the weights are less correlated with the noise of the step's gradients.

    Use it with small batches, where the weights of `mgda`, `pcgrad` or `cagrad` follow the noise.

    Args:
      aggregator: Any aggregator with a ``weighting``.
      alpha: The rate: a number in [0, 1], an optax schedule (a function of the step, from 0), or
        ``"corollary1"``: ``alpha_k = max(1 - eta_k/eta_1, 1 - eta_k/(eta_1 k sum_i |w_{k-1,i} -
        v_{k,i}|))``, and ``1 - eta_k/eta_1`` where the sum is 0. For eta_1 stands the largest rate
        so far, as it is in the corollary, whose rates fall: so alpha is in [0, 1] for every
        schedule, warm-up from 0 included (while all rates are 0, their ratio counts as 1).
      learning_rate: eta, a number or an optax schedule, for ``"corollary1"``: the one that the
        optimizer uses.
      initial_weights: w_0: (m,) numbers, None for 1/m each, or ``"first"`` for v_1.
      num_tasks: m, required here or on the wrapped aggregator, unless ``initial_weights`` is a
        vector; the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` whose inner state is a `CRMOGMState`. With absent tasks the weights are those
      of a run on the present ones: their averaged weights are scaled to the total of all; absent
      tasks keep their share of it for their return.

    Raises:
      ValueError: No number of tasks, ``alpha`` out of range, ``"corollary1"`` without
        ``learning_rate``, or an aggregator without ``weighting``.

    **Properties**: weighted, permutation-equivariant; conflicting in general even if the wrapped
    rule is not.

    **Reference**: Zhou et al. 2022, algorithm 1, line 5, and corollary 1, whose division is
    taken as written, with k times the sum in the denominator.

    **Differs from** TorchJD, which starts from the first weights: ``initial_weights="first"``.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> aggregator = jaxmtl.cr_mogm(jaxmtl.mgda(), alpha=0.5, num_tasks=2)
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0.65 0.7 ]
    """
    inner = base.inner_rule(aggregator, "cr_mogm")
    first = isinstance(initial_weights, str)
    if first:
        checks.check_choice("initial_weights", initial_weights, ("first",))
    start = None if first else checks.check_vector("initial_weights", initial_weights, num_tasks)
    if start is not None and num_tasks is None:
        num_tasks = start.size
    m = _tasks_of(inner, num_tasks, "cr_mogm")
    checks.check_tasks(m, None if start is None else start.size, "initial_weights")
    if isinstance(alpha, str):
        checks.check_choice("alpha", alpha, ("corollary1",))
        if learning_rate is None:
            raise ValueError(
                'alpha="corollary1" follows the learning rate: expected learning_rate=, a number '
                "or a schedule, got None; pass the optimizer's"
            )
    elif not callable(alpha):
        checks.check_range("alpha", alpha, 0, 1)

    def rate(
        step: jax.Array, highest: jax.Array, average: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns alpha_k and the largest learning rate so far."""
        if not isinstance(alpha, str):
            return jnp.asarray(alpha(step) if callable(alpha) else alpha), highest
        eta = jnp.asarray(learning_rate(step) if callable(learning_rate) else learning_rate)
        highest = jnp.maximum(highest, eta.astype(highest.dtype))
        ratio = jnp.where(highest > 0, eta / jnp.where(highest > 0, highest, 1), 1)
        moved = (step + 1) * jnp.sum(jnp.abs(average - weights))
        adaptive = 1 - ratio / jnp.where(moved > 0, moved, 1)
        return jnp.where(moved > 0, jnp.maximum(1 - ratio, adaptive), 1 - ratio), highest

    def init() -> CRMOGMState:
        dtype = jnp.result_type(float)
        average = jnp.full((m,), 1 / m, dtype) if start is None else start.astype(dtype)
        return CRMOGMState(jnp.zeros((), jnp.int32), average, jnp.zeros((), dtype), inner.init())

    def weigh(
        inputs: Mapping[str, Any], state: CRMOGMState
    ) -> tuple[jax.Array, CRMOGMState, jax.Array | None]:
        weights, inner_state, residual = inner.weigh(inputs, state.inner)
        weights = base.finished(inner, weights, inputs)
        task_mask = inputs["task_mask"]
        weights = jnp.where(task_mask, weights, 0)
        old = jnp.where(state.mtl_step == 0, weights, state.average) if first else state.average
        before, share = _share_of(old.astype(weights.dtype), task_mask)
        a, highest = rate(state.mtl_step, state.highest_rate, before, weights)
        a = a.astype(weights.dtype)
        mixed = a * before + (1 - a) * weights
        average = _give_back(mixed, share, old.astype(weights.dtype), task_mask)
        return mixed, CRMOGMState(state.mtl_step + 1, average, highest, inner_state), residual

    return base.from_rule(
        inner._replace(
            init=init, weigh=weigh, finish=None, num_tasks=m, keeps_state=True, **_through(inner)
        )
    )


class EveryKState(NamedTuple):
    """State of `every_k`.

    Attributes:
      mtl_step: int32 scalar, the number of steps so far, but for those at which new weights were
        due and no task was present.
      weights: (m,) weights in use.
      heads: (m,) weights of the parameters that ``shared=`` leaves out, renewed with ``weights``
        (0 where the wrapped rule has none of its own).
      residual: Scalar, the residual of the solver that found them (0 without a solver).
      inner: The wrapped rule's own state.
    """

    mtl_step: jax.Array
    weights: jax.Array
    heads: jax.Array
    residual: jax.Array
    inner: Any


@method(
    "another rule's weights, renewed every k steps",
    "Navon 2022",
    "scale-free",
    example=lambda: {"aggregator": mgda(), "k": 2},
)
def every_k(aggregator: Aggregator, k: int, *, num_tasks: int | None = None) -> Aggregator:
    """Finds another rule's weights anew at every k-th step only and keeps them in between.

    Use it where the weights are dear, many tasks or a slow solver, and change slowly.

    Args:
      aggregator: Any aggregator with a ``weighting``.
      k: Period, at least 1. The first step always finds weights.
      num_tasks: m, required here or on the wrapped aggregator; the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` whose inner state is an `EveryKState`. The solver is skipped in between;
      the Gramian, an input here, is not. Compile the step: outside ``jit`` the choice whether to
      renew compiles the rule at each call. What a rule does with its weights at every step, such as
      the ``max_norm`` of `nash_mtl`, is done in between too. A task absent when the weights were
      found keeps weight 0 until they are found again; where no task is present, they wait for the
      next step with one.

    Raises:
      ValueError: ``k`` is not a positive int, no number of tasks is given, or the aggregator
        has no ``weighting``.

    **Reference**: Navon et al. 2022, section 3.2 ("update weights every").

    >>> import jax.numpy as jnp, jaxmtl
    >>> params = jnp.zeros(2)
    >>> aggregator = jaxmtl.every_k(jaxmtl.mgda(), 2, num_tasks=2)
    >>> state = aggregator.init(params)
    >>> for scale in (1.0, 3.0, 3.0):
    ...     jacobian = jnp.diag(jnp.array([1.0, scale]))
    ...     update, state = aggregator.update(jacobian, state, params)
    ...     print(state.mtl_weights)
    [0.5 0.5]
    [0.5 0.5]
    [0.9 0.1]
    """
    inner = base.inner_rule(aggregator, "every_k")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"expected k to be an int of at least 1, got {k!r}")
    m = _tasks_of(inner, num_tasks, "every_k")

    heads_of = inner.head_weights

    def init() -> EveryKState:
        dtype = jnp.result_type(float)
        step, residual = jnp.zeros((), jnp.int32), jnp.zeros((), dtype)
        weights, heads = jnp.zeros((m,), dtype), jnp.zeros((m,), dtype)
        return EveryKState(step, weights, heads, residual, inner.init())

    def due(state: EveryKState) -> jax.Array:
        return state.mtl_step % k == 0

    def weigh(
        inputs: Mapping[str, Any], state: EveryKState
    ) -> tuple[jax.Array, EveryKState, jax.Array | None]:
        def renew() -> EveryKState:
            weights, inner_state, residual = inner.weigh(inputs, state.inner)
            heads = heads_of(state.inner, inputs["task_mask"]) if heads_of else state.heads
            residual = state.residual if residual is None else residual
            fresh = EveryKState(state.mtl_step, weights, heads, residual, inner_state)
            return jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), fresh, state)

        anyone = jnp.any(inputs["task_mask"])
        new = lax.cond(due(state) & anyone, renew, lambda: state)
        waits = due(state) & ~anyone
        new = new._replace(mtl_step=state.mtl_step + jnp.where(waits, 0, 1))
        return new.weights, new, new.residual if inner.residual else None

    def head_weights(state: EveryKState, task_mask: jax.Array | None) -> jax.Array:
        assert heads_of is not None  # for the type checker
        fresh = heads_of(state.inner, task_mask)
        return jnp.where(due(state), fresh, state.heads.astype(fresh.dtype))

    asks = _through(inner) | {"head_weights": heads_of and head_weights}
    return base.from_rule(
        inner._replace(init=init, weigh=weigh, num_tasks=m, keeps_state=True, **asks)
    )


@method(
    "another rule's weights on rows divided by norm or loss",
    "Sener and Koltun 2018",
    "scale-free",
    example=lambda: {"aggregator": mgda()},
)
def scale_rows(
    aggregator: Aggregator,
    by: str = "norm",
    *,
    apply_to: str = "raw",
    num_tasks: int | None = None,
) -> Aggregator:
    """Finds another rule's weights on gradients divided by their norm, loss, or both.

    Use it to make a rule blind to the length of gradients or the size of losses: `mgda` with
    ``by="norm"`` no longer favors short gradients.

    Args:
      aggregator: Any aggregator with a ``weighting``.
      by: ``"norm"``, ``"loss"`` (reads ``losses``; their magnitude) or ``"loss_norm"``, the
        product. A row whose divisor is 0 is left as it is.
      apply_to: ``"raw"``: the weights combine the raw rows; ``"scaled"``: the divided ones.
      num_tasks: m; if given, here or on the wrapped aggregator, the state logs
        ``mtl_weights``, the weights of the raw rows.

    Returns:
      An `Aggregator` with the inner state of the wrapped rule.

    Raises:
      ValueError: ``by`` or ``apply_to`` is unknown, the aggregator has no ``weighting``; when
        tracing, ``losses`` is missing.

    **Reference**: the normalizations ``l2``, ``loss`` and ``loss+`` of Sener and Koltun 2018's
    code, which combines the raw rows; LibMTL combines the scaled ones.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> aggregator = jaxmtl.scale_rows(jaxmtl.mgda(), by="norm")
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0.5 1.5]
    """
    inner = base.inner_rule(aggregator, "scale_rows")
    checks.check_choice("by", by, ("norm", "loss", "loss_norm"))
    checks.check_choice("apply_to", apply_to, ("raw", "scaled"))
    needs = inner.needs | ({"gramian"} if by == "norm" else {"gramian", "losses"})

    def scaled_inputs(
        inputs: Mapping[str, Any],
    ) -> tuple[Mapping[str, Any], jax.Array, jax.Array]:
        """Returns the inputs for the divided rows, and 1 / divisors in units of 2**-own_scale."""
        gramian, log2_scale = inputs["gramian"], inputs["log2_scale"]
        divisor = jnp.ones(gramian.shape[:1], gramian.dtype)
        own_scale = jnp.zeros((), jnp.int32)  # divisors are in units of 2**own_scale
        if by != "loss":
            divisor *= jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
            own_scale += log2_scale
        if by != "norm":
            divisor *= jnp.abs(inputs["losses"].astype(gramian.dtype))
        zero = divisor <= 0
        least = jnp.frexp(jnp.min(jnp.where(zero, jnp.inf, divisor)))[1]
        least = jnp.where(jnp.all(zero), 0, least)
        inverse = jnp.where(zero, 1, 1 / linalg.ldexp(jnp.where(zero, 1, divisor), -least))
        own_scale = own_scale + least
        scaled, shift = linalg.normalize_gramian(gramian * inverse[:, None] * inverse[None, :])
        changed = {"gramian": scaled, "log2_scale": log2_scale - own_scale + shift}
        return {**inputs, **changed}, inverse, own_scale

    def weigh(inputs: Mapping[str, Any], state: Any) -> tuple[jax.Array, Any, jax.Array | None]:
        inputs, inverse, own_scale = scaled_inputs(inputs)
        weights, state, residual = inner.weigh(inputs, state)
        if apply_to == "scaled":
            weights = linalg.ldexp(weights * inverse, -own_scale)
        return weights, state, residual

    def finish(weights: jax.Array, inputs: Mapping[str, Any]) -> jax.Array:
        inputs, inverse, own_scale = scaled_inputs(inputs)
        if apply_to == "raw":
            return base.finished(inner, weights, inputs)
        weights = base.finished(inner, linalg.ldexp(weights, own_scale) / inverse, inputs)
        return linalg.ldexp(weights * inverse, -own_scale)

    m = inner.num_tasks if num_tasks is None else num_tasks
    keeps_state = inner.keeps_state or m is not None
    return base.from_rule(
        inner._replace(
            weigh=weigh,
            finish=inner.finish and finish,
            needs=needs,
            num_tasks=m,
            keeps_state=keeps_state,
        )
    )
