"""Training steps of the rules that need more than one batch or one evaluation, written out.

    python -m experiments.examples.training_steps

Two noisy quadratics whose Pareto set is the segment between two targets. Each step below is the
whole of what a user writes: MoDo with three and with two batches, SDMGrad, FAMO with its second
evaluation, LDC-MTL's double loop, nested objectives with MoCo. Printed is how far each rule
ends from the segment, in the direction across it (start: 3).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmtl import apply_updates
from jaxmtl.engine import cross_gramian, value_and_grad
from jaxmtl.nested import hypergradient
from jaxmtl.rules.famo import famo
from jaxmtl.rules.ldc_mtl import descend_lower, ldc_mtl
from jaxmtl.rules.moco import moco
from jaxmtl.rules.modo import modo
from jaxmtl.rules.sdmgrad import sdmgrad

TARGETS = jnp.array([[-1.0, 0.0], [1.0, 0.0]])
NOISE = 0.3
Step = Callable[..., Any]


def losses_fn(params: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns the losses (2,) of noisy gradients: distances to the two targets."""
    return jnp.sum((params - TARGETS) ** 2, axis=1) / 2 + noise @ params + 1


def draw(key: jax.Array) -> jax.Array:
    """Returns one batch: the noise (2, 2) of the two gradients."""
    return NOISE * jax.random.normal(key, (2, 2))


def with_three_batches(rule: Any, optimizer: Any, params: Any, state: Any, key: jax.Array) -> Any:
    """MoDo or SDMGrad: weights from two independent batches, the step from a third."""
    rule_state, opt_state = state
    first, second, third = map(draw, jax.random.split(key, 3))
    cross = cross_gramian(losses_fn)(params, (first,), (second,))
    (_, rule_state), grads = value_and_grad(losses_fn, rule)(
        params, rule_state, third, cross_gramian=cross
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return apply_updates(params, updates), (rule_state, opt_state)


def with_two_batches(rule: Any, optimizer: Any, params: Any, state: Any, key: jax.Array) -> Any:
    """MoDo of the journal version: the step from (J_1 + J_2) / 2."""
    rule_state, opt_state = state
    first, second = map(draw, jax.random.split(key))
    cross = cross_gramian(losses_fn)(params, (first,), (second,))

    def mean_losses(params: Any) -> jax.Array:
        return (losses_fn(params, first) + losses_fn(params, second)) / 2

    (_, rule_state), grads = value_and_grad(mean_losses, rule)(
        params, rule_state, cross_gramian=cross
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return apply_updates(params, updates), (rule_state, opt_state)


def famo_step(rule: Any, optimizer: Any, params: Any, state: Any, key: jax.Array) -> Any:
    """FAMO: the losses of the previous batch at the parameters that its step has led to."""
    (rule_state, previous), opt_state = state
    batch = draw(key)
    after = losses_fn(params, previous)
    (_, rule_state), grads = value_and_grad(losses_fn, rule)(
        params, rule_state, batch, previous_batch_losses=after
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return apply_updates(params, updates), ((rule_state, batch), opt_state)


def double_loop_step(rule: Any, optimizer: Any, params: Any, state: Any, key: jax.Array) -> Any:
    """LDC-MTL, algorithm 2: N steps on the lower problem first."""
    rule_state, opt_state = state
    batch = draw(key)
    lower = descend_lower(losses_fn, rule, num_steps=5, step_size=0.1)(params, rule_state, batch)
    (_, rule_state), grads = value_and_grad(losses_fn, rule)(
        params, rule_state, batch, lower_losses=lower
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return apply_updates(params, updates), (rule_state, opt_state)


def nested_step(rule: Any, optimizer: Any, params: Any, state: Any, key: jax.Array) -> Any:
    """MoCo, algorithm 2: the losses see the parameters through z, which a lower problem copies."""
    (rule_state, z), opt_state = state

    def upper(params: jax.Array, z: jax.Array, noise: jax.Array) -> jax.Array:
        return losses_fn(z, noise)

    def lower(params: jax.Array, z: jax.Array, noise: jax.Array) -> jax.Array:
        return jnp.sum((z - params) ** 2) / 2

    nested = hypergradient(upper, lower, step_size=0.5, return_lower=True)
    (losses, z), jacobian = nested(params, z, draw(key))
    update, rule_state = rule.update(jacobian, rule_state, params, losses=losses)
    updates, opt_state = optimizer.update(update, opt_state, params)
    return apply_updates(params, updates), ((rule_state, z), opt_state)


def runs() -> dict[str, tuple[Step, Any, Any]]:
    """Returns for each example its step, its rule and, beside the rule's, its first state."""
    return {
        "modo, three batches": (with_three_batches, modo(0.05, num_tasks=2), None),
        "modo, two batches": (with_two_batches, modo(0.05, num_tasks=2), None),
        "sdmgrad": (with_three_batches, sdmgrad(0.3, num_tasks=2), None),
        "famo": (famo_step, famo(num_tasks=2), jnp.zeros((2, 2))),
        "ldc_mtl, double loop": (double_loop_step, ldc_mtl(num_tasks=2, double_loop=True), None),
        "moco, nested": (nested_step, moco(num_tasks=2, beta=0.1), jnp.array([0.5, 3.0])),
    }


def train(step: Step, rule: Any, extra: Any, num_steps: int = 400) -> jax.Array:
    """Returns the parameters after so many steps."""
    optimizer = optax.sgd(0.05)
    params = jnp.array([0.5, 3.0])
    rule_state = rule.init(params)
    state = (rule_state if extra is None else (rule_state, extra), optimizer.init(params))

    def body(carry: Any, key: jax.Array) -> tuple[Any, None]:
        return step(rule, optimizer, *carry, key), None

    keys = jax.random.split(jax.random.key(0), num_steps)
    (params, _), _ = jax.jit(partial(jax.lax.scan, body))((params, state), keys)
    return jnp.asarray(params)


def main(num_steps: int = 400) -> None:
    """Runs every example and says which reach the segment."""
    distances = {}
    print("distance from the Pareto set, 3.00 at the start")
    for name, (step, rule, extra) in runs().items():
        distances[name] = abs(float(train(step, rule, extra, num_steps)[1]))
        print(f"{name:<22} {distances[name]:.2f}")
    near = [name for name, distance in distances.items() if distance < NOISE]
    print(f"Within the noise of {NOISE} of the Pareto set: {', '.join(near) or 'none'}.")


if __name__ == "__main__":
    main()
