"""Three tasks on digits with a plain pytree of parameters, on both routes.

    python -m experiments.examples.plain_pytrees

Two hundred steps in one ``scan``, three seeds in one ``vmap`` (``_problem.train_seeds``): losses by
name in, weights by name out, the heads partitioned from the trunk, CAGrad's radius on a schedule.
``train`` holds the Jacobian; ``train_without_jacobian`` is the same run by
``jaxmtl.value_and_grad``, where ``shared=`` stands for the partition, and the schedule is called
with the step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxmtl
from experiments.examples import _problem as problem
from experiments.examples._named import by_task, stack_losses
from experiments.examples._problem import TASKS, Batch, Layer, Log, Params


def dense(layer: Layer, x: jax.Array) -> jax.Array:
    """Returns one dense layer's output."""
    return x @ layer["kernel"] + layer["bias"]


def losses_fn(params: Params, batch: Batch) -> jax.Array:
    """Returns the losses (m,) in the order of the tasks."""
    z = jnp.tanh(dense(params["trunk"], batch.images))
    outputs = {task: dense(params["heads"][task], z) for task in TASKS}
    return stack_losses(problem.losses_by_name(outputs, batch), TASKS)


def train(params: Params, batches: Batch) -> Log:
    """Takes one step for each batch; safe under ``jit`` and ``vmap``."""
    optimizer = problem.make_optimizer(len(batches.digit))

    def step(carry: tuple[Params, Any], batch: Batch) -> tuple[tuple[Params, Any], Log]:
        params, opt_state = carry
        losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params, batch)
        updates, opt_state = optimizer.update(jacobian, opt_state, params, losses=losses)
        params = jaxmtl.apply_updates(params, updates)
        return (params, opt_state), problem.make_log(losses, opt_state)

    _, log = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    return log


def train_without_jacobian(params: Params, batches: Batch) -> Log:
    """Does what ``train`` does with no more than one gradient at a time."""
    num_steps = len(batches.digit)
    adam = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    c = problem.radius(num_steps)

    def step(carry: tuple[Params, Any, Any], inputs: tuple[jax.Array, Batch]) -> Any:
        params, mtl_state, opt_state = carry
        count, batch = inputs
        aggregator = jaxmtl.cagrad(c(count), num_tasks=len(TASKS))
        value_and_grad = jaxmtl.value_and_grad(
            losses_fn, aggregator, shared={"trunk": True, "heads": False}
        )
        (losses, mtl_state), grads = value_and_grad(params, mtl_state, batch)
        updates, opt_state = adam.update(grads, opt_state, params)
        params = jaxmtl.apply_updates(params, updates)
        log = Log(by_task(losses, TASKS), by_task(mtl_state.mtl_weights, TASKS))
        return (params, mtl_state, opt_state), log

    mtl_state = jaxmtl.cagrad(c(0), num_tasks=len(TASKS)).init(params)
    carry = params, mtl_state, adam.init(params)
    log: Log
    _, log = jax.lax.scan(step, carry, (jnp.arange(num_steps), batches))
    return log


def main() -> None:
    """Trains all seeds at once."""
    problem.show(problem.train_seeds(train))


if __name__ == "__main__":
    main()
