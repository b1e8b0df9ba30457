"""What the results of the toy study say: tables, and the papers' claims with their verdicts."""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from experiments.claims import Claim, claim, differing, listed, show
from experiments.study import Record, Report, Table, read_records
from experiments.toy import figures, landscape

# A run has reached the front, or an optimum, if its losses, unscaled, are this near. Both losses
# fall by 20 along the front, and runs that got stuck in a valley are 9 and more away.
REACHED = 0.5
# LDC-MTL: a run is balanced if 10 L1 and L2 of the scaled losses are this near.
BALANCED = 0.1


def front_gaps(record: Record) -> np.ndarray:
    """Returns the distances to the front in objective space, (seeds, alphas, starts)."""
    front = landscape.losses_at(landscape.pareto_set())
    return landscape.distance(landscape.losses_at(np.array(record["final"])), front)


def set_gaps(record: Record) -> np.ndarray:
    """Returns the distances to the Pareto set in parameter space, (seeds, alphas, starts)."""
    return landscape.distance(np.array(record["final"]), landscape.pareto_set())


def excess(record: Record) -> np.ndarray:
    """Returns how far weighted sums of losses are above their minima, (seeds, alphas, starts)."""
    alphas = np.array(record["config"]["alphas"])
    weights = np.stack([alphas, 1 - alphas], axis=-1)
    least = landscape.losses_at(landscape.minimize_weighted(alphas))
    above = landscape.losses_at(np.array(record["final"])) - least[:, None]
    return np.einsum("saij,aj->sai", above, weights)


def imbalance(record: Record) -> np.ndarray:
    """Returns ``L1 - L2`` of the unscaled losses, (seeds, starts)."""
    both = landscape.losses_at(np.array(record["final"])[:, 0])
    return both[..., 0] - both[..., 1]


def per_seed(values: np.ndarray) -> list[float]:
    """Returns the mean over everything but the leading axis."""
    return values.reshape(len(values), -1).mean(axis=1).tolist()


def worst_start(record: Record) -> float:
    """Returns the share of seeds that reach the front from the start from which fewest do."""
    return float((front_gaps(record) <= REACHED)[:, 0].mean(axis=0).min())


