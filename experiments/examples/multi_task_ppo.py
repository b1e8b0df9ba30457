"""A rule in a PPO loop of several tasks: minibatches by task, ``TrainState``, weights by name.

    python -m experiments.examples.multi_task_ppo

Three made-up tasks share one Gaussian policy; rewards of the third are a hundred times as large.
After 300 iterations the mean has learned that one alone (error 0.07, the others 0.51 and 1.54), as
has UPGrad, which does not even out norms; Aligned-MTL all three (0.08, 0.16, 0.11). The places
marked RULE are what changes in a loop that took ``jax.grad`` of the mean loss. In soft actor-critic
they go into critic and actor, each with a state of its own: ``experiments.metaworld.learner``.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxmtl
from jaxmtl.flax import TrainState

TASKS = ("reach", "push", "lift")
SCALES = jnp.array([1.0, 1.0, 100.0])  # of their rewards
PER_TASK, EPOCHS, STATE, ACTION = 64, 4, 4, 2


class Minibatch(NamedTuple):
    """Transitions of every task, leaves (m, PER_TASK, ...)."""

    inputs: jax.Array  # states with the task beside them
    actions: jax.Array
    log_densities: jax.Array  # of the policy that acted
    advantages: jax.Array


class Policy(nn.Module):
    """A Gaussian policy: means, and logarithms of standard deviations."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps (..., inputs) to the means, and to logarithms that no input changes."""
        hidden = nn.tanh(nn.Dense(32)(inputs))
        log_std = self.param("log_std", nn.initializers.constant(-0.5), (ACTION,))
        return nn.Dense(ACTION)(hidden), jnp.asarray(log_std)


policy: Any = Policy().apply


def log_density(params: Any, inputs: jax.Array, actions: jax.Array) -> jax.Array:
    """Returns the logarithm of the policy's density, without its constant."""
    mean, log_std = policy(params, inputs)
    return jnp.sum(-0.5 * ((actions - mean) / jnp.exp(log_std)) ** 2 - log_std, axis=-1)


def collect(params: Any, key: jax.Array) -> tuple[Minibatch, jax.Array]:
    """Acts once in each of PER_TASK states of every task: your environments' loop."""
    keys, shape = jax.random.split(key), (len(TASKS), PER_TASK)
    states = jax.random.normal(keys[0], (*shape, STATE))
    task = jnp.broadcast_to(jnp.eye(len(TASKS))[:, None], (*shape, len(TASKS)))
    inputs = jnp.concatenate([states, task], axis=-1)
    mean, log_std = policy(params, inputs)
    actions = mean + jnp.exp(log_std) * jax.random.normal(keys[1], mean.shape)
    wanted = jax.random.normal(jax.random.key(7), (len(TASKS), STATE, ACTION)) / STATE**0.5
    errors = jnp.sum((actions - jnp.einsum("mbs,msa->mba", states, wanted)) ** 2, axis=-1)
    rewards = -SCALES[:, None] * errors
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    batch = Minibatch(inputs, actions, log_density(params, inputs, actions), advantages)
    return batch, errors.mean(axis=1)


def task_loss(params: Any, batch: Minibatch) -> jax.Array:
    """Returns PPO's clipped loss of ONE task on its own minibatch."""
    ratio = jnp.exp(log_density(params, batch.inputs, batch.actions) - batch.log_densities)
    clipped = jnp.clip(ratio, 0.8, 1.2)
    return -jnp.mean(jnp.minimum(ratio * batch.advantages, clipped * batch.advantages))


@jax.jit
def iteration(state: TrainState, key: jax.Array) -> tuple[TrainState, dict[str, Any]]:
    """Collects, takes the epochs, and returns what to log."""
    batch, errors = collect(state.params, key)
    # RULE 1: in place of jax.grad(mean loss), one gradient per task, each on its own minibatch.
    gradients = jaxmtl.value_and_jacobian(task_loss, in_axes=(None, 0))
    log: dict[str, Any] = {}
    for _ in range(EPOCHS):
        losses, jacobian = gradients(state.params, batch)
        # RULE 2: the rule, first in the optimizer's chain, takes the rows of all tasks.
        state = state.apply_gradients(grads=jacobian, losses=losses)
        # Its weights, the cosines and conflicts, by the names of the tasks.
        log = jaxmtl.monitor(jacobian=jacobian, state=state.opt_state, names=TASKS)
    return state, log | {"error": dict(zip(TASKS, errors, strict=True))}


def train(method: str, num_iterations: int = 300) -> dict[str, Any]:
    """Trains by a rule, and returns the last log."""
    # RULE 3: the optimizer's chain.
    rule = jaxmtl.make(method, num_tasks=len(TASKS))
    params = Policy().init(jax.random.key(0), jnp.zeros((1, STATE + len(TASKS))))
    tx = optax.chain(rule, optax.adam(3e-3))
    state, log = TrainState.create(apply_fn=policy, params=params, tx=tx), {}
    for i in range(num_iterations):
        state, log = iteration(state, jax.random.fold_in(jax.random.key(1), i))
    return dict(jax.device_get(log))


def main(num_iterations: int = 300) -> None:
    """Trains by three rules, and says whose worst task is best."""
    worst = {}
    for method in ("linear_scalarization", "upgrad", "aligned_mtl"):
        log = train(method, num_iterations)
        found = [f"{t} {log['error'][t]:.2f} (weight {log['weights'][t]:.3f})" for t in TASKS]
        print(f"{method:<21} errors: {', '.join(found)}; conflicts {log['conflict_rate']:.2f}")
        worst[method] = max(log["error"].values())
    best = min(worst, key=lambda method: worst[method])
    print(f"Worst task: {worst[best]:.2f} with {best}, up to {max(worst.values()):.2f} elsewhere.")


if __name__ == "__main__":
    main()
