"""Who gets a keyword: the rule that reads it, or the losses function."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxmtl.types import INPUTS, SUPPLIED, Aggregator, Weighting

# What `value_and_grad` hands to the rule itself.
_OWN = ("gramian", "jacobian", "losses", *(name for name in SUPPLIED if name != "task_mask"))


class Names(NamedTuple):
    """The keywords that a function takes.

    Attributes:
      named: Those in its signature.
      others: Whether it takes any other.
      bound: Those of ``named`` that `functools.partial` has bound.
    """

    named: frozenset[str]
    others: bool
    bound: frozenset[str] = frozenset()

    def takes(self, name: str) -> bool:
        """Tells whether the function can be called with this keyword."""
        return self.others or name in self.named


def of_function(function: Callable[..., Any], num_positional: int) -> Names:
    """Returns the keywords that a function takes beside its positional arguments."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions have no signature
        return Names(frozenset(), True)
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_keyword = [p for p in by_position[num_positional:] if p.kind is not p.POSITIONAL_ONLY]
    by_keyword += [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    bound = frozenset(getattr(function, "keywords", None) or {})
    others = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return Names(frozenset(p.name for p in by_keyword), others, bound)


def of_losses(losses_fn: Any, num_positional: int) -> Names:
    """Returns the keywords that a losses function takes, or any of several."""
    if callable(losses_fn):
        return of_function(losses_fn, num_positional)
    functions = losses_fn.values() if isinstance(losses_fn, Mapping) else losses_fn
    found = [of_function(function, num_positional) for function in functions]
    return Names(
        frozenset().union(*(names.named for names in found)),
        any(names.others for names in found),
        frozenset.intersection(*(names.bound for names in found)),
    )


def check(taken: Names, given: Iterable[str]) -> None:
    """Raises a ValueError for a keyword that the losses function does not take."""
    for name in given:
        if not taken.takes(name):
            raise ValueError(
                f"expected keywords of the losses function, got {name}=, which it does not take; "
                f"{_remedy(name, taken.named)}"
            )


def without_inputs(taken: Names, given: Mapping[str, Any]) -> dict[str, Any]:
    """Drops inputs of rules that the losses function does not take."""
    known = ("task_mask", *INPUTS)
    return {name: x for name, x in given.items() if taken.takes(name) or name not in known}


def split(
    weighting: Weighting | Aggregator, taken: Names, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits keywords into those of the rule and those of the losses function.

    Args:
      weighting: That of the rule, or the aggregator of a coordinate rule.
      taken: What the losses function takes.
      given: The keywords.

    Raises:
      ValueError: Both would read a keyword, or neither does and the library does not know it.
    """
    if weighting.rule is None:
        reads, name_of_rule = of_function(weighting.update, 2), "the weighting"
    else:
        rule, name_of_rule = weighting.rule, weighting.rule.name
        reads = Names(rule.needs | rule.accepts, rule.open_ended)
    of_rule: dict[str, Any] = {}
    of_losses: dict[str, Any] = {}
    for name, value in given.items():
        names_it = name in taken.named
        if name in _OWN:
            if not names_it:
                raise ValueError(
                    f"value_and_grad hands {name} to the rule itself: expected other keywords, got "
                    f"{name}=; drop it"
                )
            of_losses[name] = value
        elif name in reads.named:
            if names_it and name not in taken.bound:
                raise _both(name, name_of_rule)
            of_rule[name] = value
        elif names_it:
            of_losses[name] = value
        elif name == "task_mask":  # A rule without masks says so.
            of_rule[name] = value
        elif taken.others and reads.others:
            raise _both(name, name_of_rule)
        elif taken.others:
            of_losses[name] = value
        elif reads.others or name in INPUTS:
            of_rule[name] = value
        else:
            raise ValueError(
                f"expected keywords that {name_of_rule} or the losses function takes, got {name}=; "
                f"{_remedy(name, taken.named | reads.named)}"
            )
    return of_rule, of_losses


def _both(name: str, rule: str) -> ValueError:
    return ValueError(
        f"expected a keyword that either {rule} or the losses function takes, got {name}=, which "
        "both do; rename the parameter of the losses function, or bind it with functools.partial"
    )


def _remedy(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [*names, *INPUTS, "task_mask"], 1, 0.75)
    return f"is {near[0]} meant?" if near else "correct the name, or add the parameter"
