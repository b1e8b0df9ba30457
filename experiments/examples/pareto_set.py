"""One network for a whole front: Pareto set learning, with a preference as an input.

    python -m experiments.examples.pareto_set                                  # VLMOP2 and digits
    python -m experiments.examples.pareto_set --data-dir DIR --out OUT --seeds 3   # as recorded

**Points**: a network from a preference to a point of the box, for VLMOP2, RE21 and RE37, trained on
128 preferences drawn anew for each of 1,000 steps with Adam at 1e-3, as LibMOON does; its network
has three times 256 hidden units and rectifiers, this one two times 64 and tanh. Hypervolume up to
(1, ...) in LibMOON's scale of objectives, at 20 preferences for two objectives and 190 (LibMOON:
200) for three, beside its published table.

**Digits**: real networks, of two tasks that share 8 hidden units and so compete for them: the class
of a digit and its 64 pixels. *Adapters*: one network whose matrices are ``W + sum_i r_i A_i B_i``
for a preference r, of rank 2 (LoRA, as Chen and Kwok 2024, "Efficient Pareto manifold learning with
low-rank structure"). *Separate*: 11 networks, each trained for one preference with the
same number of steps, by `fronts.train`. Both minimise ``sum r_i l_i``, r drawn anew for each step
of the adapters.

Recorded in ``experiments/results/pareto_set``, three seeds:
hypervolumes of 0.307 (VLMOP2, smooth Tchebycheff; LibMOON 0.302, the front 0.342), 0.821 (RE21;
0.822, 0.839) and 0.545 (RE37; 0.466, 0.571); linear sums 0.174, 0.811 and 0.459. On the digits the
adapters give 3.45 up to (2.5, 2), separate networks 3.59: one network reaches the middle of the
front, better than the separate ones in a part of it, and not its ends.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import jaxmtl
from experiments.examples import _pinn
from experiments.examples._front_problems import PROBLEMS, Problem, load_front
from jaxmtl import fronts

STEPS, BATCH, MARGIN = 1000, 128, 0.01
HIDDEN, RANK = 8, 2

# LibMOON's scale of the objectives: (f - ideal) / (nadir - ideal), and half the first of RE21.
SCALES = {
    "VLMOP2": (np.zeros(2), np.ones(2)),
    "RE21": (
        np.array([1237.8414230005742, 0.002761423749158419]),
        np.array([2 * 2886.3695604236013 - 1237.8414230005742, 0.04]),
    ),
    "RE37": (
        np.array([0.00889341391106, 0.00488, -0.431499999825]),
        np.array([0.98949120096, 0.956587924661, 0.987530948586]),
    ),
}
# Its script/rebuttal/psl/*/indicator_mean_std.csv: hypervolume, mean of seeds.
LIBMOON = {
    ("VLMOP2", "linear"): 0.045,
    ("VLMOP2", "stch"): 0.302,
    ("RE21", "stch"): 0.822,
    ("RE37", "stch"): 0.466,
}
RULES: dict[str, Callable[[jax.Array], jaxmtl.Aggregator]] = {
    "linear": jaxmtl.linear_scalarization,
    "stch": lambda r: jaxmtl.stch(0.1, preference=r),
}


def learn_set(problem: Problem, rule: str, key: jax.Array, steps: int) -> jax.Array:
    """Returns the objectives (k, m) of the points that one network gives for k preferences."""
    m, n = problem.num_tasks, len(problem.low)
    first, drawn = jax.random.split(key)
    params = _pinn.initial_params(first, (m, 64, 64, n))
    ideal, nadir = (jnp.asarray(x) for x in SCALES[problem.name])
    low, high = jnp.asarray(problem.low), jnp.asarray(problem.high)
    adam = optax.adam(1e-3)

    def losses_fn(params: _pinn.Params, r: jax.Array) -> jax.Array:
        unit = jax.nn.sigmoid(_pinn.network(params, r))
        return (problem.evaluate(low + (high - low) * unit) - ideal) / (nadir - ideal)

    def weights(r: jax.Array, losses: jax.Array) -> jax.Array:
        weighting = RULES[rule](r).weighting
        return weighting.update(jnp.eye(m), weighting.init(), losses=losses)[0]

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        params, state = carry
        chosen = jax.random.dirichlet(jax.random.fold_in(drawn, i), jnp.ones(m), (BATCH,))
        # Each preference is an example with m losses; the weights of each are its own.
        losses, pullback = jax.vjp(lambda p: jax.vmap(losses_fn, (None, 0))(p, chosen), params)
        (grads,) = pullback(jax.vmap(weights)(chosen, losses) / BATCH)
        updates, state = adam.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), jnp.arange(steps))
    asked = fronts.preferences(m, 19 if m == 2 else 18, margin=MARGIN)
    return jax.vmap(losses_fn, (None, 0))(params, asked)


# --- digits -------------------------------------------------------------------------------------


def digits(seed: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the 1,797 digits of scikit-learn, 1,200 to train and the others to test."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    parts = []
    for rows in (order[:1200], order[1200:]):
        images = jnp.asarray(data.data[rows] / 16, jnp.float32)
        parts.append({"images": images, "labels": jnp.asarray(data.target[rows])})
    return parts[0], parts[1]


def digit_losses(params: _pinn.Params, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the cross entropy of the class and the mean square error of the pixels, times 20."""
    out = jax.vmap(_pinn.network, (None, 0))(params, batch["images"])
    scores = optax.softmax_cross_entropy_with_integer_labels(out[:, :10], batch["labels"])
    return jnp.stack([jnp.mean(scores), 20 * jnp.mean((out[:, 10:] - batch["images"]) ** 2)])