def tenth(record: Record, *, last: bool) -> np.ndarray:
    """Returns the bias averaged over the first or last tenth of the run, (seeds, starts)."""
    bias = np.array(record["bias"])
    count = max(bias.shape[-1] // 10, 1)
    return bias[..., -count if last else 0 :][..., :count].mean(axis=-1)


# --- tables -------------------------------------------------------------------------------------


def point(start: Iterable[float]) -> str:
    """Returns a point as text."""
    return "({:g}, {:g})".format(*start)


def front_cells(record: Record) -> list[str]:
    """Returns, per start, the share of seeds that reach the front."""
    gaps = front_gaps(record)
    reached = gaps <= REACHED
    medians = (np.median(gaps), np.median(set_gaps(record)))
    cells = [f"{share:.2f}" for share in reached[:, 0].mean(axis=0)]
    return [*cells, show(per_seed(reached), digits=2), *(f"{x:.3f}" for x in medians)]


def weights_cells(record: Record) -> list[str]:
    """Returns, per task weighting, from how many starts front and optimum are reached."""
    hits = front_gaps(record) <= REACHED, excess(record) <= REACHED
    counts = [[*hit[0].sum(axis=-1), hit[0].sum()] for hit in hits]
    shares = [show(per_seed(hit), digits=2) for hit in hits]
    return [" / ".join(map(str, cell)) for cell in (*zip(*counts, strict=True), shares)]


def balance_cells(record: Record) -> list[str]:
    """Returns, per start, how balanced the scaled losses end."""
    gap, reached = imbalance(record), front_gaps(record)[:, 0] <= REACHED
    ends = zip(gap.mean(axis=0), np.all(reached, axis=0), strict=True)
    balanced = reached & (np.abs(gap) <= BALANCED)
    return [
        *(f"{value:.2f}" + ("" if all_there else "*") for value, all_there in ends),
        *(show(per_seed(x), digits=2) for x in (reached, balanced)),
    ]


def bias_cells(record: Record) -> list[str]:
    """Returns the bias of the multi-gradient early and late, per trajectory."""
    pairs = zip(tenth(record, last=False).T, tenth(record, last=True).T, strict=True)
    cells = [f"{early.mean():.3f} -> {show(late.tolist(), digits=3)}" for early, late in pairs]
    return [*cells, f"{record['samples'][-1]:,}"]


def table_of(part: str, records: dict[str, Record]) -> Table:
    """Returns the table of a part."""
    config = next(iter(records.values()))["config"]
    starts = [point(start) for start in config["starts"]]
    titles = {
        "front": f"share of {config['seeds']} seeds that end within {REACHED} of the front",
        "aligned": f"of {len(starts)} starts, how many end on the front / at the optimum",
        "ldc": f"10 L1 - L2 at the end (mean over {config['seeds']} seeds); * not on the front",
        "bias": "norm of the multi-gradient's error, first tenth -> last tenth of the run",
    }
    weights = [f"{a:g} L1 + {1 - a:g} L2" for a in config["alphas"]]
    kinds: dict[str, tuple[list[str], Callable[[Record], list[str]]]] = {
        "front": ([*starts, "all starts", "median gap", "median distance (x)"], front_cells),
        "aligned": ([*weights, "all", "all seeds, shares"], weights_cells),
        "ldc": ([*starts, "on the front", "balanced"], balance_cells),
        "bias": ([*starts, "samples"], bias_cells),
    }
    kind = part.split("_")[0] if part.split("_")[0] in kinds else "front"
    header, cells = kinds[kind]
    rows = [[method, *cells(record)] for method, record in records.items()]
    return Table(f"{part}: {titles[kind]}", ["method", *header], rows)


# --- claims -------------------------------------------------------------------------------------


def front_claims(records: dict[str, Record], figure: str, starts: int) -> list[Claim]:
    """Returns the claims of MoCo's figures 1 and 2: who reaches the front from every start."""
    records = {name: restrict(record, starts) for name, record in records.items()}
    exact = {name: worst_start(records[name]) for name in ("mgda", "moco")}
    others = {name: worst_start(records[name]) for name in ("smg", "pcgrad", "cagrad")}
    shares = {
        name: show(per_seed(front_gaps(records[name]) <= REACHED), digits=2)
        for name in (*exact, *others)
    }

    def said(names: Iterable[str]) -> str:
        return listed({name: shares[name] for name in names}, separator=", ")

    source = f"MoCo (Fernando et al. 2023), {figure}"
    return [
        claim(
            "MGDA with true gradients and MoCo with noisy ones reach the Pareto front from every "
            "initial point",
            source,
            f"share of starts and seeds that reach it: {said(exact)}",
            [value == 1 for value in exact.values()],
            paper=f"{starts} of {starts} starts",
        ),
        claim(
            "SMG, PCGrad and CAGrad with noisy gradients fail to reach it from some initial points",
            source,
            f"share of starts and seeds that reach it: {said(others)}",
            [value < 0.5 for value in others.values()],
            paper=f"fewer than {starts} of {starts} starts",
        ),
    ]


def restrict(record: Record, starts: int) -> Record:
    """Returns the record of the starts that the paper prints, in the order of their figure."""
    printed = [i for i, start in enumerate(record["config"]["starts"]) if start != [-8.5, -5.0]]
    final = np.array(record["final"])[:, :, printed[:starts]]
    return record | {"final": final.tolist()}


def bias_claims(records: dict[str, Record]) -> list[Claim]:
    """Returns the claims of MoCo's figure 3."""
    late = {name: tenth(record, last=True) for name, record in records.items()}
    early = tenth(records["smg"], last=False)
    means = {name: bias.mean(axis=0) for name, bias in late.items()}
    samples = {name: record["samples"][-1] for name, record in records.items()}
    source = "MoCo (Fernando et al. 2023), figure 3"
    text = {name: ", ".join(f"{x:.3f}" for x in mean) for name, mean in means.items()}
    decay = means["smg"] / early.mean(axis=0)
    growing = "smg_growing_batch"
    return [
        claim(
            "The bias of SMG's multi-gradient does not decay in some trajectories",
            source,
            f"last tenth / first tenth of the run: {', '.join(f'{x:.2f}' for x in decay)}",
            [bool((decay >= 1).any())],
        ),
        claim(
            "MoCo's bias is comparable to that of SMG with a growing batch, with fewer samples",
            source,
            f"bias in the last tenth: MoCo {text['moco']} after {samples['moco']:,} samples, "
            f"growing batch {text[growing]} after {samples[growing]:,}, SMG {text['smg']}",
            [
                bool((means["moco"] <= 1.5 * means[growing]).all()),
                samples["moco"] < samples[growing],
            ],
        ),
    ]


def aligned_claims(records: dict[str, Record], single: dict[str, Record]) -> list[Claim]:
    """Returns the claims of Aligned-MTL's figures 1 and 6, from runs in float64 and float32."""
    optimum = {name: (excess(record) <= REACHED)[0] for name, record in records.items()}
    front = {name: (front_gaps(record) <= REACHED)[0] for name, record in records.items()}
    runs = optimum["aligned_mtl"].size
    source = "Aligned-MTL (Senushkin et al. 2023), figure"
    forms = {
        "aligned_mtl": "weights inside the method",
        "aligned_mtl_weighted_losses": "weighted losses",
    }
    hits = {
        f"{precision}, {form}": int((excess(part[name]) <= REACHED)[0].sum())
        for precision, part in (("float32", single), ("float64", records))
        for name, form in forms.items()
    }
    others = ("imtl", "nash_mtl")
    equal = {name: hit[len(hit) // 2] for name, hit in optimum.items()}
    return [
        claim(
            "Aligned-MTL reaches the optimum of the weighted sum for all task weights and initial "
            "points, except one extreme case",
            f"{source}s 1 and 6",
            "; ".join(f"{name}: {count} of {runs}" for name, count in hits.items()),
            [count >= runs - 1 for count in hits.values()],
            paper=f"{runs - 1} of {runs}",
        ),
        claim(
            "IMTL and Nash-MTL stop at an arbitrary point of the front instead of the optimum",
            f"{source}s 1 and 6",
            "; ".join(
                f"{name}: {front[name].sum()} of {runs} on the front, {optimum[name].sum()} at "
                "the optimum"
                for name in others
            ),
            [
                front[name].sum() >= 0.8 * runs and optimum[name].sum() <= 0.6 * runs
                for name in others
            ],
        ),
        claim(
            "With equal weights Aligned-MTL alone reaches the optimum from every initial point",
            f"{source} 1",
            listed(equal, lambda hit: f"{hit.sum()} of {hit.size}", ", "),
            [hit.all() == (name in forms) for name, hit in equal.items()],
        ),
    ]


def ldc_claims(records: dict[str, Record]) -> list[Claim]:
    """Returns the claims of LDC-MTL's figure 1."""
    gaps = {name: np.abs(imbalance(record)[0]) for name, record in records.items()}
    front = {name: (front_gaps(record) <= REACHED)[0, 0] for name, record in records.items()}
    source = "LDC-MTL (Xiao et al. 2025), figure 1 and appendix A.3"
    balanced = {name: (front[name] & (gaps[name] <= BALANCED)).sum() for name in records}
    starts = gaps["ldc_mtl"].size
    famo = imbalance(records["famo_decay_1e-5"])[0][front["famo_decay_1e-5"]]

    def said(names: Iterable[str]) -> str:
        return ", ".join(f"{name} {balanced[name]} of {starts}" for name in names)

    unbalanced = ("linear_scalarization", "mgda")
    return [
        claim(
            "LDC-MTL always converges to the same balanced point",
            source,
            f"balanced (10 L1 and L2 within {BALANCED}): {said(x for x in records if 'ldc' in x)}",
            [balanced["ldc_mtl"] == starts],
            paper="5 of 5 starts",
        ),
        claim(
            "Linear scalarization and MGDA do not converge to balanced points",
            source,
            f"balanced: {said(unbalanced)}",
            [balanced[name] == 0 for name in unbalanced],
        ),
        claim(
            "FAMO converges to different points of the front",
            source,
            f"with weight decay 1e-5, 10 L1 - L2 where the front is reached: "
            f"{', '.join(f'{x:.1f}' for x in famo)}; with 1e-3: "
            f"{', '.join(f'{x:.1f}' for x in imbalance(records['famo'])[0][front['famo']])}",
            [len(famo) > 1 and float(np.ptp(famo)) > 1],
        ),
    ]


# What the papers leave open, or have otherwise.
MOCO_DIFFERS = (
    "Adam, noise of deviation 1, the rate's decay and the exact lambda as in the authors' code; "
    "10 seeds; float64"
)
ALIGNED_DIFFERS = "float64; the first claim in float32, that of their code, too"
LDC_DIFFERS = "lambda = 1 and tau = 1, which are not stated; seven starts in place of five; float64"
_RIVALS = ("mgda", "moco", "smg", "pcgrad", "cagrad")
_FORMS = ("aligned_mtl", "aligned_mtl_weighted_losses")
_BALANCERS = ("linear_scalarization", "mgda", "famo", "famo_decay_1e-5", "ldc_mtl")
# What the claims of a figure need, parts with their methods, and what differs.
CLAIMS: tuple[tuple[Callable[..., list[Claim]], dict[str, tuple[str, ...]], str], ...] = (
    (partial(front_claims, figure="figure 1", starts=3), {"moco_1": _RIVALS}, MOCO_DIFFERS),
    (partial(front_claims, figure="figure 2", starts=5), {"moco_2": _RIVALS}, MOCO_DIFFERS),
    (bias_claims, {"bias": ("smg", "smg_growing_batch", "moco")}, MOCO_DIFFERS),
    (
        aligned_claims,
        {"aligned": (*_FORMS, "imtl", "nash_mtl"), "aligned_float32": _FORMS},
        ALIGNED_DIFFERS,
    ),
    (ldc_claims, {"ldc": _BALANCERS}, LDC_DIFFERS),
)


def claims_of(parts: figures.Parts) -> list[Claim]:
    """Returns the claims of every figure that has the records they speak of."""
    return [
        claim
        for make, needs, differs in CLAIMS
        if all(set(methods) <= parts.get(part, {}).keys() for part, methods in needs.items())
        for claim in differing(make(*(parts[part] for part in needs)), differs)
    ]


def read_parts(folder: Path) -> figures.Parts:
    """Returns the records of a folder by part and method."""
    parts = {path.stem: read_records(path) for path in sorted(folder.glob("*.jsonl"))}
    return {
        part: {record["method"]: record for record in records} for part, records in parts.items()
    }


def claims(folder: Path) -> list[Claim]:
    """Returns what the papers say of the landscape beside what the results say."""
    return claims_of(read_parts(folder))


def report(folder: Path, args: argparse.Namespace) -> Report:
    """Returns a table of every part and the figures whose records are there."""
    del args
    parts = read_parts(folder)
    tables = [table_of(part, records) for part, records in parts.items()]
    return Report(tables, figures.drawn(parts))
