"""The network of MultiMNIST, its data, and one epoch of training as a ``scan``."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

import jaxmtl
from experiments import methods
from experiments.images import Images, load_sklearn_digits, load_tfds_images
from experiments.methods import Method
from experiments.multimnist.data import DigitPairs, make_pairs, read_pairs
from experiments.multimnist.networks import DenseTrunk, LeNetTrunk, TwoHeads
from experiments.multimnist.report import ORDER, TASKS

Params = Any  # {"trunk": ..., "left": ..., "right": ...}
Carry = tuple[Params, Any]  # parameters and optimizer state, with a leading axis of seeds
Metrics = dict[str, Any]
Order = tuple[jax.Array, jax.Array]  # (steps, batch) indices of pairs, (steps,) keys
InitState = Callable[[Params], Any]
Epoch = Callable[[Carry, Order, DigitPairs], tuple[Carry, Metrics]]


def inverse_sqrt(step: jax.Array) -> jax.Array:
    """Returns eta_k / eta_1 = 1 / sqrt(1 + (k - 1) / 100), the shape of all learning rates.

    It is O(1 / sqrt k), as corollary 1 of Zhou 2022 asks. The literal 1 / sqrt k falls tenfold in
    the first 100 steps: a rate that is stable at the start is then far too small for the rest.
    """
    return 1 / jnp.sqrt(1 + step / 100)


LIBRARY = methods.METHODS
_CHANGED = {
    # Some papers define a sum over tasks: divided by m, one learning rate suits all methods.
    **{name: LIBRARY[name].using(reduction="mean") for name in ("pcgrad", "gradvac", "graddrop")},
    "config": LIBRARY["config"].then(methods.mean),
    # Their authors' codes bound the norm of the update by 1 too: it does not vanish with J.
    **{name: LIBRARY[name].using(max_norm=1.0) for name in ("nash_mtl", "fairgrad")},
}


def _method(name: str) -> Method:
    plain = name.removeprefix("cr_")
    method = _CHANGED.get(plain, LIBRARY[plain])
    return method if name == plain else method.then(methods.corollary_1(inverse_sqrt))


METHODS = {name: _method(name) for name in ORDER}


@dataclass(frozen=True)
class Options:
    """What decides the outcome of a run, besides method and seed."""

    dataset: str
    canvas: int  # side of the square on which both digits lie
    partners: int  # right digits per left digit
    batch_size: int
    epochs: int
    learning_rate: float  # eta_1; it falls as ``inverse_sqrt``, and is the same for every method
    head_width: int
    validation: bool = False  # test on the last sixth of the training digits, to choose options
    max_steps: int | None = None  # per epoch; all that there are if None


TRUNKS: dict[str, nn.Module] = {"digits": DenseTrunk(64), "mnist": LeNetTrunk()}


# --- data ---------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def load_pairs(options: Options, data_dir: str | None) -> tuple[DigitPairs, DigitPairs]:
    """Returns training and test pairs; no digit is in both."""
    loaders: dict[str, Callable[[str], Images]] = {
        "digits": load_sklearn_digits,
        "mnist": partial(load_tfds_images, "mnist", data_dir=data_dir),
    }
    load = loaders[options.dataset]
    train = load("train")
    if options.validation:
        cut = len(train.labels) * 5 // 6
        train, test = Images(*(a[:cut] for a in train)), Images(*(a[cut:] for a in train))
    else:
        test = load("test")
    pairs = partial(make_pairs, partners=options.partners, statistics_of=train)
    return pairs(train, seed=0), pairs(test, seed=1)


# --- training -----------------------------------------------------------------------------------


def make_model(options: Options) -> TwoHeads:
    """Returns the network of the data set."""
    return TwoHeads(TRUNKS[options.dataset], options.head_width)


def logits_of(model: TwoHeads, params: Params, images: jax.Array) -> jax.Array:
    """Returns the logits (2, b, 10)."""
    return jnp.asarray(model.apply({"params": params}, images))


def example_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropies (2, b)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_init(options: Options) -> Callable[[jax.Array], Params]:
    """Returns a compiled function from (seeds,) keys to the parameters of all seeds."""
    model = make_model(options)
    blank = jnp.zeros((1, options.canvas, options.canvas))
    return jax.jit(jax.vmap(lambda key: model.init(key, blank)["params"]))


def make_order(options: Options, num_pairs: int) -> Callable[[jax.Array, int], Order]:
    """Returns a compiled function from (seeds,) keys and the epoch's number to its minibatches."""
    steps = options.max_steps or num_pairs // options.batch_size

    def order_of(key: jax.Array, epoch: jax.Array) -> Order:
        order_key, step_key = jax.random.split(jax.random.fold_in(key, epoch))
        order = jax.random.permutation(order_key, num_pairs)[: steps * options.batch_size]
        return order.reshape(steps, options.batch_size), jax.random.split(step_key, steps)

    return jax.jit(jax.vmap(order_of, in_axes=(0, None)))


def make_epoch(options: Options, method: str) -> tuple[InitState, Epoch]:
    """Returns the optimizer's init and one compiled epoch, a ``scan`` for all seeds at once."""
    model = make_model(options)
    optimizer = optax.chain(
        METHODS[method].make(len(TASKS)),
        optax.sgd(lambda step: options.learning_rate * inverse_sqrt(step)),
    )

    def task_losses(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = logits_of(model, params, images)
        return example_losses(logits, labels).mean(axis=1)  # (2,)

    def epoch(carry: Carry, order: Order, data: DigitPairs) -> tuple[Carry, Metrics]:
        def step(carry: Carry, inputs: Order) -> tuple[Carry, Metrics]:
            params, opt_state = carry
            index, key = inputs
            images, labels = read_pairs(data, index, options.canvas)
            losses, jacobian = jaxmtl.value_and_jacobian(task_losses)(params, images, labels)
            updates, opt_state = optimizer.update(
                jacobian, opt_state, params, losses=losses, key=key
            )
            conflict = jaxmtl.gramian(jacobian["trunk"])[0, 1] < 0
            metrics = {"train_loss": losses, "conflict_rate": conflict}
            return (jaxmtl.apply_updates(params, updates), opt_state), metrics

        carry, metrics = lax.scan(step, carry, order)
        return carry, jax.tree.map(lambda x: x.mean(axis=0), metrics)

    return jax.vmap(optimizer.init), jax.jit(jax.vmap(epoch, in_axes=(0, 0, None)))


def make_evaluate(options: Options) -> Callable[[Params, DigitPairs], Metrics]:
    """Returns compiled test loss and accuracy of all seeds."""
    model = make_model(options)

    def evaluate(params: Params, data: DigitPairs) -> Metrics:
        def one_pair(index: jax.Array) -> Metrics:
            images, labels = read_pairs(data, index[None], options.canvas)
            logits = logits_of(model, params, images)
            correct = logits.argmax(axis=-1) == labels
            return {
                "test_loss": example_losses(logits, labels)[:, 0],
                "test_accuracy": correct[:, 0],
            }

        metrics = lax.map(one_pair, jnp.arange(len(data.left)), batch_size=500)
        return jax.tree.map(lambda x: x.mean(axis=0), metrics)

    return jax.jit(jax.vmap(evaluate, in_axes=(0, None)))
