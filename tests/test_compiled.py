"""A rule compiles its solver once outside ``jit``; inside it a program grows as its leaves do."""

import inspect

import jax
import jax.numpy as jnp
import pytest

import jaxmtl
from jaxmtl import solvers
from jaxmtl.compiled import compiled
from tests.methods import BY_NAME, METHODS, sweep
from tests.problems import inputs_of, params_of, rows_of, tasks_of
from tests.test_conformance import matrix_of

EVENT = "/jax/core/compile/backend_compile_duration"
programs = []


@pytest.fixture(scope="module", autouse=True)
def count():
    def listen(event, duration, **_):
        programs.extend([event] * (event == EVENT))

    jax.monitoring.register_event_duration_secs_listener(listen)


# every_k chooses between two programs of an inner rule, whatever it is: these it compiles anew.
NAMES = [method.name for method in METHODS if method.name != "every_k"]


@pytest.mark.parametrize("name", sweep(NAMES, ("upgrad", "pcgrad")))
def test_a_later_call_outside_jit_compiles_nothing(name):
    m, params = tasks_of(name), params_of()
    rule, inputs = BY_NAME[name].make(m), inputs_of(name, m)
    state = rule.init(params)
    made = []
    for seed in range(4):
        before = len(programs)
        update, state = rule.update(rows_of(matrix_of(m, seed)), state, params, **inputs)
        jax.block_until_ready(update)
        made.append(len(programs) - before)
    assert made[2:] == [0, 0]
    before = len(programs)
    jax.jit(lambda x: x + m)(1.0)
    assert len(programs) > before, "compilations are not counted"


def test_a_compiled_function_keeps_its_name_and_signature():
    assert solvers.nonneg_qp.__name__ == "nonneg_qp"
    assert list(inspect.signature(solvers.nonneg_qp).parameters)[:2] == ["matrix", "linear"]
    assert ">>>" in solvers.min_norm.__doc__


def test_static_arguments_are_those_that_are_named():
    @compiled("power")
    def raised(x, power):
        return x**power if isinstance(power, int) else None

    assert raised(jnp.float32(2), power=3) == 8
    assert raised(jnp.float32(2), 3) == 8


def instructions(function, *args):
    """The number of instructions of a compiled program."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return sum(" = " in line for line in text.splitlines())


@pytest.mark.parametrize("route", ["jacobian", "no jacobian"])
def test_programs_grow_with_the_leaves_and_not_with_their_square(route):
    """What is compared with all leaves is computed once, not in the program of each leaf."""
    rule = jaxmtl.upgrad()

    def losses_fn(params):
        return jnp.stack([sum(jnp.sum(jnp.sin(k * p)) for p in params) for k in (1.0, 2.0)])

    def step(params, state):
        if route == "jacobian":
            _, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params)
            return rule.update(jacobian, state, params)
        return jaxmtl.value_and_grad(losses_fn, rule)(params, state)

    few, many = (
        instructions(step, [jnp.ones(n) for n in range(5, 5 + leaves)], rule.init(None))
        for leaves in (20, 60)
    )
    assert many < 3 * few