def adapted(params: dict[str, Any], r: jax.Array) -> _pinn.Params:
    """Returns the network of a preference: each matrix with its low-rank parts."""
    return [
        {"w": layer["w"] + jnp.einsum("m,mir,mrj->ij", r, a, b), "b": layer["b"] + r @ bias}
        for layer, (a, b, bias) in zip(params["common"], params["adapters"], strict=True)
    ]


def train_digits(seed: int, steps: int) -> dict[str, jax.Array]:
    """Returns the test losses (11, 2) of the adapters and of separate networks."""
    train, test = digits(seed)
    keys = jax.random.split(jax.random.key(seed), 4)
    sizes = (64, HIDDEN, 74)
    common = _pinn.initial_params(keys[0], sizes)
    rows = jax.random.randint(keys[1], (steps, 64), 0, len(train["labels"]))
    batches = jax.tree.map(lambda x: x[rows], train)
    asked = fronts.preferences(2, 10, margin=0.02)
    adam = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def make_optimizer(r: jax.Array) -> Any:
        return jaxmtl.linear_scalarization(r), adam

    separate = jax.jit(
        lambda params, batches: fronts.train(digit_losses, make_optimizer, params, asked, batches)
    )(common, batches)

    def adapter(key: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        i, j = layer["w"].shape
        a = jax.random.normal(key, (2, i, RANK)) / np.sqrt(i)
        return a, jnp.zeros((2, RANK, j)), jnp.zeros((2, j))

    pairs = zip(jax.random.split(keys[2], len(common)), common, strict=True)
    params = {"common": common, "adapters": [adapter(key, layer) for key, layer in pairs]}
    drawn = jax.random.dirichlet(keys[3], jnp.ones(2), (steps,))

    @jax.jit
    def learn(params: Any) -> Any:
        def step(carry: Any, xs: Any) -> tuple[Any, None]:
            params, state = carry
            r, batch = xs
            grads = jax.grad(lambda p: r @ digit_losses(adapted(p, r), batch))(params)
            updates, state = adam.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, adam.init(params)), (drawn, batches))[0][0]

    params = learn(params)
    return {
        "separate": jax.vmap(digit_losses, (0, None))(separate.params, test),
        "adapters": jax.vmap(lambda r: digit_losses(adapted(params, r), test))(asked),
    }


