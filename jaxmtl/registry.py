"""What the library knows of its own methods: their list, and how to make one by name."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import optax

from jaxmtl import checks
from jaxmtl.types import Aggregator

F = TypeVar("F", bound=Callable[..., Any])

_REQUIRED = inspect.Parameter.empty


class Method(NamedTuple):
    """A method of the library.

    Attributes:
      name: Its name, as in ``jaxmtl.upgrad``.
      update: What it does, in a few words.
      needs: Names of what it cannot do without: ``"gramian"``, ``"jacobian"`` (the coordinates of
        the gradients) and inputs of ``update``; ``"rule"`` for a combinator.
      accepts: Names of the inputs of ``update`` that it takes where they are given.
      has_weighting: Whether it has a ``.weighting``, so that it works without the Jacobian.
      logs_weights: Whether its state has ``mtl_weights`` when ``num_tasks`` is given.
      properties: Of ``"non-conflicting"``, ``"linear under scaling"``, ``"weighted"``,
        ``"scale-free"`` and ``"random"`` those that hold.
      reference: Author and year; the docstring has more.
      hyperparameters: Their defaults by name; `inspect.Parameter.empty` where there is none.
      requires_num_tasks: Whether its state has the size of the tasks.
      factory: The function that makes it.
    """

    name: str
    update: str
    needs: tuple[str, ...]
    accepts: tuple[str, ...]
    has_weighting: bool
    logs_weights: bool
    properties: tuple[str, ...]
    reference: str
    hyperparameters: Mapping[str, Any]
    requires_num_tasks: bool
    factory: Callable[..., Aggregator]


class _Entry(NamedTuple):
    factory: Callable[..., Any]
    update: str
    reference: str
    properties: tuple[str, ...]
    example: Callable[[], dict[str, Any]]
    logs_weights: bool | None


_ENTRIES: dict[str, _Entry] = {}

# Types whose own name is that of a private module, by the name that users write.
_PUBLIC = {
    repr(kind | None).removesuffix(" | None"): public
    for kind, public in (
        (jax.Array, "jax.Array"),
        (optax.GradientTransformation, "optax.GradientTransformation"),
    )
}


class _Shown:
    """An annotation that prints as users write it, in ``help`` and in the documentation."""

    def __init__(self, annotation: Any):
        plain = isinstance(annotation, type) and not hasattr(annotation, "__args__")
        builtin = plain and annotation.__module__ == "builtins"
        text = repr(annotation) if not plain else f"{annotation.__module__}.{annotation.__name__}"
        text = annotation.__name__ if builtin else text
        for private, public in _PUBLIC.items():
            text = text.replace(private, public)
        self.text = text.replace("collections.abc.", "")

    def __repr__(self) -> str:
        return self.text


def _readable(signature: inspect.Signature) -> inspect.Signature:
    parameters = [p.replace(annotation=_Shown(p.annotation)) for p in signature.parameters.values()]
    returned = _Shown(signature.return_annotation)
    return signature.replace(parameters=parameters, return_annotation=returned)


def method(
    update: str,
    reference: str,
    *properties: str,
    example: Callable[[], dict[str, Any]] = dict,
    logs_weights: bool | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Enters a factory in the list of methods, and checks what all factories share.

    Args:
      update: What the method does, in a few words.
      reference: Author and year.
      *properties: Those of `Method` that its author claims. "weighted" and "random" are found.
      example: Makes hyperparameters for a method that has none by default.
      logs_weights: Whether the state has ``mtl_weights``, where that is not a matter of course.
      renamed: Old names of hyperparameters, refused with a sentence that tells the new ones.
    """

    def enter(factory: F) -> F:
        name = factory.__name__
        required = inspect.signature(factory).parameters["num_tasks"].default is _REQUIRED

        @functools.wraps(factory)
        def checked(*args: Any, **hyperparameters: Any) -> Any:
            for old, new in (renamed or {}).items():
                if old in hyperparameters:
                    raise ValueError(f"expected {name}({new}=...), got {old}=; write {new}=")
            num_tasks = hyperparameters.get("num_tasks")
            if required:
                checks.require_num_tasks(num_tasks, name)
            checks.check_num_tasks(num_tasks)
            return factory(*args, **hyperparameters)

        checked.__signature__ = _readable(inspect.signature(factory))  # type: ignore[attr-defined]
        _ENTRIES[name] = _Entry(checked, update, reference, properties, example, logs_weights)
        return checked  # type: ignore[return-value]

    return enter


