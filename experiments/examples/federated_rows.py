"""One row for each data share: clients that hold different digits train one model.

    python -m experiments.examples.federated_rows

Five clients hold two digits each, and unequal numbers of them. A round sends one gradient of each
client; the server combines the rows, by their mean or by a rule for which no client's loss rises to
first order. ``in_axes`` maps over clients, so that every row costs one client's gradient. In the
last two runs one client sends noise. Krum, made for such attacks, presumes that honest clients send
alike rows; with different digits they do not, and it fares worse than the mean.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxmtl

CLIENTS, SIZE, ROUNDS = 5, 60, 100


def shares() -> tuple[jax.Array, jax.Array]:
    """Returns pictures (clients, n, 64) and labels: client i holds the digits 2i and 2i + 1."""
    digits = load_digits()
    chosen = [np.flatnonzero(digits.target // 2 == i)[:SIZE] for i in range(CLIENTS)]
    index = np.stack(chosen)
    return jnp.asarray(digits.data[index] / 16), jnp.asarray(digits.target[index])


def client_loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the loss of one client on its own share."""
    logits = jnp.tanh(images @ params["in"]) @ params["out"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def train(
    aggregator: jaxmtl.Aggregator, noisy_client: bool = False, rounds: int = ROUNDS
) -> jax.Array:
    """Returns the losses (rounds, clients)."""
    data = shares()
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "in": jax.random.normal(keys[0], (64, 32)) / 8,
        "out": jax.random.normal(keys[1], (32, 10)) / 6,
    }
    optimizer = optax.chain(aggregator, optax.sgd(1.0))
    rows_of = jaxmtl.value_and_jacobian(client_loss, in_axes=(None, 0, 0))

    def corrupt(rows: Any, key: jax.Array) -> Any:
        noise = jax.tree.map(lambda x: jax.random.normal(key, x.shape[1:]), rows)
        return jax.tree.map(lambda x, n: x.at[0].set(n), rows, noise)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        losses, rows = rows_of(params, *data)
        rows = corrupt(rows, key) if noisy_client else rows
        updates, state = optimizer.update(rows, state, params, losses=losses)
        return (jaxmtl.apply_updates(params, updates), state), losses

    carry = (params, optimizer.init(params))
    _, losses = jax.jit(lambda c, k: jax.lax.scan(step, c, k))(
        carry, jax.random.split(keys[2], rounds)
    )
    found: jax.Array = losses
    return found


def main(rounds: int = ROUNDS) -> None:
    """Prints the losses of the last round, and what they say."""
    mean, krum = jaxmtl.linear_scalarization(), jaxmtl.krum(1, num_selected=2)
    runs = {
        "mean": train(mean, rounds=rounds),
        "upgrad": train(jaxmtl.upgrad(), rounds=rounds),
        "mean, client 0 sends noise": train(mean, True, rounds),
        "krum, client 0 sends noise": train(krum, True, rounds),
    }
    rises, worst = {}, {}
    print(f"{'':28}  mean of clients   worst client   rounds in which a loss rose")
    for name, losses in runs.items():
        honest = losses[:, 1:] if "noise" in name else losses
        rose = jnp.mean(jnp.any(jnp.diff(honest, axis=0) > 0, axis=1))
        last = honest[-1]
        rises[name], worst[name] = float(rose), float(last.max())
        print(f"{name:28}  {last.mean():15.3f}   {last.max():12.3f}   {100 * rose:20.0f} %")
    fewest, lowest = min(rises, key=rises.__getitem__), min(worst, key=worst.__getitem__)
    plain, guarded = (name for name in worst if "noise" in name)
    better = "better" if worst[guarded] < worst[plain] else "worse"
    print(
        f"Losses rise in the fewest rounds with {fewest}; the worst client ends lowest with "
        f"{lowest}. Against noise Krum is {better} than the mean."
    )


if __name__ == "__main__":
    main()