# --- table and figure ---------------------------------------------------------------------------


def conclude(records: Sequence[dict[str, Any]]) -> str:
    """Returns in a sentence for each problem what covers most, in words for these numbers alone."""
    lines = []
    for problem in dict.fromkeys(record["problem"] for record in records):
        runs = [record for record in records if record["problem"] == problem]
        volumes = {record["rule"]: float(np.mean(record["volume"])) for record in runs}
        best = max(volumes, key=lambda rule: volumes[rule])
        found = ", ".join(f"{rule} {volume:.3f}" for rule, volume in volumes.items())
        front = runs[0].get("front")
        of = f" of the front's {front:.3f}" if front else ""
        lines.append(f"{problem}: {best} covers the larger volume ({found}{of}).")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Learns the sets, prints hypervolumes and, with ``--out``, writes records and a figure."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with re_suite.zip: RE21, RE37 too")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="on points; three times on digits")
    parser.add_argument("--out", type=Path, help="results go to its folder pareto_set")
    options = parser.parse_args(argv)
    names = list(SCALES) if options.data_dir is not None else ["VLMOP2"]
    figure = Figure(figsize=(3.3 * (len(names) + 1), 3.3), layout="constrained")
    records = []
    for column, name in enumerate(names):
        problem = PROBLEMS[name]()
        ideal, nadir = SCALES[name]
        true = load_front(problem, options.data_dir) * (problem.nadir - problem.ideal)
        true = (true + problem.ideal - ideal) / (nadir - ideal)
        spatial: Any = {"projection": "3d"} if problem.num_tasks == 3 else {}
        axis: Any = figure.add_subplot(1, len(names) + 1, column + 1, **spatial)
        axis.scatter(*true.T, s=1, color="0.7")
        axis.set_title(name)
        for rule in RULES:
            keys = jax.random.split(jax.random.key(0), options.seeds)
            points = jax.jit(
                lambda keys, p=problem, rule=rule: jax.lax.map(
                    lambda key: learn_set(p, rule, key, options.steps), keys
                )
            )(keys)
            corner = jnp.ones(problem.num_tasks)
            found = [float(fronts.hypervolume(one, corner)) for one in points]
            best = float(fronts.hypervolume(jnp.asarray(true), corner))
            theirs = LIBMOON.get((name, rule))
            records.append(
                {"problem": name, "rule": rule, "volume": found, "front": best, "libmoon": theirs}
            )
            print(
                f"{name:7} {rule:8} {np.mean(found):.3f}, the front's {best:.3f}, "
                f"LibMOON's {theirs or '-'}",
                flush=True,
            )
            axis.scatter(*np.asarray(points[0]).T, s=14, label=rule)
        axis.legend()
    runs = [train_digits(seed, 3 * options.steps) for seed in range(options.seeds)]
    axis = figure.add_subplot(1, len(names) + 1, len(names) + 1)
    for kind in runs[0]:
        corner = jnp.array([2.5, 2.0])
        found = [float(fronts.hypervolume(run[kind], corner)) for run in runs]
        records.append({"problem": "digits", "rule": kind, "volume": found})
        print(f"digits  {kind:8} {np.mean(found):.3f} up to (2.5, 2)", flush=True)
        axis.plot(*np.asarray(runs[0][kind]).T, "o-", ms=4, label=kind)
    axis.set(xlabel="cross entropy, test", ylabel="20 x square error, test", title="digits")
    axis.legend()
    if options.out is not None:
        folder = options.out / "pareto_set"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "fronts.png", dpi=80)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "volumes.jsonl").write_text(lines)
    print(conclude(records))


if __name__ == "__main__":
    main()
