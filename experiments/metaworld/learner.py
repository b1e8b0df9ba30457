"""Soft actor-critic on all tasks at once: one update, a rule in the critic and in the actor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxmtl
from experiments.metaworld.methods import SINGLE, Direction, make_direction
from experiments.metaworld.networks import make_network

Params = Any
LOG_STD = (-20.0, 2.0)


@dataclass(frozen=True)
class Options:
    """What decides the outcome of a run, besides rule and seed."""

    benchmark: str
    tasks: tuple[str, ...]
    steps: int  # of every task; as many updates, but for the random ones
    evaluate_every: int
    episodes: int  # of an evaluation, for each task
    network: str = "shared"  # or "multi_head"; an agent per task has its own
    widths: tuple[int, ...] = (128, 128, 128)
    batch_size: int = 64  # of each task
    random_steps: int = 1_500
    horizon: int = 150
    capacity: int = 1_000_000  # of the buffer of each task
    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 0.005
    temperature: float = 1.0  # at the start
    monitor_every: int = 50  # updates
    reward_version: str = "v2"
    reward_scale: bool = True  # divide rewards by their running deviation


class Batch(NamedTuple):
    """Transitions (m, b, ...) of all tasks; none ends an episode but by its time limit."""

    observations: Any
    actions: Any
    rewards: Any  # (m, b)
    next_observations: Any


class Part(NamedTuple):
    """What is learned of actor, critic or temperature."""

    params: Params
    rule: Any  # state
    optimizer: Any  # state


class Agent(NamedTuple):
    """The state of learning."""

    actor: Part
    critic: Part
    target: Params  # of the critic
    temperature: Part  # its logarithm, () or (m,)


class Learner(NamedTuple):
    """Functions of a rule."""

    init: Callable[..., Agent]  # (key)
    update: Callable[..., Agent]  # (agent, batch, key)
    monitored: Callable[..., tuple[Agent, dict[str, Any]]]  # the same, with what is logged
    act: Callable[..., jax.Array]  # (actor's parameters, observations (m, o), key) -> (m, a)
    best: Callable[..., jax.Array]  # the same without a key: no noise


def squashed(outputs: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns actions of a Gaussian squashed by tanh, and the logarithm of their density.

    The density has the exact correction, ``log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u))``,
    which does not underflow where the action saturates.

    Args:
      outputs: (..., 2 a), means and logarithms of standard deviations, clipped to `LOG_STD`.
      noise: (..., a), standard normal.

    Returns:
      (..., a) and (...).
    """
    mean, log_std = jnp.split(outputs, 2, axis=-1)
    log_std = jnp.clip(log_std, *LOG_STD)
    u = mean + jnp.exp(log_std) * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    slope = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
    return jnp.tanh(u), jnp.sum(log_normal - slope, axis=-1)


