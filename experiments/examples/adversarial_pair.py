"""An adversarial pair: features that help a task and hide where an input comes from.

    python -m experiments.examples.adversarial_pair

Digits from two domains, upright and inverted in brightness. A trunk is to serve the digit's
classifier and to defeat the domain's: the second loss reaches the trunk with its sign reversed, so
that the two rows conflict by construction. The heads descend their own losses.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jaxmtl

STEPS, HIDDEN = 2000, 64


@jax.custom_vjp
def reverse(z: jax.Array) -> jax.Array:
    """Returns z; its gradient comes back with the other sign (Ganin et al. 2016)."""
    return z


reverse.defvjp(lambda z: (z, None), lambda _, g: (-g,))


def load() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns pictures (n, 64), their digits and their domains (0: as they are, 1: inverted)."""
    digits = load_digits()
    images, labels = jnp.asarray(digits.data / 16), jnp.asarray(digits.target)
    domain = jnp.arange(len(labels)) % 2
    return jnp.where(domain[:, None] == 0, images, 1 - images), labels, domain


def outputs(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the logits of the digit and of the domain."""
    z = jnp.tanh(images @ params["trunk"])
    return z @ params["digit"], jnp.tanh(reverse(z) @ params["domain"]) @ params["domain_out"]


def losses_fn(params: Any, batch: Any) -> dict[str, jax.Array]:
    """Returns the two losses by name."""
    images, labels, domain = batch
    digit, where = outputs(params, images)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return {
        "digit": jnp.mean(cross_entropy(digit, labels)),
        "domain": jnp.mean(cross_entropy(where, domain)),
    }


def train(aggregator: jaxmtl.Aggregator, steps: int = STEPS) -> tuple[float, float, float]:
    """Returns the accuracies of digit and domain, and how often the trunk's rows conflicted."""
    data = load()
    shapes = {"trunk": (64, HIDDEN), "digit": (HIDDEN, 10), "domain": (HIDDEN, 16)}
    shapes["domain_out"] = (16, 2)
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    params = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys[1:], shapes.items(), strict=True)
    }
    labels = {name: "trunk" if name == "trunk" else "heads" for name in params}
    heads = jaxmtl.linear_scalarization(jnp.ones(2))
    groups = optax.partition({"trunk": aggregator, "heads": heads}, labels)
    optimizer = optax.chain(groups, optax.adam(3e-3))
    index = jax.random.randint(keys[0], (steps, 64), 0, 1500)

    def step(carry: Any, index: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        batch = tuple(x[index] for x in data)
        losses, rows = jaxmtl.value_and_jacobian(losses_fn)(params, batch)
        updates, state = optimizer.update(rows, state, params, losses=losses)
        conflict = jaxmtl.metrics.conflict_rate(jaxmtl.gramian(rows["trunk"]))
        return (jaxmtl.apply_updates(params, updates), state), conflict

    (params, _), conflicts = jax.jit(lambda c: jax.lax.scan(step, c, index))(
        (params, optimizer.init(params))
    )
    digit, where = outputs(params, data[0][1500:])
    right = jnp.mean(digit.argmax(1) == data[1][1500:])
    known = jnp.mean(where.argmax(1) == data[2][1500:])
    return float(right), float(known), float(jnp.mean(conflicts))


def main(steps: int = STEPS) -> None:
    """Prints both accuracies for the sum, as in domain-adversarial training, and for UPGrad."""
    print("trunk by     digit right   domain found (half is chance)   steps in conflict")
    rules = {"sum": jaxmtl.linear_scalarization(jnp.ones(2)), "upgrad": jaxmtl.upgrad()}
    found = []
    for name, rule in rules.items():
        right, known, conflict = train(rule, steps)
        found.append(known)
        print(f"{name:10} {100 * right:11.1f} %   {100 * known:27.1f} %   {100 * conflict:15.0f} %")
    hidden = [name for name, known in zip(rules, found, strict=True) if known < 0.6]
    print(f"The domain is hidden by: {', '.join(hidden) or 'neither'}.")


if __name__ == "__main__":
    main()
