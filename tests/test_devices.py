"""Eight simulated devices, automatic and explicit axes, shard_map, and two processes."""

import collections
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import devices
from tests.methods import BY_NAME

ROOT = Path(__file__).parents[1]
SMALL = devices.TASKS**2  # what a rule may send: entries of the Gramian, maxima, flags

# Few rules, parameters split over the devices. Every rule, the other layouts and
# `jax.shard_map` are slow.
JOBS = ("rules:fsdp:explicit:rows",)
CROSS = tuple(
    f"rules:{layout}:{mode}:{route}"
    for layout in devices.LAYOUTS
    for mode in devices.MODES
    for route in ("rows", "pieces")
)
SUGAR = tuple(f"rules:{layout}:explicit:grad" for layout in ("fsdp", "both"))
MAPPED = tuple(
    f"map:{kind}:{mode}:{route}"
    for mode in devices.MODES
    for kind, routes in {
        "mean": ("rows", "pieces"),
        "rows": ("rows",),
        "partial": ("rows", "pieces"),
        "parts": ("rows", "pieces"),
        "outside": ("rows",),
    }.items()
    for route in routes
    if mode == "auto" or kind in ("partial", "outside")  # all axes manual: one mode is the other
)
GRADIENTS = ("gradient:fsdp:explicit:", "gradient:both:auto:")
EXAMPLES = ("examples:fsdp:explicit:", "examples:both:explicit:")
SEPARATE = ("separate:fsdp:explicit:", "separate:both:auto:")
PLANS = tuple(f"plan:{place}:{route}:64" for place in devices.PLACES for route in devices.ROUTES)
TASKS = tuple(f"tasks:{place}::{size}" for place in devices.PLACES for size in (16, 128))
TRACES = ("traces:fsdp:explicit:", "traces:both:explicit:")
LATER = (EXAMPLES[0], SEPARATE[0], TRACES[0], "readme:::")
QUICK = (*JOBS, *GRADIENTS, EXAMPLES[1], SEPARATE[1], *PLANS, *TASKS, TRACES[1], "lookup:::")

pytestmark = pytest.mark.xdist_group("devices")


def run_jobs(jobs, *options):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    command = [sys.executable, "-W", "error", "-m", "tests.devices", *options, *jobs]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(jobs, map(json.loads, done.stdout.splitlines()), strict=True))


@functools.cache
def answers(jobs):
    """One process for many jobs, which imports JAX and meets each program once."""
    return run_jobs(jobs, "few")


def answer(job):
    return answers(LATER if job in LATER else QUICK)[job]


def each(jobs):
    return [pytest.param(job, marks=[pytest.mark.slow] * (job in LATER)) for job in jobs]


def rules_of(job, methods):
    kind, of, _, route = job.split(":")
    by_rows = route == "rows" and (kind, of) != ("map", "parts")
    return {name for name in methods if by_rows or BY_NAME[name].weighted}


def check_rules(job, result, methods):
    deviation = result["deviation"]
    assert set(deviation) == rules_of(job, methods)
    assert all(np.isfinite(list(deviation.values())))
    worst = max(deviation, key=deviation.get)
    assert deviation[worst] <= 1e-6, f"{worst} differs by {deviation[worst]} in {job}"


@pytest.mark.parametrize("job", JOBS)
def test_every_update_is_that_of_one_device(job):
    check_rules(job, answer(job), devices.FEW)


@pytest.mark.parametrize("job", each(SEPARATE))
def test_separate_data_is_that_of_one_device(job):
    result = answer(job)
    assert set(result) == {"jacobian", "gramian", "chunked", "upgrad"}
    assert max(result.values()) <= 1e-9, result


def large(collectives):
    return {kind: n for kind, n in collectives.items() if int(kind.split(":")[1]) > SMALL}


def check_collectives(result):
    """The rules send nothing of the size of a row or a parameter."""
    extra = {
        kind: n - result["baseline"].get(kind, 0)
        for kind, n in large(result["collectives"]).items()
    }
    assert not any(n > 0 for n in extra.values()), extra
    assert large(result["collectives"]), "the model itself sends rows: none was found"


@pytest.mark.parametrize("job", JOBS)
def test_rules_send_gramians_alone(job):
    result = answer(job)
    check_collectives(result)
    if job.endswith("rows"):
        sent = result["collectives"].get(f"all-reduce:{SMALL}", 0)
        assert sent > result["baseline"].get(f"all-reduce:{SMALL}", 0), (
            "partial Gramians are summed"
        )
        assert result["states_lie_as_params"]


def total(collectives, kind):
    parts = (key.split(":") for key in collectives.elements())
    return sum(int(size) for name, size in parts if name == kind)


