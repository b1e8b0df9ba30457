"""A front on real data: how well an income is predicted, against how unlike two groups are treated.

    python -m experiments.examples.fair_fronts                        # rows from OpenML
    python -m experiments.examples.fair_fronts --data-dir DIR         # from a folder
    python -m experiments.examples.fair_fronts --data-dir DIR --seeds 5 --out experiments/results

Census-Income (KDD): logistic regression on 4,000 rows predicts incomes above 50,000, without the
column of the sex. The first loss is the cross entropy, the second the demographic disparity: the
difference between the mean predicted chances of the two sexes, in absolute value. Both are scaled:
the cross entropy from its minimum to that of one chance for all, the disparity by its value at that
minimum. Every method of `experiments.examples.pareto_fronts` trains ten regressions, from spread
preferences or, without them, from starts drawn at random.

The objectives are those of 20,000 other rows. Nobody knows the true front: in its place stand the
points of all methods and seeds that no other dominates.

Recorded in ``experiments/results/fronts``, five seeds; hypervolumes as shares of that front's:
0.87 (Tchebycheff and smooth Tchebycheff), 0.86 (PBI), 0.84 (weighted sum, EPO, CAGrad and
hypervolume), 0.83 (PMGDA), 0.82 (COSMOS), 0.81 (Aligned-MTL), 0.77 (UPGrad), 0.70 (MGDA) and 0.64
(Nash-MTL). The Tchebycheff forms cover most; rules that gather their points in one place, whatever
the preference, cover least.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.examples import pareto_fronts
from experiments.tabular import data as tables
from jaxmtl import fronts

NUM_PREFERENCES, STEPS, START, SPAN = 10, 500, 0.1, 0.01
TRAIN, TEST, RARE = 4_000, 20_000, 0.01
SEX = 9  # the place of column 12 among the columns of categories


class Rows(NamedTuple):
    """Inputs (n, d), whether the income is high (n,), and the group (n,) 0 or 1."""

    inputs: jax.Array
    high: jax.Array
    group: jax.Array


def rows_of(split: tables.Split, part: tables.Table, rows: slice, kept: np.ndarray) -> Rows:
    """Returns some rows of a part of the table, with the features that are kept."""
    chosen = tables.Table(*(x[rows] for x in part))
    group = chosen.codes[:, SEX] == jnp.max(part.codes[:, SEX])
    others = chosen._replace(codes=jnp.delete(chosen.codes, SEX, axis=1))
    inputs = tables.features(others, jnp.arange(len(group)), split.num_codes)[:, kept]
    return Rows(inputs, chosen.labels[:, 0], group)


def load(split: tables.Split, seeds: int) -> tuple[Rows, Rows]:
    """Returns rows to train on, stacked over seeds, and those to test on.

    Categories of less than a hundredth of the training rows are left out.
    """
    train = split.train
    counts = np.bincount(np.asarray(train.codes).ravel(), minlength=split.num_codes)
    common = counts >= RARE * len(train.codes)
    kept = np.flatnonzero(np.append(common, np.ones(train.numbers.shape[1], bool)))
    parts = [rows_of(split, train, slice(i * TRAIN, (i + 1) * TRAIN), kept) for i in range(seeds)]
    test = rows_of(split, split.test, slice(TEST), kept)
    return jax.tree.map(lambda *x: jnp.stack(x), *parts), test


def objectives(params: jax.Array, rows: Rows) -> jax.Array:
    """Returns the cross entropy and the demographic disparity (2,) of a regression (d + 1,)."""
    logits = rows.inputs @ params[:-1] + params[-1]
    chances = jax.nn.sigmoid(logits)
    means = [jnp.mean(chances, where=rows.group == value) for value in (True, False)]
    entropy = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, rows.high))
    return jnp.stack([entropy, jnp.abs(means[0] - means[1])])


def scale_of(rows: Rows, steps: int) -> tuple[jax.Array, jax.Array]:
    """Returns the lowest and highest objectives of the front: without a penalty, without inputs.

    The lowest entropy is taken a hundredth of the span lower, so that losses stay positive.
    """
    adam = optax.adam(pareto_fronts.RATE)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(lambda p: objectives(p, rows)[0])(params)
        updates, state = adam.update(grads, state)
        return (params + updates, state), None

    params = jnp.zeros(rows.inputs.shape[1] + 1)
    (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), length=steps)
    best, disparity = objectives(params, rows)
    rate = jnp.mean(rows.high)
    worst = -rate * jnp.log(rate) - (1 - rate) * jnp.log1p(-rate)
    low = jnp.stack([best - SPAN * (worst - best), jnp.zeros(())])
    return low, jnp.stack([worst, disparity])


def study(
    train: Rows, test: Rows, steps: int = STEPS, methods: Sequence[str] = pareto_fronts.SETS
) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns the front of all methods (f, 2), and points and measures of each."""
    seeds, _, d = train.inputs.shape
    chosen = fronts.preferences(2, NUM_PREFERENCES - 1, margin=pareto_fronts.MARGIN)
    starts = START * jax.random.normal(jax.random.key(0), (seeds, len(chosen), d + 1))
    scales = jax.jit(lambda train: jax.lax.map(lambda rows: scale_of(rows, steps), train))(train)

    def run(method: str) -> np.ndarray:
        def one(given: tuple[Rows, Any, jax.Array]) -> jax.Array:
            rows, scale, starts = given
            low: jax.Array = scale[0]
            high: jax.Array = scale[1]

            def losses_fn(params: jax.Array, rows: Rows = rows) -> jax.Array:
                return (objectives(params, rows) - low) / (high - low)

            params = pareto_fronts.train(
                losses_fn, method, chosen, starts, steps, project=lambda params: params
            )
            found: jax.Array = jax.vmap(lambda p: losses_fn(p, test))(params)
            return found

        return np.asarray(jax.jit(lambda x: jax.lax.map(one, x))((train, scales, starts)))

    found = {method: run(method) for method in methods}
    together = jnp.concatenate([points.reshape(-1, 2) for points in found.values()])
    front = np.asarray(together)[np.asarray(fronts.non_dominated(together))]
    return front, pareto_fronts.measured(front, found)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study, prints its tables and, with ``--out``, writes records, figure and notes."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with census_income_kdd_*.csv.gz")
    parser.add_argument(
        "--methods", nargs="+", choices=pareto_fronts.SETS, default=pareto_fronts.SETS
    )
    parser.add_argument("--seeds", type=int, default=1, help="sets of rows and of starts")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, help="results go to its folder fronts")
    options = parser.parse_args(argv)
    folder = options.out / "fronts" if options.out is not None else None
    path = folder / "problems.jsonl" if folder is not None else None
    split = tables.load_census(options.data_dir)
    front, results = study(*load(split, options.seeds), options.steps, options.methods)
    records = pareto_fronts.records_of("Census", results)
    if folder is not None:
        records = pareto_fronts.write(path, pareto_fronts.read(path), records)
        labels = ("cross entropy, scaled", "disparity, scaled")
        pareto_fronts.draw("Census", front, results, folder / "census.png", labels)
    pareto_fronts.report(folder, records)


if __name__ == "__main__":
    main()
