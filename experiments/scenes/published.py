"""The papers' tables of NYUv2 and Cityscapes, as printed, and the set-ups behind them."""

from typing import NamedTuple


class Published(NamedTuple):
    """A table."""

    source: str
    values: dict[
        str, list[float]
    ]  # by method: the benchmark's metrics, in the order of its columns
    delta_m: dict[str, list[float]]  # by method, in percent: over metrics, over tasks where printed


class Recipe(NamedTuple):
    """A set-up of the papers; networks are of width 64, and Adam's rate is halved half-way."""

    size: tuple[int, int]  # of the images: height, width
    batch_size: int
    epochs: int


SEEDS = 3
RATE = 1e-4  # of Adam
RECIPES = {
    "nyuv2": Recipe((288, 384), 2, 200),
    "cityscapes2": Recipe((128, 256), 8, 200),
    "cityscapes3": Recipe((256, 512), 8, 100),
}
# LDC-MTL's authors have rates of their own.
RATES = {
    (dataset, method): rate
    for dataset, rate in (("nyuv2", 8e-5), ("cityscapes2", 3e-4))
    for method in ("ldc_mtl", "ldc_mtl_router")
}


def _table(source: str, metrics: int, text: str) -> Published:
    rows = [line.split() for line in text.strip().splitlines()]
    numbers = {name: [float(x) for x in values if x != "-"] for name, *values in rows}
    return Published(
        source,
        {name: values[:metrics] for name, values in numbers.items()},
        {name: values[metrics:] for name, values in numbers.items()},
    )


