"""Solvers that compile once, whether or not their caller is compiled."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def compiled(*static: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Returns a decorator that is ``jax.jit`` and keeps the function's signature and docstring.

    A loop of JAX is compiled anew at each call outside ``jit``, a second for a solver's; with
    this it is compiled once for each shape and dtype. Inside ``jit`` the compiler inlines the
    call, and programs that call a solver often trace it once.

    Args:
      *static: Names of arguments that are no arrays.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        jitted = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            found: R = jitted(*args, **kwargs)
            return found

        return call

    return decorate
