"""A rule on the losses costs one gradient on the Jacobian-free route."""

import jax
import pytest

from experiments.benchmarks import overhead

TASKS = 8


@pytest.fixture(scope="module")
def problem():
    params, x, y = overhead.make_problem(TASKS, 128, 32)
    program = jax.jit(overhead.gradient_step).lower(params, x, y).compile()
    return params, x, y, overhead.flops_of(program)


@pytest.mark.parametrize("rule", overhead.LOSS_RULES)
def test_one_gradient(rule, problem):
    params, x, y, one = problem
    aggregator = overhead.LOSS_RULES[rule](TASKS)
    step = overhead.make_step(aggregator, TASKS)
    args = (params, aggregator.init(params), x, y, overhead.extras(TASKS))
    assert overhead.flops_of(jax.jit(step).lower(*args).compile()) <= 1.05 * one


def test_the_benchmark_runs(capsys):
    overhead.main(["--tasks", "2", "--rules", "famo", "db_mtl", "--width", "8", "--repeats", "1"])
    assert "famo" in capsys.readouterr().out