def test_rows_are_m_gradients_and_no_more():
    """Of what crosses devices before a rule begins, against the gradient of the mean loss."""
    m = devices.TASKS
    gradient = collections.Counter(answer(GRADIENTS[0])["collectives"])
    rows = collections.Counter(answer(JOBS[0])["baseline"])  # of two batches
    assert total(rows, "all-reduce") == 2 * m * total(gradient, "all-reduce") + m  # m losses
    assert total(rows, "all-gather") <= 2 * total(gradient, "all-gather")
    assert total(gradient, "all-gather") > 0


@pytest.mark.parametrize("job", each(EXAMPLES))
def test_one_objective_per_example(job):
    assert max(answer(job)["deviation"].values()) <= 1e-6


@pytest.mark.parametrize("job", each(TRACES))
def test_explicit_axes_pass_through_what_surrounds_the_rules(job):
    result = answer(job)
    assert len(result) >= 10
    assert all(result.values()), result


@pytest.mark.parametrize("place", devices.PLACES)
@pytest.mark.parametrize("route", devices.ROUTES)
def test_the_plan_is_what_the_compiler_sends_and_holds(place, route):
    result = answer(f"plan:{place}:{route}:64")
    n, share = result["n"], 8 if place == "sharded" else 1
    temporary = []
    for m in (2, 6):
        found, planned = result[str(m)], devices.plan(route, place, n, m, 8)
        sent = collections.Counter(large_rows(found["collectives"]))
        # The compiler for CPUs reduces whole rows where others scatter the sum.
        assert total(sent, "all-reduce") == planned["reduced"]
        assert total(sent, "all-gather") == planned["gathered"]
        assert sum(sent.values()) == sum(
            n for kind, n in sent.items() if kind.split(":")[0] in ("all-reduce", "all-gather")
        )
        x = 8 * 32 / 8
        assert found["arguments"] == n / share + x
        held = planned["held"] if route == "Jacobian" else n // share
        assert held <= found["outputs"] <= held + m + 4  # losses, and the pointers of a tuple
        temporary.append(found["temporary"])
    grown = temporary[1] - temporary[0]
    if route == "Jacobian":
        assert grown >= 4 * n / share
    else:
        assert grown < n / share / 4, "memory does not grow with the number of tasks"


def large_rows(collectives):
    return {kind: n for kind, n in collectives.items() if int(kind.split(":")[1]) > 64}


@pytest.mark.parametrize("place", devices.PLACES)
def test_tasks_on_automatic_axes_send_as_the_guide_says(place):
    """Cotangents at layers, which grow with the batch, in place of gradients, which do not."""
    small, large = (answer(f"tasks:{place}::{size}") for size in (16, 128))
    assert small["layers"] < 0.6 * small["gradients"]
    assert large["layers"] <= {"replicated": 1, "sharded": 1.5}[place] * large["gradients"]


@pytest.mark.slow
def test_listing_of_the_guide_runs_and_its_table_is_the_plan():
    assert devices.table() in (ROOT / "notebooks" / "guide" / "devices.md").read_text()
    result = answer("readme:::")
    assert result["listings"] == 1
    assert result["held"] == [2, 3]
    assert result["difference"] < 1e-5


def test_lookups_of_split_batches_as_the_guide_says():
    """A limit of JAX's: when this fails, the guide's sentence can go."""
    result = answer("lookup:::")
    assert (result["plain"], result["told"], result["one_hot"]) == (False, False, True)
    same = np.arange(16)[:, None] % 7 == np.arange(16) % 7
    np.testing.assert_array_equal(result["gramian"], 12 * same)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(devices_each, *arguments):
    env = dict(os.environ, JAX_NUM_CPU_DEVICES=str(devices_each), JAX_PLATFORMS="cpu")
    env |= {"JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-m", "experiments.examples.distributed", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return json.loads(lines[0]) if lines else None


@pytest.mark.slow
def test_two_processes_run_the_job_of_one():
    alone = start(4)
    address = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process")
    pair = [start(2, *address, i) for i in range(2)]
    try:
        one, first, second = finish(alone), *map(finish, pair)
    finally:
        for process in (alone, *pair):
            process.kill()
    assert second is None
    assert (one["processes"], first["processes"], first["devices"]) == (1, 2, 4)
    assert first["held"] == one["held"] == {"w": [8, 8], "b": [2], "head": [2, 3]}
    for name in ("losses", "weights", "norm"):
        np.testing.assert_allclose(first[name], one[name], rtol=1e-6)
    assert np.ptp(one["weights"]) > 0.01, "tasks conflict, so that the weights are worth comparing"


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [CROSS, SUGAR, MAPPED], ids=["layouts", "value_and_grad", "map"])
def test_every_rule_in_every_layout(jobs):
    for job, result in run_jobs(jobs).items():
        check_rules(job, result, BY_NAME)
        if job.startswith("rules") and jobs is not SUGAR:  # which evaluates the model per rule
            check_collectives(result)
            assert result["states_lie_as_params"]