# Angles within t of table 3, printed as fractions, are in percent here. Among the methods of Xiao
# et al. stands a network, ``cross_stitch``. Their own row of NYUv2 repeats the mIoU as the pixel
# accuracy: its printed delta_m is not that of its columns. GradDrop with PSPNet acts on features.
TABLES: dict[tuple[str, str], tuple[Published, ...]] = {
    ("cityscapes3", "pspnet"): (
        _table(
            "Senushkin 2023, t. 1",
            3,
            """
            single_task 66.73 10.55 0.33 -
            linear_scalarization 52.98 10.89 0.39 14.30
            rlw 51.26 10.25 0.41 15.58
            dwa 53.15 10.22 0.40 13.20
            uncertainty_weighting 60.12 9.87 0.33 1.53
            mgda 66.72 17.02 0.33 20.62
            mgda_ub 66.37 18.63 0.32 25.05
            gradnorm 57.24 10.29 0.35 6.55
            graddrop_ub 52.98 10.09 0.40 12.50
            pcgrad 54.06 9.91 0.38 10.00
            gradvac 54.07 10.39 0.40 12.99
            cagrad 64.33 10.15 0.34 1.46
            imtl_g 65.13 11.58 0.32 3.10
            nash_mtl 64.84 11.90 0.37 9.38
            aligned_mtl 67.06 10.63 0.33 -0.02
            aligned_mtl_ub 66.07 10.54 0.32 -0.35
            """,
        ),
    ),
    ("nyuv2", "mtan"): (
        _table(
            "Senushkin 2023, t. 2",
            9,
            """
            single_task 38.30 63.76 0.68 0.28 25.01 19.21 30.14 57.20 69.15 - -
            linear_scalarization 39.29 65.33 0.5493 0.2263 28.15 23.96 22.09 47.50 61.08 5.46 -1.07
            rlw 37.17 63.77 0.58 0.24 28.27 24.18 22.26 47.05 60.62 7.67 2.00
            dwa 39.11 65.31 0.55 0.23 27.61 23.18 24.17 50.18 62.39 3.49 -2.06
            uncertainty_weighting 36.87 63.17 0.54 0.23 27.04 22.61 23.54 49.05 63.65 4.01 -0.97
            mgda 30.47 59.90 0.61 0.26 24.88 19.45 29.18 56.88 69.36 1.47 1.79
            gradnorm 20.09 52.06 0.72 0.28 24.83 18.86 30.81 57.94 69.73 7.22 11.51
            graddrop 39.39 65.12 0.55 0.23 27.48 22.96 23.38 49.44 62.87 3.61 -2.03
            pcgrad 38.06 64.64 0.56 0.23 27.41 22.80 23.86 49.83 63.14 3.83 -1.33
            gradvac 37.53 64.35 0.56 0.24 27.66 23.38 22.83 48.66 62.21 5.44 0.01
            cagrad 39.79 65.49 0.55 0.23 26.31 21.58 25.61 52.36 65.58 0.29 -4.18
            imtl_g 39.35 65.60 0.54 0.23 26.02 21.19 26.20 53.13 66.24 -0.59 -4.76
            nash_mtl 40.13 65.93 0.53 0.22 25.26 20.08 28.40 55.47 68.15 -4.04 -7.56
            aligned_mtl 40.82 66.33 0.53 0.22 25.19 19.71 28.88 56.23 68.54 -4.93 -8.40
            aligned_mtl_ub 43.11 67.22 0.55 0.22 25.67 20.57 27.58 54.37 67.12 -3.48 -7.83
            """,
        ),
        _table(
            "Xiao 2025, t. 2 and 7; Fernando 2023, t. 3",
            9,
            """
            single_task 38.30 63.76 0.6754 0.2780 25.01 19.21 30.14 57.20 69.15
            cross_stitch 37.42 63.51 0.5487 0.2188 28.85 24.52 22.75 46.58 59.56 6.96
            linear_scalarization 39.29 65.33 0.5493 0.2263 28.15 23.96 22.09 47.50 61.08 5.59
            scale_invariant 38.45 64.27 0.5354 0.2201 27.60 23.37 22.53 48.57 62.32 4.39
            rlw 37.17 63.77 0.5759 0.2410 28.27 24.18 22.26 47.05 60.62 7.78
            dwa 39.11 65.31 0.5510 0.2285 27.61 23.18 24.17 50.18 62.39 3.57
            uncertainty_weighting 36.87 63.17 0.5446 0.2260 27.04 22.61 23.54 49.05 63.65 4.05
            famo 38.88 64.90 0.5474 0.2194 25.06 19.57 29.21 56.61 68.98 -4.10
            go4align 40.42 65.37 0.5492 0.2167 24.76 18.94 30.54 57.87 69.84 -6.08
            mgda 30.47 59.90 0.6070 0.2555 24.88 19.45 29.18 56.88 69.36 1.38
            pcgrad 38.06 64.64 0.5550 0.2325 27.41 22.80 23.86 49.83 63.14 3.97
            graddrop 39.39 65.12 0.5455 0.2279 27.48 22.96 23.38 49.44 62.87 3.58
            cagrad 39.79 65.49 0.5486 0.2250 26.31 21.58 25.61 52.36 65.58 0.20
            imtl_g 39.35 65.60 0.5426 0.2256 26.02 21.19 26.20 53.13 66.24 -0.76
            moco 40.30 66.07 0.5575 0.2135 26.67 21.83 25.61 51.78 64.85 0.16
            moco_pcgrad 38.80 65.02 0.5492 0.2326 27.39 22.75 23.64 49.89 63.21 3.62
            moco_cagrad 39.58 65.49 0.5535 0.2292 25.97 20.86 26.84 53.79 66.65 -0.97
            nash_mtl 40.13 65.93 0.5261 0.2171 25.26 20.08 28.40 55.47 68.15 -4.04
            fairgrad 39.74 66.01 0.5377 0.2236 24.84 19.60 29.26 56.58 69.16 -4.66
            ldc_mtl_router 38.04 38.04 0.5402 0.2278 24.70 19.19 29.97 57.44 69.69 -4.40
            """,
        ),
    ),
    ("nyuv2", "pspnet"): (
        _table(
            "Senushkin 2023, t. 3",
            9,
            """
            single_task 49.37 72.03 0.52 0.24 22.97 16.94 34 62 73 - -
            linear_scalarization 45.21 69.70 0.49 0.21 26.10 21.08 26 52 66 8.97 4.72
            rlw 46.19 69.71 0.46 0.19 26.09 21.09 27 53 66 6.67 1.73
            dwa 45.83 69.65 0.50 0.22 26.10 21.27 26 52 66 9.64 5.61
            mgda 40.96 65.80 0.54 0.22 23.36 17.45 33 61 72 3.54 4.24
            mgda_ub 41.15 65.10 0.53 0.22 23.42 17.60 32 60 72 4.02 4.40
            gradnorm 45.63 69.64 0.48 0.20 25.46 20.06 28 55 67 5.88 2.18
            graddrop_ub 45.69 70.13 0.49 0.20 26.16 21.21 26 52 65 8.60 3.92
            pcgrad 46.37 69.69 0.48 0.20 26.00 21.05 26 53 66 7.78 3.17
            gradvac 46.65 69.97 0.49 0.21 25.95 20.88 27 53 66 7.89 3.75
            cagrad 45.46 69.35 0.47 0.20 24.28 18.73 30 58 70 2.66 0.13
            imtl_g 44.02 68.56 0.47 0.19 23.69 18.03 32 59 72 0.76 -1.02
            nash_mtl 47.25 70.38 0.46 0.20 23.95 18.83 31 59 71 1.13 -1.48
            aligned_mtl 46.70 69.97 0.46 0.19 24.19 18.77 30 58 71 1.44 -1.55
            aligned_mtl_ub 46.47 69.92 0.48 0.20 24.37 18.88 30 58 70 2.70 0.07
            """,
        ),
    ),
    ("cityscapes2", "mtan"): (
        _table(
            "Senushkin 2023, t. 4",
            4,
            """
            single_task 74.01 93.16 0.0125 27.77 -
            linear_scalarization 75.18 93.49 0.0155 46.77 22.60
            rlw 74.57 93.41 0.0158 47.79 24.37
            dwa 75.24 93.52 0.0160 44.37 21.43
            uncertainty_weighting 72.02 92.85 0.0140 30.13 5.88
            mgda 68.84 91.54 0.0309 33.50 44.14
            gradnorm 73.72 93.04 0.0124 34.11 5.63
            graddrop 75.27 93.53 0.0157 47.54 23.67
            pcgrad 75.13 93.48 0.0154 42.07 18.21
            cagrad 75.16 93.48 0.0141 37.60 11.58
            imtl_g 75.33 93.49 0.0135 38.41 11.04
            nash_mtl 75.41 93.66 0.0129 35.02 6.72
            aligned_mtl 75.77 93.69 0.0133 32.66 5.27
            aligned_mtl_ub 74.89 93.46 0.0131 33.92 6.37
            """,
        ),
        _table(
            "Xiao 2025, t. 1; Fernando 2023, t. 2",
            4,
            """
            single_task 74.01 93.16 0.0125 27.77
            cross_stitch 73.08 92.79 0.0165 118.5 90.02
            linear_scalarization 75.18 93.49 0.0155 46.77 22.60
            scale_invariant 70.95 91.73 0.0161 33.83 14.11
            rlw 74.57 93.41 0.0158 47.79 24.38
            dwa 75.24 93.52 0.0160 44.37 21.45
            uncertainty_weighting 72.02 92.85 0.0140 30.13 5.89
            famo 74.54 93.29 0.0145 32.59 8.13
            go4align 72.63 93.03 0.0164 27.58 8.11
            mgda 68.84 91.54 0.0309 33.50 44.14
            pcgrad 75.13 93.48 0.0154 42.07 18.29
            graddrop 75.27 93.53 0.0157 47.54 23.73
            cagrad 75.16 93.48 0.0141 37.60 11.64
            imtl_g 75.33 93.49 0.0135 38.41 11.10
            moco 75.42 93.55 0.0149 34.19 9.90
            moco_pcgrad 75.49 93.62 0.0146 46.07 20.07
            moco_cagrad 75.07 93.39 0.0137 36.78 10.12
            nash_mtl 75.41 93.66 0.0129 35.02 6.82
            fairgrad 75.72 93.68 0.0134 32.25 5.18
            ldc_mtl_router 74.53 93.42 0.0128 26.79 -0.57
            """,
        ),
    ),
}

