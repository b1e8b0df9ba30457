"""Three rewards whose sum hides their conflicts: GRPO, GDPO, and one row per reward.

    python -m experiments.examples.multi_reward_bandit

A bandit stands for the language model: a prompt is one of 12 contexts, an answer one of 24 arms,
and the policy a softmax in features of both. An answer is right or not, well formed or not, and has
a length: `correct` and `format` are 0 or 1, `brevity` is minus the length and has a larger scale.
The arms that are likely to be right for a prompt are the long ones for it, which is the conflict.

Each step draws 16 answers per prompt. GRPO standardizes the sum of rewards within the group; GDPO
standardizes each reward, adds and whitens. Both have one loss. The rows standardize each reward as
GDPO does and keep three losses, which a method of the library combines.

The table has, per reward, the gain in expected reward in percent of what the best answer to every
prompt would gain (not for all rewards at once), means over seeds; the smallest of the three; and
the number of seeds in which some reward ended below the uniform policy's. Expected: the sum and
GDPO's advantages both pay for brevity with right answers (-42 and -40 %); GDPO, whose rewards have
one scale, differs in format alone (60 for 48 %), so that it is not the scales that hide the
conflict but the addition. With one row per reward CAGrad pays less (-25 %), UPGrad little (-8 %),
and MGDA gains in all three (15, 78 and 22 %) for less brevity.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxmtl
from jaxmtl.rewards import gdpo_advantages, grpo_advantages, standardize_rewards

REWARDS = ("correct", "format", "brevity")
CONTEXTS, ARMS, FEATURES, SAMPLES = 12, 24, 5, 16
RATE = 0.03


class Bandit(NamedTuple):
    """One draw of the problem.

    Attributes:
      prompts: (contexts, features).
      arms: (arms, features).
      means: (contexts, arms, 3), the expected rewards; the first two are chances.
    """

    prompts: jax.Array
    arms: jax.Array
    means: jax.Array


class Entry(NamedTuple):
    """One line of the table.

    Attributes:
      advantages: From rewards (groups, samples, 3) to one (groups, samples, losses) per loss.
      make: Makes the method that combines the losses' gradients.
    """

    advantages: Callable[[jax.Array], jax.Array]
    make: Callable[[], jaxmtl.Aggregator]


METHODS = {
    "GRPO": Entry(lambda r: grpo_advantages(r)[..., None], jaxmtl.linear_scalarization),
    "GDPO": Entry(lambda r: gdpo_advantages(r)[..., None], jaxmtl.linear_scalarization),
    "rows, CAGrad": Entry(standardize_rewards, jaxmtl.cagrad),
    "rows, UPGrad": Entry(standardize_rewards, jaxmtl.upgrad),
    "rows, MGDA": Entry(standardize_rewards, jaxmtl.mgda),
}


def draw_bandit(key: jax.Array) -> Bandit:
    """Draws prompts, arms and what they earn."""
    of_prompts, of_arms, of_right, of_form = jax.random.split(key, 4)
    prompts = jax.random.normal(of_prompts, (CONTEXTS, FEATURES))
    arms = jax.random.normal(of_arms, (ARMS, FEATURES))
    right = prompts @ jax.random.normal(of_right, (FEATURES, FEATURES)) @ arms.T / FEATURES**0.5
    form = jnp.broadcast_to(arms @ jax.random.normal(of_form, (FEATURES,)), right.shape)
    brevity = 3 * (0.3 * form - right)
    chances = (jax.nn.sigmoid(1.5 * right - 2), jax.nn.sigmoid(form))
    return Bandit(prompts, arms, jnp.stack([*chances, brevity], -1))


def log_policy(params: dict[str, jax.Array], bandit: Bandit) -> jax.Array:
    """Returns the (contexts, arms) logarithms of the policy."""
    wishes = bandit.prompts @ params["weights"] + params["bias"]
    return jax.nn.log_softmax(wishes @ bandit.arms.T)


def expected_rewards(params: dict[str, jax.Array], bandit: Bandit) -> jax.Array:
    """Returns the (3,) exact expected rewards of the policy."""
    chances = jnp.exp(log_policy(params, bandit))
    return jnp.einsum("ca,cak->k", chances, bandit.means) / CONTEXTS


def draw_answers(
    params: dict[str, jax.Array], bandit: Bandit, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws answers (contexts, samples) and their rewards (contexts, samples, 3)."""
    of_answers, of_rewards = jax.random.split(key)
    logits = log_policy(params, bandit)[:, None]
    answers = jax.random.categorical(of_answers, logits, shape=(CONTEXTS, SAMPLES))
    means = bandit.means[jnp.arange(CONTEXTS)[:, None], answers]
    binary = jax.random.bernoulli(of_rewards, means[..., :2])
    return answers, jnp.concatenate([binary.astype(means.dtype), means[..., 2:]], -1)


