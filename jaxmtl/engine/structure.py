"""How the inner products of gradients of one group of uses are taken without forming a gradient."""

import dataclasses
from collections.abc import Sequence

from jaxmtl.engine import bottlenecks, paths
from jaxmtl.engine.paths import Part
from jaxmtl.engine.program import Use, Value
from jaxmtl.engine.small import Small
from jaxmtl.engine.views import Views


@dataclasses.dataclass(frozen=True)
class Structure:
    """What the gradients of a group are made of.

    Attributes:
      parts: The outer products.
      pairings: How parts i and j <= i pair, where they have entries in common that count.
      small: What is known of uses that have no parts, None where there are none.
    """

    parts: tuple[Part, ...]
    pairings: dict[tuple[int, int], str]
    small: Small | None


def structure_of(
    found: dict[Use, list[Part] | None], views: Views, in_gramian: Sequence[bool]
) -> Structure | None:
    """Returns the structure of a group, None where not all of it is known.

    Args:
      found: The parts of each of its uses.
      views: What values hold.
      in_gramian: For each leaf, whether it counts.
    """
    parts = [part for some in found.values() for part in some or ()]
    missing = [use for use, some in found.items() if not some]
    small = None
    if missing:
        if not parts or any(use.probed for use in missing):
            return None
        both = bottlenecks.find(missing, parts, views)
        if both is None:
            return None
        small, more = both
        parts = [*parts, *more]
    counts: dict[Value, bool] = {}
    ends = [part.value for part in parts]
    ends += [] if small is None else [*small.selections, *(s.value for s in small.spreads)]
    for v in ends:
        flags = {in_gramian[leaf] for leaf in views.leaves(v)}
        if len(flags) > 1:
            return None
        counts[v] = flags.pop()
    pairings = {}
    for i, p in enumerate(parts):
        for j, q in enumerate(parts[: i + 1]):
            relation = views.relation(p.value, q.value)
            if relation == "apart" or not counts[p.value]:
                continue
            how = paths.pairing(p, q) if relation == "same" else None
            if how is None:
                return None
            pairings[i, j] = how
    if small is not None:
        small = small.restricted(counts)
    return Structure(tuple(parts), pairings, small)