def _hyperparameters(entry: _Entry) -> dict[str, Any]:
    parameters = inspect.signature(entry.factory).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "num_tasks"}


def _describe(name: str, entry: _Entry) -> Method:
    made = make(name, num_tasks=3, **entry.example())
    rule, hyperparameters = made.rule, _hyperparameters(entry)
    assert rule is not None  # for the type checker: every method has one
    weighting = made.weighting is not None
    combinator = "aggregator" in hyperparameters
    order = ("gramian", "jacobian", *sorted(rule.needs | rule.accepts))
    found = {"weighted": weighting, "random": "key" in rule.accepts and not combinator}
    words = ("non-conflicting", "linear under scaling", "weighted", "scale-free", "random")
    needs = tuple(n for n in dict.fromkeys(order) if n in rule.needs)
    return Method(
        name,
        entry.update,
        ("rule",) if combinator else needs,
        tuple(sorted(rule.accepts - {"state", "m", "dtype", "log2_scale", "jacobian"})),
        weighting,
        weighting if entry.logs_weights is None else entry.logs_weights,
        tuple(w for w in words if w in entry.properties or found.get(w, False)),
        entry.reference,
        hyperparameters,
        inspect.signature(entry.factory).parameters["num_tasks"].default is _REQUIRED,
        entry.factory,
    )


def methods() -> dict[str, Method]:
    """Lists every method with what it needs, its properties and its reference.

    Returns:
      A dict from names, in alphabetical order, to `Method` descriptions. What a method needs is
      read off its rule with the default hyperparameters.

    >>> import jaxmtl
    >>> methods = jaxmtl.methods()
    >>> print(methods["famo"].needs, methods["mgda"].properties)
    ('losses', 'previous_batch_losses') ('non-conflicting', 'weighted', 'scale-free')
    >>> [name for name, method in methods.items() if not method.has_weighting][:3]
    ['bloop', 'db_mtl', 'excess_mtl']
    """
    return {name: _describe(name, entry) for name, entry in sorted(_ENTRIES.items())}


def make(name: str, *, num_tasks: int | None = None, **hyperparameters: Any) -> Aggregator:
    """Makes a method by its name, as from a configuration file.

    Args:
      name: One of `methods`.
      num_tasks: m, passed on if it is not None.
      **hyperparameters: Those of the method, by name.

    Returns:
      The `Aggregator` that ``getattr(jaxmtl, name)(num_tasks=num_tasks, **hyperparameters)`` is.

    Raises:
      ValueError: There is no such method (near names are listed), or no such hyperparameter (those
        of the method are), or one without a default is missing.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 2.0]])
    >>> aggregator = jaxmtl.make("cagrad", num_tasks=2, c=0.5)
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [1.5 1.5]
    """
    if name not in _ENTRIES:
        near = difflib.get_close_matches(str(name), _ENTRIES, 5, 0.5) or sorted(_ENTRIES)
        raise ValueError(f"expected the name of a method, got {name!r}; did you mean {near}?")
    entry = _ENTRIES[name]
    known = _hyperparameters(entry)
    listing = ", ".join(
        key if default is _REQUIRED else f"{key}={default!r}" for key, default in known.items()
    )
    for key in hyperparameters:
        if key not in known:
            raise ValueError(
                f"expected hyperparameters of {name} among ({listing or 'none'}), got {key}="
            )
    for key, default in known.items():
        if default is _REQUIRED and key not in hyperparameters:
            raise ValueError(f"{name}({listing}) needs {key}: expected {key}=..., got none")
    chosen = (
        dict(hyperparameters) if num_tasks is None else dict(hyperparameters, num_tasks=num_tasks)
    )
    return entry.factory(**chosen)
