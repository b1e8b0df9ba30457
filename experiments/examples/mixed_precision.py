"""Mixed precision: float16 rows, float32 master weights, a loss scale that follows the overflows.

    python -m experiments.examples.mixed_precision

The network computes in float16; its parameters, the optimizer and everything in jaxmtl stay in
float32. Losses are multiplied by a power of two, so that small gradients do not vanish in float16,
and the update is divided by it: weights of scale-free rules do not see it (``upgrad`` here; for a
rule that is not, divide the Jacobian instead). Where the scaled rows overflow they are infinite:
the aggregator then skips the step and counts it in ``mtl_skipped``, and the scale is halved; after
``PATIENCE`` steps without overflow it is doubled. ``dynamic=False`` keeps the scale, as for
``dtype=jnp.bfloat16``, whose range is that of float32 and which needs none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmtl

PATIENCE = 20
STEPS, EXAMPLES, INPUTS, HIDDEN, TASKS = 120, 64, 8, 16, 3

Params = dict[str, jax.Array]


class LossScale(NamedTuple):
    """A power of two, and how many steps it has been good for.

    Attributes:
      value: float32 scalar.
      good_steps: int32 scalar.
    """

    value: jax.Array
    good_steps: jax.Array


def start_scale(log2: int) -> LossScale:
    """Returns the scale ``2**log2``."""
    return LossScale(jnp.float32(2.0**log2), jnp.int32(0))


def follow(scale: LossScale, overflow: jax.Array) -> LossScale:
    """Halves the scale after an overflow; doubles it after ``PATIENCE`` steps without one."""
    good = jnp.where(overflow, 0, scale.good_steps + 1)
    grown = jnp.where(good == PATIENCE, 2.0, 1.0)
    factor = jnp.where(overflow, 0.5, grown)
    return LossScale(scale.value * factor, jnp.where(good == PATIENCE, 0, good))


class Log(NamedTuple):
    """What a run reports, one number (or one for each task) for each step."""

    losses: jax.Array
    weights: jax.Array
    scale: jax.Array
    skipped: jax.Array


def make_data() -> tuple[jax.Array, jax.Array]:
    """Returns inputs (EXAMPLES, INPUTS) and targets (EXAMPLES, TASKS) of three related tasks."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((EXAMPLES, INPUTS))
    directions = rng.standard_normal((INPUTS, 1)) + rng.standard_normal((INPUTS, TASKS))
    return jnp.asarray(x, jnp.float32), jnp.asarray(np.tanh(x @ directions / 4), jnp.float32)


def initial_params() -> Params:
    """Returns the float32 master weights."""
    keys = jax.random.split(jax.random.key(0))
    return {
        "in": jax.random.normal(keys[0], (INPUTS, HIDDEN)) / jnp.sqrt(INPUTS),
        "out": jax.random.normal(keys[1], (HIDDEN, TASKS)) / jnp.sqrt(HIDDEN),
    }


def losses_fn(params: Params, data: tuple[jax.Array, jax.Array], scale: jax.Array) -> jax.Array:
    """Returns the scaled losses (m,) of a network that computes in the dtype of ``params``."""
    x, y = (a.astype(params["in"].dtype) for a in data)
    error = jnp.tanh(x @ params["in"]) @ params["out"] - y
    return scale * jnp.mean(error.astype(jnp.float32) ** 2, axis=0)


def train(
    data: tuple[jax.Array, jax.Array],
    scale: LossScale,
    *,
    dtype: Any = jnp.float16,
    dynamic: bool = True,
) -> Log:
    """Takes ``STEPS`` steps in one ``scan``."""
    aggregator, adam = jaxmtl.upgrad(num_tasks=TASKS), optax.adam(1e-2)
    params = initial_params()

    def step(carry: Any, _: None) -> tuple[Any, Log]:
        params, mtl_state, opt_state, scale = carry
        narrow = jax.tree.map(lambda p: p.astype(dtype), params)
        losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(narrow, data, scale.value)
        update, new_state = aggregator.update(jacobian, mtl_state, params)  # float32, as params
        update = jax.tree.map(lambda u: u / scale.value, update)
        updates, new_opt_state = adam.update(update, opt_state, params)

        # A skipped step is one for Adam too, whose momentum would move the parameters.
        overflow = new_state.mtl_skipped > mtl_state.mtl_skipped
        new = jaxmtl.apply_updates(params, updates), new_opt_state
        params, opt_state = jax.tree.map(
            lambda x, old: jnp.where(overflow, old, x), new, (params, opt_state)
        )
        log = Log(losses / scale.value, new_state.mtl_weights, scale.value, new_state.mtl_skipped)
        scale = follow(scale, overflow) if dynamic else scale
        return (params, new_state, opt_state, scale), log

    log: Log
    carry = params, aggregator.init(params), adam.init(params), scale
    _, log = jax.lax.scan(step, carry, length=STEPS)
    return log


def main() -> None:
    """Trains in float16, from a loss scale that is far too large, and prints what came of it."""
    log = jax.jit(train)(make_data(), start_scale(24))
    print(f"losses {np.round(log.losses[0], 3)} -> {np.round(log.losses[-1], 3)}")
    print(f"loss scale 2^{np.log2(log.scale[0]):.0f} -> 2^{np.log2(log.scale[-1]):.0f}")
    print(f"steps skipped: {log.skipped[-1]} of {STEPS}")


if __name__ == "__main__":
    main()
