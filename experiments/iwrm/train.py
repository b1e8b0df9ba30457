"""The data of instance-wise training, its steps by both routes, and a training as one scan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxmtl
from experiments.images import load_local_images, load_sklearn_digits, load_tfds_images
from experiments.iwrm.methods import METHODS, OPTIMIZERS
from experiments.iwrm.networks import ARCHITECTURES, Architecture, Params, init, logits
from experiments.methods import needs

State = Any
Example = tuple[jax.Array, jax.Array]  # an image and its label, or a batch of both
Curves = dict[str, jax.Array]


@dataclass(frozen=True)
class Options:
    """What decides the outcome of a training, besides method, rate and seed."""

    dataset: str
    epochs: int
    batch_size: int = 32
    optimizer: str = "sgd"
    examples: int = 1024  # of the training split, another subset for each seed


# --- data ---------------------------------------------------------------------------------------

# By the names of TFDS; those of gray images share MNIST's.
NETWORKS = dict.fromkeys(("digits", "mnist", "fashion_mnist", "kmnist"), "mnist") | {
    "cifar10": "cifar10",
    "svhn_cropped": "svhn",
    "eurosat/rgb": "eurosat",
}


@cache
def load(dataset: str, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns all training images (n, height, width, channels), normalized, and their labels.

    Means and deviations of the channels are those of the images at hand: of a part of a set where
    there is no more.

    Raises:
      FileNotFoundError: The set is not where it is looked for.
      ValueError: Images have another size or type than those of the data set.
    """
    if dataset == "digits":  # for smoke runs: they need no download
        images, labels = load_sklearn_digits("train")
        images = np.kron(images, np.ones((1, 2, 2), np.uint8))  # 8 x 8 is too little to convolve
    else:
        images, labels = load_local_images(dataset, data_dir) or load_tfds_images(
            dataset, "train", data_dir=data_dir
        )
        expected = ARCHITECTURES[NETWORKS[dataset]].shape
        found = (*images.shape[1:], 1)[:3]
        if found != expected or images.dtype != np.uint8:
            raise ValueError(
                f"expected images of height, width and channels {expected} and type uint8 for "
                f"{dataset}, got {found} and {images.dtype}; take the data set as published, or "
                "pass another --data-dir"
            )
    x = images.reshape(*images.shape[:3], -1).astype(np.float32) / 255
    return (x - x.mean(axis=(0, 1, 2))) / x.std(axis=(0, 1, 2)), labels


