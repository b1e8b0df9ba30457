"""Tables 7 and 8 of Fernando et al. 2023: test accuracies in percent, three runs."""

from typing import NamedTuple


class Published(NamedTuple):
    """A table."""

    source: str
    values: dict[str, tuple[float, ...]]  # by method, in the order of the domains
    delta_m: dict[str, float]  # by method, in percent against equal weights; negative is better


TABLES = {
    "office31": Published(
        "Fernando 2023, table 7",
        {
            "linear_scalarization": (84.22, 94.81, 97.04),
            "mgda": (79.60, 96.45, 97.96),
            "pcgrad": (84.10, 95.08, 96.30),
            "graddrop": (84.73, 96.17, 96.85),
            "cagrad": (84.22, 94.26, 97.41),
            "moco": (84.33, 97.54, 98.33),
        },
        {"mgda": 0.94, "pcgrad": 0.21, "graddrop": -0.61, "cagrad": 0.07, "moco": -1.45},
    ),
    "office_home": Published(
        "Fernando 2023, table 8",
        {
            "linear_scalarization": (63.88, 77.90, 89.55, 79.39),
            "mgda": (63.63, 73.78, 90.18, 79.82),
            "pcgrad": (63.06, 77.46, 89.09, 78.70),
            "graddrop": (63.82, 78.22, 89.19, 78.88),
            "cagrad": (63.06, 77.03, 89.62, 79.53),
            "moco": (63.38, 79.41, 90.25, 78.70),
        },
        {"mgda": 1.11, "pcgrad": 0.81, "graddrop": 0.18, "cagrad": 0.54, "moco": -0.27},
    ),
}
