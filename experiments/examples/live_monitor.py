"""Watching a training while it runs: one dictionary per step, printed live from a compiled loop.

    python -m experiments.examples.live_monitor

`jaxmtl.monitor` gathers losses, weights, norms, cosines and, of the update that Adam really
applies, the progress of every task, by name. `jax.debug.callback` hands them to the host every
fiftieth step of a single compiled ``scan``; a progress bar, a file or a plot would do as well.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxmtl
from experiments.examples import _problem as problem
from experiments.examples._problem import TASKS

STEPS, EVERY = 200, 50


def losses_fn(params: Any, batch: problem.Batch) -> dict[str, jax.Array]:
    """Returns the losses by name."""
    z = jnp.tanh(batch.images @ params["trunk"]["kernel"] + params["trunk"]["bias"])
    heads = params["heads"]
    outputs = {task: z @ heads[task]["kernel"] + heads[task]["bias"] for task in TASKS}
    return problem.losses_by_name(outputs, batch)


def show(step: Any, log: dict[str, Any]) -> None:
    """Prints one line per task; called on the host while the loop runs."""
    print(f"step {int(step)}: conflict rate {float(log['conflict_rate']):.2f}")
    for task in sorted(TASKS):
        print(
            f"  {task:<8} loss {float(log['losses'][task]):6.3f}  "
            f"weight {float(log['weights'][task]):5.2f}  norm {float(log['norms'][task]):6.3f}  "
            f"cosine with the step {float(log['update_cosines'][task]):+.2f}"
        )


def main(steps: int = STEPS, every: int = EVERY) -> None:
    """Trains once, prints every fiftieth step, and says how often rows conflicted."""
    key, data_key = jax.random.split(jax.random.key(0))
    params = problem.initial_params(key)
    batches = problem.draw_batches(problem.load_data(), data_key, steps)
    optimizer = optax.chain(jaxmtl.upgrad(num_tasks=len(TASKS)), optax.adam(1e-2))
    jaxmtl.check(optimizer, params, num_tasks=len(TASKS))

    def step(carry: Any, inputs: tuple[jax.Array, problem.Batch]) -> tuple[Any, jax.Array]:
        (params, state), (i, batch) = carry, inputs
        losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params, batch)
        updates, new = optimizer.update(jacobian, state, params, losses=losses)
        log = jaxmtl.monitor(jacobian=jacobian, updates=updates, losses=losses, state=new)
        jax.lax.cond(
            i % every == 0, lambda: jax.debug.callback(show, i, log, ordered=True), lambda: None
        )
        params = jaxmtl.apply_updates(params, updates, state=(state, new), on_skip="print")
        return (params, new), log["conflict_rate"]

    carry = (params, optimizer.init(params))
    run = jax.jit(lambda c, x: jax.lax.scan(step, c, x))
    _, rates = jax.block_until_ready(run(carry, (jnp.arange(steps), batches)))
    jax.effects_barrier()
    share = 100 * jnp.mean(rates > 0)
    worth = "a rule against conflicts has work to do" if share > 10 else "equal weights will do"
    print(f"Rows conflicted in {share:.0f} % of the steps: {worth}.")


if __name__ == "__main__":
    main()