def train(entry: Entry, key: jax.Array, steps: int) -> jax.Array:
    """Trains one policy and returns the (3,) gains, as shares of the attainable ones."""
    of_bandit, of_steps = jax.random.split(key)
    bandit = draw_bandit(of_bandit)
    params = {"weights": jnp.zeros((FEATURES, FEATURES)), "bias": jnp.zeros(FEATURES)}
    aggregator = entry.make()
    adam = optax.adam(RATE)

    def step(carry: tuple[Any, Any, Any], key: jax.Array) -> tuple[tuple[Any, Any, Any], None]:
        params, state, adam_state = carry
        answers, rewards = draw_answers(params, bandit, key)
        advantages = entry.advantages(rewards)

        def losses_fn(p: dict[str, jax.Array]) -> jax.Array:
            logs = jnp.take_along_axis(log_policy(p, bandit), answers, 1)
            return -jnp.mean(advantages * logs[..., None], (0, 1))

        (_, state), grads = jaxmtl.value_and_grad(losses_fn, aggregator)(params, state)
        updates, adam_state = adam.update(grads, adam_state, params)
        return (jaxmtl.apply_updates(params, updates), state, adam_state), None

    start = (params, aggregator.init(params), adam.init(params))
    (trained, _, _), _ = jax.lax.scan(step, start, jax.random.split(of_steps, steps))
    before, best = expected_rewards(params, bandit), jnp.mean(jnp.max(bandit.means, 1), 0)
    return (expected_rewards(trained, bandit) - before) / (best - before)


def run(steps: int, seeds: int) -> dict[str, jax.Array]:
    """Returns the (seeds, 3) gains of every method, on the same problems and draws."""
    keys = jax.random.split(jax.random.key(0), seeds)
    return {
        name: jax.jit(jax.vmap(lambda key, entry=entry: train(entry, key, steps)))(keys)
        for name, entry in METHODS.items()
    }


def table(gains: dict[str, jax.Array]) -> str:
    """Returns the table in Markdown."""
    lines = [f"| method | {' | '.join(REWARDS)} | smallest | seeds with a loss |", "|---" * 6 + "|"]
    for name, each in gains.items():
        numbers = [*each.mean(0), each.min(1).mean()]
        cells = " | ".join(f"{100 * x:.0f} %" for x in numbers)
        losing = int(jnp.sum(jnp.any(each < 0, 1)))
        lines.append(f"| {name} | {cells} | {losing} of {len(each)} |")
    return "\n".join(lines)


def conclude(gains: dict[str, jax.Array]) -> str:
    """Returns what the numbers say, in words that hold for these numbers alone."""
    smallest = {name: float(each.min(1).mean()) for name, each in gains.items()}
    order = sorted(smallest, key=lambda name: smallest[name])
    ranked = ", ".join(f"{name} ({100 * smallest[name]:.0f} %)" for name in order)
    paid = [name for name in order if smallest[name] < 0]
    verdict = "No method pays for one reward with another."
    if paid:
        verdict = f"On average a reward ends below its start under {', '.join(paid)}."
    return f"Smallest gain of the three rewards, from worst to best: {ranked}. {verdict}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains every method, prints the table and what follows from it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args(arguments)
    gains = run(options.steps, options.seeds)
    print(table(gains), conclude(gains), sep="\n\n")


if __name__ == "__main__":
    main()
