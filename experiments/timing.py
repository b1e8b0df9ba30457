"""The one timer: programs take turns in one run, so that a busy machine disturbs them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

import jaxmtl


class Program(NamedTuple):
    """Something to time, with what its compiler counts."""

    run: Callable[[], Any]  # starts the program and returns what it computes
    flops: float | None = None  # compiled operations; the body of a loop counts once
    bytes: int | None = None  # of temporary memory


def flops_of(executable: Any) -> float | None:
    """Returns the compiled operations, None where the compiler does not count them."""
    flops: float | None = (executable.cost_analysis() or {}).get("flops")
    return flops


def make_step(
    losses_fn: Callable[..., Any], aggregator: Any, *, rate: float = 0.01, **route: Any
) -> Callable[..., Any]:
    """Returns one step of a rule, by the Jacobian only where it has no weighting.

    Args:
      losses_fn: The losses, of one example if ``in_axes`` is in ``route``.
      aggregator: The rule; None for a gradient step on the mean loss.
      rate: Of descent.
      **route: Keywords of ``jaxmtl.value_and_grad``.

    Returns:
      ``(params, state, *args, **inputs) -> (losses, state, new params)``.
    """
    axes = route.get("in_axes")
    if aggregator is None:

        def value_and_grad(params: Any, state: Any, *args: Any, **inputs: Any) -> Any:
            def mean_loss(params: Any) -> Any:
                losses = (jax.vmap(losses_fn, axes) if axes else losses_fn)(params, *args)
                return losses.mean(), losses

            (_, losses), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
            return (losses, state), grads

    elif aggregator.weighting is not None:
        value_and_grad = jaxmtl.value_and_grad(losses_fn, aggregator, **route)
    else:
        rows = jaxmtl.value_and_jacobian(losses_fn, in_axes=axes)

        def value_and_grad(params: Any, state: Any, *args: Any, **inputs: Any) -> Any:
            losses, jacobian = rows(params, *args)
            update, state = aggregator.update(jacobian, state, params, losses=losses, **inputs)
            return (losses, state), update

    def step(params: Any, state: Any, *args: Any, **inputs: Any) -> Any:
        (losses, state), grads = value_and_grad(params, state, *args, **inputs)
        return losses, state, descend(params, grads, rate)

    return step


def descend(params: Any, grads: Any, rate: float) -> Any:
    """Returns the parameters after a step of gradient descent."""
    return jaxmtl.apply_updates(params, jax.tree.map(lambda g: -rate * g, grads))


def ratio_of(flops: float | None, base: float | None) -> float | None:
    """Returns the ratio of operations, None where one is unknown."""
    return flops / base if flops and base else None


def compiled(function: Callable[..., Any], *args: Any) -> Program:
    """Returns a function of arrays, compiled for these arguments."""
    executable = jax.jit(function).lower(*args).compile()
    memory = executable.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else None
    return Program(lambda: executable(*args), flops_of(executable), temporary)


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times programs in turn until each ran ``repeats`` times or for so many ``seconds``.

    Short ones are timed three times a turn, after two runs that are not, so that none pays for the
    cold caches and returned pages that a larger one before it leaves behind. ``clock`` is that of
    the wall, or ``time.process_time`` for CPU time.

    Returns:
      The seconds of every timed run, in order; at least two of each program if ``repeats`` allows.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            found = times[name]
            if len(found) >= repeats or (sum(found) > seconds and len(found) >= 2):
                continue
            short = not found or found[-1] < 0.1
            for i in range(5 if short else 1):
                began = clock()
                jax.block_until_ready(run())
                if i >= 2 or not short:
                    found.append(clock() - began)
    return times


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Returns the median of the ratios of times that were measured one after the other."""
    return statistics.median(a / b for a, b in zip(times, base, strict=False))