def make_learner(options: Options, method: str, observation_size: int, action_size: int) -> Learner:
    """Makes the learner of a rule."""
    m, single = len(options.tasks), method == SINGLE
    kind = "single" if single else options.network
    sizes = kind, m, observation_size, 2 * action_size, options.widths
    actor = make_network(*sizes, twins=False)
    critic = make_network(kind, m, observation_size + action_size, 1, options.widths, twins=True)
    adam = optax.adam(options.learning_rate)
    one_hot = jnp.eye(m)

    def policy(params: Params, observations: Any, task: Any, noise: Any) -> Any:
        return squashed(actor.apply(params, observations, task), noise)

    def values(params: Params, observations: Any, actions: Any, task: jax.Array) -> jax.Array:
        x = jnp.concatenate([observations, actions], axis=-1)
        return critic.apply(params, x, task)[..., 0]  # (2, b)

    def target_of(
        actor_params: Params, target: Params, batch: Batch, task: Any, alpha: Any, noise: Any
    ) -> jax.Array:
        actions, log_density = policy(actor_params, batch.next_observations, task, noise)
        worse = values(target, batch.next_observations, actions, task).min(axis=0)
        return batch.rewards + options.discount * (worse - alpha * log_density)

    def critic_loss(params: Params, batch: Batch, task: Any, targets: Any) -> Any:
        errors = values(params, batch.observations, batch.actions, task) - targets[None]
        return jnp.mean(errors**2, axis=1).sum(), None

    def actor_loss(
        params: Params, critic_params: Params, batch: Batch, task: Any, alpha: Any, noise: Any
    ) -> Any:
        actions, log_density = policy(params, batch.observations, task, noise)
        worse = values(critic_params, batch.observations, actions, task).min(axis=0)
        return jnp.mean(alpha * log_density - worse), jnp.mean(log_density)

    of_critic = make_direction(method, m, critic_loss, (critic.axes, 0, 0, 0))
    of_actor = make_direction(method, m, actor_loss, (actor.axes, critic.axes, 0, 0, 0, 0))
    targets_of = jax.vmap(target_of, (actor.axes, critic.axes, 0, 0, 0, 0))

    def init(key: jax.Array) -> Agent:
        keys = jax.random.split(key)
        of_parts = (of_actor, actor.init(keys[0])), (of_critic, critic.init(keys[1]))
        first, second = (Part(x, rule.init(x), adam.init(x)) for rule, x in of_parts)
        target = jax.tree.map(jnp.copy, second.params)  # an update may overwrite the other
        start = jnp.full((m,) if single else (), jnp.log(options.temperature))
        return Agent(first, second, target, Part(start, (), adam.init(start)))

    def moved(part: Part, update: Any, rule: Any) -> Part:
        updates, state = adam.update(update, part.optimizer, part.params)
        return Part(jaxmtl.apply_updates(part.params, updates), rule, state)

    def step(
        agent: Agent, batch: Batch, key: jax.Array, watched: bool
    ) -> tuple[Agent, dict[str, Any]]:
        def run(direction: Direction) -> Callable[..., Any]:
            return direction.monitored if watched else direction.update

        keys = jax.random.split(key, 4)
        shape = *batch.rewards.shape, action_size
        noise = [jax.random.normal(k, shape) for k in keys[:2]]
        log_alpha = agent.temperature.params
        alpha = jnp.broadcast_to(jnp.exp(log_alpha), (m,))
        targets = targets_of(agent.actor.params, agent.target, batch, one_hot, alpha, noise[0])
        part = agent.critic
        critic_losses, _, update, rule, critic_log = run(of_critic)(
            part.params, part.rule, (batch, one_hot, targets), keys[2]
        )
        new_critic = moved(part, update, rule)
        part = agent.actor
        data = new_critic.params, batch, one_hot, alpha, noise[1]
        actor_losses, log_density, update, rule, actor_log = run(of_actor)(
            part.params, part.rule, data, keys[3]
        )
        new_actor = moved(part, update, rule)
        # The loss of a temperature, exp(log_alpha) (-log density - target entropy), is its own
        # derivative; the target entropy is minus the size of an action.
        slopes = jnp.exp(log_alpha) * (action_size - log_density)
        temperature = moved(agent.temperature, slopes if single else slopes.mean(), ())
        target = optax.incremental_update(new_critic.params, agent.target, options.tau)
        log = {
            "critic": critic_log | {"losses": critic_losses},
            "actor": actor_log | {"losses": actor_losses},
        }
        return Agent(new_actor, new_critic, target, temperature), log

    def act(params: Params, observations: jax.Array, noise: jax.Array) -> jax.Array:
        one = jax.vmap(policy, (actor.axes, 0, 0, 0))
        return one(params, observations[:, None], one_hot, noise)[0][:, 0]

    def best(params: Params, observations: jax.Array) -> jax.Array:
        return act(params, observations, jnp.zeros((m, 1, action_size)))

    return Learner(
        init,
        lambda agent, batch, key: step(agent, batch, key, watched=False)[0],
        lambda agent, batch, key: step(agent, batch, key, watched=True),
        lambda params, observations, key: act(
            params, observations, jax.random.normal(key, (m, 1, action_size))
        ),
        best,
    )