# Where Fernando et al. print MoCo alone, and on top of other methods.
MOCO_TABLES = {
    "cityscapes2": ("Fernando 2023, t. 2", "Fernando 2023, t. 5"),
    "nyuv2": ("Fernando 2023, t. 3", "Fernando 2023, t. 6"),
}
MOCO_RIVALS = ("linear_scalarization", "mgda", "pcgrad", "graddrop", "cagrad")  # in those tables

# Cityscapes with two tasks by MTAN: the metrics on the training part, then on the other.
ZHOU = "Zhou 2022, t. 3"
AVERAGED: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mgda": ((76.05, 94.08, 0.0065, 18.90), (66.32, 88.85, 0.0248, 33.50)),
    "cr_mgda": ((79.58, 95.12, 0.0067, 18.51), (73.21, 93.01, 0.0151, 33.59)),
    "pcgrad": ((80.19, 95.31, 0.0087, 27.18), (75.25, 93.50, 0.0148, 45.37)),
    "cr_pcgrad": ((80.12, 95.32, 0.0085, 26.44), (75.37, 93.50, 0.0153, 43.05)),
    "cagrad": ((80.24, 95.29, 0.0081, 25.06), (75.09, 93.52, 0.0145, 40.97)),
    "cr_cagrad": ((80.33, 95.33, 0.0080, 25.30), (75.58, 93.53, 0.0142, 38.51)),
}

# The same of LDC-MTL by lambda (0.1 is that of its table 1) and of scalarization by its weights:
# metrics, delta_m and what is printed after its ±.
XIAO8, XIAO9 = "Xiao 2025, t. 8", "Xiao 2025, t. 9"
PENALTIES: dict[float, tuple[float, ...]] = {
    0.02: (73.18, 92.78, 0.0124, 29.67, 1.96, 1.25),
    0.05: (74.50, 93.40, 0.0124, 28.99, 0.79, 1.10),
    0.06: (74.84, 93.43, 0.0123, 29.61, 0.92, 0.95),
    0.07: (75.40, 93.42, 0.0125, 29.25, 0.88, 1.01),
    0.08: (75.34, 93.35, 0.0127, 29.70, 1.64, 1.04),
    0.09: (74.97, 93.50, 0.0123, 28.90, 0.18, 0.96),
    0.1: (74.53, 93.42, 0.0128, 26.79, -0.57, 1.17),
}
OWN_PENALTY = 0.1  # with which table 1 is made
WEIGHTS: dict[tuple[float, float], tuple[float, ...]] = {
    (0.1, 0.9): (74.00, 92.92, 0.0144, 29.23, 5.13, 1.10),
    (0.2, 0.8): (75.09, 93.58, 0.0136, 33.73, 7.18, 0.99),
    (0.3, 0.7): (74.10, 93.08, 0.0153, 35.38, 12.38, 1.78),
    (0.4, 0.6): (74.95, 93.43, 0.0175, 43.15, 23.47, 1.77),
    (0.6, 0.4): (74.48, 93.39, 0.0186, 43.93, 26.53, 1.77),
    (0.8, 0.2): (74.24, 93.15, 0.0192, 61.24, 43.19, 6.50),
}