def subset(options: Options, data_dir: str | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples of a seed: images (n, height, width, channels) and labels (n,)."""
    images, labels = load(options.dataset, data_dir)
    chosen = np.random.default_rng(seed).permutation(len(labels))[: options.examples]
    return images[chosen], labels[chosen]


# --- training -----------------------------------------------------------------------------------


def make_loss(architecture: Architecture) -> Callable[[Params, Example], jax.Array]:
    """Returns the cross-entropy of one example."""

    def loss(params: Params, example: Example) -> jax.Array:
        x, label = example
        return -jax.nn.log_softmax(logits(architecture, params, x))[label]

    return loss


def cosine(product: jax.Array, squares: jax.Array) -> jax.Array:
    """Returns product / sqrt(squares), 0 where a vector vanishes."""
    return jnp.where(squares > 0, product / jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


Direction = Callable[..., tuple[jax.Array, Params, jax.Array, State]]


def weighted_direction(aggregators: Sequence[jaxmtl.Aggregator], loss: Any) -> Direction:
    """Returns a step of the rules that have a weighting, without the Jacobian.

    Which rule it is, is an argument: one compiled program serves all of them.
    """
    value_and_gramian = jaxmtl.value_and_gramian(loss, in_axes=(None, 0))

    def direction(
        rule: jax.Array, params: Params, states: tuple[State, ...], batch: Example, key: jax.Array
    ) -> tuple[jax.Array, Params, jax.Array, State]:
        losses, gramian, pullback = value_and_gramian(params, batch)

        def weigh(i: int, states: tuple[State, ...]) -> tuple[jax.Array, tuple[State, ...]]:
            update = aggregators[i].weighting.update
            weights, state = update(gramian, states[i], losses=losses, key=key)
            return weights, (*states[:i], state, *states[i + 1 :])

        branches = [partial(weigh, i) for i in range(len(aggregators))]
        weights, states = lax.switch(rule, branches, states)
        # Of J^T w and the mean of the rows, from inner products alone.
        along = weights @ gramian
        similarity = cosine(along.sum(), (along @ weights) * gramian.sum())
        return losses, pullback(weights), similarity, states

    return direction


def coordinate_direction(aggregators: Sequence[jaxmtl.Aggregator], loss: Any) -> Direction:
    """Returns a step of the one rule that needs the Jacobian itself."""
    (aggregator,) = aggregators
    value_and_jacobian = jaxmtl.value_and_jacobian(loss, in_axes=(None, 0))

    def direction(
        rule: jax.Array, params: Params, states: tuple[State, ...], batch: Example, key: jax.Array
    ) -> tuple[jax.Array, Params, jax.Array, State]:
        del rule
        losses, jacobian = value_and_jacobian(params, batch)
        update, state = aggregator.update(jacobian, states[0], params, losses=losses, key=key)
        mean = jax.tree.map(lambda rows: rows.mean(axis=0), jacobian)
        squares = optax.tree.norm(update, squared=True) * optax.tree.norm(mean, squared=True)
        return losses, update, cosine(optax.tree.vdot(update, mean), squares), (state,)

    return direction


def programs(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the rules that share a compiled program: all with a weighting, each other alone."""
    weighted = tuple(name for name in names if needs(METHODS[name]) != "coordinates")
    return [weighted, *((name,) for name in names if name not in weighted)]


@cache
def make_train(
    options: Options, shape: tuple[int, int, int], names: tuple[str, ...]
) -> Callable[..., Curves]:
    """Returns the compiled training of all seeds at once.

    It maps the rule's place in names, and per seed a rate, a key, images and labels, to curves:
    ``loss`` and ``cosine`` (seeds, epochs), the means over the epoch's steps; ``area`` (seeds,)
    under the curve of the batches' mean losses, divided by the number of steps; and
    ``final_loss`` (seeds,) on all examples after the last step.
    """
    height, width, channels = shape
    architecture = ARCHITECTURES[NETWORKS[options.dataset]]._replace(
        shape=(height, width, channels)
    )
    loss = make_loss(architecture)
    aggregators = [METHODS[name].make(options.batch_size) for name in names]
    weighted = aggregators[0].weighting is not None
    direction = (weighted_direction if weighted else coordinate_direction)(aggregators, loss)
    optimizer = OPTIMIZERS[options.optimizer]()
    steps = options.examples // options.batch_size

    def train(
        rule: jax.Array, rate: jax.Array, key: jax.Array, images: jax.Array, labels: jax.Array
    ) -> Curves:
        init_key, run_key = jax.random.split(key)
        params = init(architecture, init_key)

        def step(carry: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, Curves]:
            params, states, opt_state = carry
            index, key = inputs
            batch = images[index], labels[index]
            losses, update, similarity, states = direction(rule, params, states, batch, key)
            update, opt_state = optimizer.update(update, opt_state, params)
            update = jax.tree.map(lambda u: -rate * u, update)
            carry = jaxmtl.apply_updates(params, update), states, opt_state
            return carry, {"loss": losses.mean(), "cosine": similarity}

        def epoch(carry: Any, key: jax.Array) -> tuple[Any, Curves]:
            order_key, step_key = jax.random.split(key)
            order = jax.random.permutation(order_key, options.examples)
            order = order[: steps * options.batch_size].reshape(steps, options.batch_size)
            carry, metrics = lax.scan(step, carry, (order, jax.random.split(step_key, steps)))
            return carry, jax.tree.map(lambda x: x.mean(), metrics)

        states = tuple(aggregator.init(params) for aggregator in aggregators)
        carry = params, states, optimizer.init(params)
        carry, curves = lax.scan(epoch, carry, jax.random.split(run_key, options.epochs))
        final = lax.map(lambda e: loss(carry[0], e), (images, labels), batch_size=32).mean()
        return curves | {"area": curves["loss"].mean(), "final_loss": final}

    return jax.jit(jax.vmap(train, in_axes=(None, 0, 0, 0, 0)))
