"""LDC-MTL: loss discrepancy control, a bilevel problem solved by first-order steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxmtl import base, checks, linalg, tasks
from jaxmtl.learned import LearnedState, init_learned, learn
from jaxmtl.registry import method
from jaxmtl.types import Aggregator

PyTree = Any


class LDCState(NamedTuple):
    """State of `ldc_mtl`.

    Attributes:
      mtl_step: int32 scalar, the number of steps so far.
      router: W, a dict with (m,) ``logits``, or with ``hidden`` layers and a ``logits`` layer,
        and the leaves of its optimizer's state.
      baseline: (m,) l_0, the losses that normalize.
      known: (m,) bool, the tasks whose baseline has been seen in this epoch.
    """

    mtl_step: jax.Array
    router: LearnedState
    baseline: jax.Array
    known: jax.Array


# --- the router -------------------------------------------------------------------------------


def init_router(
    num_tasks: int,
    feature_size: int | None,
    hidden: tuple[int, ...],
    activation: str,
    seed: int,
) -> PyTree:
    """Returns free logits, or the layers of a small network on a feature."""
    if feature_size is None and activation == "relu_sigmoid":
        return {"logits": jax.random.uniform(jax.random.key(seed), (num_tasks,), minval=0.2)}
    if feature_size is None:
        return {"logits": jnp.ones((num_tasks,))}
    widths = (feature_size, *hidden, num_tasks)
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    layers = []
    for key, fan_in, fan_out in zip(keys, widths[:-1], widths[1:], strict=True):
        kernel = jax.random.normal(key, (fan_in, fan_out)) / jnp.sqrt(float(fan_in))
        layers.append({"kernel": kernel, "bias": jnp.zeros((fan_out,))})
    return {"hidden": layers[:-1], "logits": layers[-1]}


def route(values: PyTree, features: jax.Array | None) -> jax.Array:
    """Returns the (m,) logits of the tasks."""
    if features is None:
        return values["logits"]
    z = jnp.mean(features.reshape(-1, features.shape[-1]), 0)
    for layer in values["hidden"]:
        z = jax.nn.relu(z @ layer["kernel"] + layer["bias"])
    return z @ values["logits"]["kernel"] + values["logits"]["bias"]


def keep_absent_logits(new: PyTree, old: PyTree, task_mask: jax.Array) -> PyTree:
    """Returns the new tree with the old entries of absent tasks in everything under logits."""

    def leaf(path: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        of_tasks = any(getattr(entry, "key", None) == "logits" for entry in path)
        return jnp.where(task_mask, x, y) if of_tasks else x

    return jax.tree_util.tree_map_with_path(leaf, new, old)


# --- the objectives ---------------------------------------------------------------------------


def discrepancy(values: jax.Array, smooth: float, task_mask: jax.Array) -> jax.Array:
    """Returns the sum of ``|v_i - v_j|`` over tasks that are neighbors among those present."""
    m = values.size
    place = jnp.where(task_mask, jnp.arange(m), -1)
    before = jnp.concatenate([jnp.array([-1]), lax.cummax(place)[:-1]])
    pair = task_mask & (before >= 0)
    gap = jnp.where(pair, values[jnp.maximum(before, 0)] - values, 0)
    if not smooth:
        # The slope of |x| at a tie is 0: that of jnp.abs is 1, and ties are common.
        return jnp.sum(gap * lax.stop_gradient(jnp.sign(gap)))
    # sqrt(x^2 + gamma), in units in which the square does not overflow.
    unit = lax.stop_gradient(jnp.maximum(jnp.abs(gap), jnp.sqrt(smooth)))
    return jnp.sum(jnp.where(pair, unit * jnp.sqrt((gap / unit) ** 2 + smooth / unit**2), 0))


def normalized(
    losses: jax.Array, baseline: jax.Array, how: str | None, task_mask: jax.Array
) -> jax.Array:
    """Returns l~ for l and l_0."""
    if how is None:
        return losses
    initial, valid = tasks.positive_part(baseline.astype(losses.dtype))
    if how == "log":
        clamped, active = tasks.positive_part(losses)
        return jnp.log(jnp.where(active, losses, clamped)) - jnp.log(initial)
    initial = jnp.where(valid, initial, 1)
    if how == "ratio_min":
        initial = initial / jnp.min(jnp.where(task_mask, initial, jnp.inf))
    return losses / initial


@method(
    "bilevel: loss discrepancy above, router weights below",
    "Xiao 2025",
    "linear under scaling",
    "scale-free",
    renamed={"normalise": "normalize"},
)
def ldc_mtl(
    penalty: float = 1.0,
    *,
    num_tasks: int,
    form: str = "paper",
    tau: str = "sigma",
    normalize: str | None = None,
    steps_per_epoch: int | None = None,
    feature_size: int | None = None,
    hidden: tuple[int, ...] = (),
    activation: str = "softmax",
    weight_bounds: tuple[float, float] | None = None,
    divide_weights: bool = False,
    divide_lower: bool | None = None,
    shuffle: bool = False,
    smooth: float = 0.0,
    double_loop: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    seed: int = 0,
) -> Aggregator:
    """Controls the gaps between the losses while a learned weighting of them is minimised.

    With ``f = sum_{i<m} |tau_i l~_i - tau_{i+1} l~_{i+1}|`` and ``g = sum_i sigma_i(W) l~_i``,
    parameters and router W both descend ``f + lambda g``. On the side of the parameters that is
    one weighted backward pass: ``w_i = (lambda sigma_i + tau_i (s_i - s_{i-1})) dl~_i/dl_i`` with
    ``s_i = sign(tau_i l~_i - tau_{i+1} l~_{i+1})``, ``s_0 = s_m = 0``. Weights can be negative.

    Use it at the budget of one gradient where losses should stay close to each other.

    Args:
      penalty: lambda, at least 0.
      num_tasks: m, required; the state logs ``mtl_weights``.
      form: ``"paper"``: ``f + lambda g``. ``"code"``: ``g + lambda f``, as the authors' trainers
        compute; table 5's values of lambda (CelebA 0.01, QM9 0.05, Cityscapes 0.1, NYUv2 0.05)
        belong to this form.
      tau: ``"sigma"``: tau = sigma(W); ``"ones"``. With ones W sees only ``sum sigma_i l~_i`` and
        collapses onto the smallest loss: see ``weight_bounds``.
      normalize: None: ``l~ = l``; ``"log"``: ``log(l / l_0)``; ``"ratio"``: ``l / l_0``;
        ``"ratio_min"``: ``l / (l_0 / min_j l_0j)``, NYUv2's code.
      steps_per_epoch: l_0 are the losses of the first step of every epoch (QM9); None: of the very
        first step only.
      feature_size: d, for a router network on the shared feature, which arrives as
        ``features`` (..., d) and is averaged over its leading axes; None: W are free logits.
      hidden: Widths of the router's hidden layers (ReLU); none is one linear layer, as in the code.
      activation: sigma of W: ``"softmax"`` (paper), ``"sigmoid"`` of logits that start at one
        (CelebA's code), or ``"relu_sigmoid"``, ``sigmoid(max(W, 0))`` of logits drawn from 0.2 to 1
        (QM9's code).
      weight_bounds: (low, high), to which sigma is clamped; the code's are (0.2, 0.8).
      divide_weights: Whether sigma, once clamped, is divided by its sum wherever it stands, in f
        and g, with the derivative of the sum (NYUv2's code, with ``tau="sigma"``).
      divide_lower: Whether g is divided by the sum of sigma, a constant to W (the code of CelebA
        and QM9); None: with the two sigmoids it is.
      shuffle: Whether f compares the tasks in a new order at each step (appendix A, "task
        orders"); ``update(..., key=)`` overrides a draw.
      smooth: gamma at least 0: ``sqrt(x^2 + gamma)`` stands for ``|x|``.
      double_loop: Algorithm 2: W descends ``f + lambda (g(W, x) - g(W, z_N))`` with the losses at
        z_N as ``lower_losses`` (m,); `descend_lower` finds them.
      optimizer: Steps W, after its use; Adam with rate 1e-3 by default (CelebA, QM9).
      seed: Seed of the router's start and of the orders.

    Returns:
      An `Aggregator` that reads ``losses`` (and ``features``, ``lower_losses``), whose inner state
      is an `LDCState`. Its weighting has two more functions: ``lower_objective`` for
      `descend_lower`, and ``feature_gradient(state, losses, features, task_mask=None)``, see below.

    Raises:
      ValueError: ``num_tasks`` is missing, a word is unknown, a number out of range; when tracing,
        ``features`` or ``lower_losses`` are missing or of a wrong shape.

    **Properties**: weighted, linear under scaling of the gradients, conflicting. Not
    permutation-equivariant: f compares neighbors; reversing the order changes nothing. Named tasks
    stand in the sorted order of their names, so that "task10" comes before "task2". The slope
    of f between equal neighbors is 0. Absent tasks are removed, with their neighbors made
    neighbors, and keep their part of W. Without normalization losses of any sign will do. Under
    ``"log"`` a loss at or below the least normal number has weight 0; under the ratios an l_0 at
    or below it counts as 1. A step at which the router's optimizer overflows (Adam, beyond 1e19
    in float32) is skipped.

    **Features** are detached: sigma depends on W alone, as in the paper's equations. The code of
    the dense predictions attaches them. The weights of m losses cannot express that, so here it
    takes one line: add ``jnp.vdot(stop_gradient(c), features)``, with
    ``c = aggregator.weighting.feature_gradient(state, losses, features)`` the derivative of
    the objective with respect to the features, to a function of the parameters whose gradient
    is added to the update.

    **Reference**: Xiao et al. 2025, eq. 1-4, algorithms 1 and 2, table 5.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.ldc_mtl(0.5, num_tasks=2, tau="ones").weighting
    >>> losses = jnp.array([1.0, 3.0])
    >>> print(weighting.update(None, weighting.init(), losses=losses)[0])
    [-0.75  1.25]
    """
    m = num_tasks
    checks.check_range("penalty", penalty, 0)
    checks.check_range("smooth", smooth, 0)
    checks.check_choice("form", form, ("paper", "code"))
    checks.check_choice("tau", tau, ("sigma", "ones"))
    checks.check_choice("normalize", normalize, (None, "log", "ratio", "ratio_min"))
    checks.check_choice("activation", activation, ("softmax", "sigmoid", "relu_sigmoid"))
    if divide_lower is None:
        divide_lower = activation != "softmax"
    if steps_per_epoch is not None:
        checks.check_int("steps_per_epoch", steps_per_epoch)
    if hidden and feature_size is None:
        raise ValueError(f"expected feature_size= with hidden layers, got hidden={hidden!r} alone")
    if weight_bounds is not None:
        checks.check_range("the lower weight bound", weight_bounds[0], 0)
        checks.check_range("the upper weight bound", weight_bounds[1], weight_bounds[0])
    stepper = optax.adam(1e-3) if optimizer is None else optimizer
    upper_factor, lower_factor = (1.0, penalty) if form == "paper" else (penalty, 1.0)

    def init() -> LDCState:
        router = init_learned(stepper, init_router(m, feature_size, hidden, activation, seed))
        known = jnp.zeros((m,), bool)
        return LDCState(jnp.zeros((), jnp.int32), router, jnp.ones((m,)), known)

    def sigma(values: PyTree, features: jax.Array | None, task_mask: jax.Array) -> jax.Array:
        logits = route(values, features)
        if activation == "softmax":
            weights = jax.nn.softmax(logits, where=task_mask)
        else:
            logits = jax.nn.relu(logits) if activation == "relu_sigmoid" else logits
            weights = jax.nn.sigmoid(logits)
        if weight_bounds is not None:
            weights = jnp.clip(weights, *weight_bounds)
        weights = jnp.where(task_mask, weights, 0)
        return weights / positive_sum(weights) if divide_weights else weights

    def positive_sum(weights: jax.Array) -> jax.Array:
        total = jnp.sum(weights)
        return jnp.where(total > 0, total, 1)  # no task present

    def lower(weights: jax.Array, scaled: jax.Array) -> jax.Array:
        total = jnp.sum(jnp.where(weights > 0, weights * scaled, 0))
        return total / lax.stop_gradient(positive_sum(weights)) if divide_lower else total

    def objective(
        values: PyTree,
        losses: jax.Array,
        features: jax.Array | None,
        baseline: jax.Array,
        task_mask: jax.Array,
        order: jax.Array | None,
    ) -> jax.Array:
        weights = sigma(values, features, task_mask).astype(losses.dtype)
        scaled = normalized(losses, baseline, normalize, task_mask)
        compared = weights * scaled if tau == "sigma" else scaled
        present = task_mask
        if order is not None:
            compared, present = compared[order], task_mask[order]
        f = discrepancy(compared, smooth, present)
        return upper_factor * f + lower_factor * lower(weights, scaled)

    def baseline_of(
        state: LDCState, losses: jax.Array, task_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        known = state.known
        if steps_per_epoch is not None:
            known = known & (state.mtl_step % steps_per_epoch != 0)
        baseline = jnp.where(task_mask & ~known, losses, state.baseline)
        return baseline, known | task_mask

    def order_of(state: LDCState, key: jax.Array | None) -> jax.Array | None:
        if not shuffle:
            return None
        return jax.random.permutation(tasks.draw_key(seed, state.mtl_step, key), m)

    def checked(features: Any) -> jax.Array | None:
        if feature_size is None:
            return None
        if jnp.ndim(features) < 1 or jnp.shape(features)[-1] != feature_size:
            raise ValueError(
                f"expected features of shape (..., {feature_size}), as feature_size says, got "
                f"{jnp.shape(features)}; put the channels last"
            )
        return jnp.asarray(features, jnp.result_type(float))

    def weigh(
        losses: jax.Array,
        state: LDCState,
        task_mask: jax.Array,
        features: Any = None,
        lower_losses: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LDCState]:
        features = checked(features)
        baseline, known = baseline_of(state, losses, task_mask)
        values = state.router.values
        gradient, weights = jax.grad(objective, (0, 1))(
            values, losses, features, baseline, task_mask, order_of(state, key)
        )
        if double_loop:
            assert lower_losses is not None  # for the type checker: the rule requires them
            scaled = normalized(lower_losses.astype(losses.dtype), baseline, normalize, task_mask)

            def lower_part(values: PyTree) -> jax.Array:
                return lower_factor * lower(sigma(values, features, task_mask), scaled)

            gradient = jax.tree.map(jnp.subtract, gradient, jax.grad(lower_part)(values))
        router = learn(stepper, gradient, state.router, task_mask, keep_absent_logits)
        return weights, LDCState(state.mtl_step + 1, router, baseline, known)

    def lower_objective(
        state: LDCState, losses: jax.Array, features: Any = None, task_mask: jax.Array | None = None
    ) -> Callable[[jax.Array], jax.Array]:
        mask = tasks.all_present(m, task_mask)
        baseline, _ = baseline_of(state, losses, mask)
        weights = sigma(state.router.values, checked(features), mask)

        def of(losses: jax.Array) -> jax.Array:
            present = jnp.where(mask, losses, 1)
            return lower_factor * lower(weights, normalized(present, baseline, normalize, mask))

        return of

    def feature_gradient(
        state: LDCState,
        losses: jax.Array,
        features: Any,
        task_mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        mask = tasks.all_present(m, task_mask)
        losses = linalg.accumulable(lax.stop_gradient(jnp.where(mask, losses, 1)))
        baseline, _ = baseline_of(state, losses, mask)

        def of(features: jax.Array) -> jax.Array:
            order = order_of(state, key)
            return objective(state.router.values, losses, features, baseline, mask, order)

        return jax.grad(of)(lax.stop_gradient(checked(features)))

    needs = (["features"] if feature_size else []) + (["lower_losses"] if double_loop else [])
    rule_of = base.requiring(weigh, *needs)
    if not shuffle:
        rule_of = functools.partial(rule_of, key=None)  # then it draws nothing
    aggregator = base.from_weighting(rule_of, init=init, num_tasks=num_tasks)
    rule = base.inner_rule(aggregator, "ldc_mtl")
    return base.from_rule(
        rule._replace(lower_objective=lower_objective, feature_gradient=feature_gradient)
    )


def descend_lower(
    losses_fn: Callable[..., jax.Array],
    aggregator: Aggregator,
    *,
    num_steps: int,
    step_size: float,
) -> Callable[..., jax.Array]:
    """Makes the inner loop of LDC-MTL's algorithm 2.

    ``z_0 = x``, then N times ``z <- z - beta lambda grad_z g(W, z)`` (``z - beta grad_z g`` under
    ``form="code"``), with W of the state and l_0 of the step to come.

    Args:
      losses_fn: ``losses_fn(params, *args) -> (m,)``.
      aggregator: From ``ldc_mtl(..., double_loop=True)``.
      num_steps: N (the paper: 50).
      step_size: beta.

    Returns:
      ``f(params, state, *args, features=None, task_mask=None) -> (m,)`` losses at z_N, to be passed
      to ``update`` as ``lower_losses``. N backward passes.

    **Reference**: Xiao et al. 2025, algorithm 2.

    >>> import jax.numpy as jnp, jaxmtl
    >>> losses_fn = lambda params: jnp.stack([(params - 1) ** 2, (params + 3) ** 2])
    >>> aggregator = jaxmtl.ldc_mtl(num_tasks=2, double_loop=True)
    >>> state = aggregator.init(jnp.zeros(()))
    >>> descend = jaxmtl.descend_lower(losses_fn, aggregator, num_steps=50, step_size=0.1)
    >>> print(descend(jnp.zeros(()), state).round(2))  # both weights are 1/2: z goes to -1
    [4. 4.]
    """

    def lower_losses(
        params: PyTree,
        state: Any,
        *args: Any,
        features: Any = None,
        task_mask: jax.Array | None = None,
    ) -> jax.Array:
        functions: Any = aggregator.weighting
        start = losses_fn(params, *args)
        objective = functions.lower_objective(state, start, features, task_mask=task_mask)

        def step(_: int, z: PyTree) -> PyTree:
            gradient = jax.grad(lambda z: objective(losses_fn(z, *args)))(z)
            return jax.tree.map(lambda x, g: (x - step_size * g).astype(x.dtype), z, gradient)

        return losses_fn(lax.fori_loop(0, num_steps, step, params), *args)

    return lower_losses
