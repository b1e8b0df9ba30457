"""Xiao et al. 2025 on CelebA: tables 2, 3, 4 and 10, figure 4, and the single tasks of their code.

Tables 2, 4 and 10 print delta_m alone, no value of an attribute; table 2 takes its baselines from
their own papers. Figure 4 is a picture without numbers: what the text says of it is here.
"""

from experiments.faces.methods import SINGLE

TABLE2, TABLE3, TABLE4, TABLE10, FIGURE4, FIGURE7 = (
    f"Xiao 2025, {name}"
    for name in ("table 2", "table 3", "table 4", "table 10", "figure 4", "figure 7")
)

# F1 of a network per task, in the order of ``ATTRIBUTES``: what delta_m is measured against.
STL = (
    *(0.6737, 0.6812, 0.8152, 0.5760, 0.7206, 0.8555, 0.3820, 0.5823, 0.7876, 0.8321),
    *(0.5030, 0.6869, 0.6781, 0.5240, 0.5162, 0.9569, 0.6969, 0.6798, 0.8808, 0.8582),
    *(0.9703, 0.9327, 0.5058, 0.4031, 0.9704, 0.4864, 0.6079, 0.5261, 0.5691, 0.5982),
    *(0.6858, 0.9241, 0.5425, 0.7406, 0.7102, 0.8737, 0.9306, 0.3370, 0.7648, 0.9191),
)
# Table 2, in percent; that of LDC-MTL is ± 0.26 over three seeds (table 5).
DELTA_M = {
    SINGLE: 0.0,
    "linear_scalarization": 4.15,
    "scale_invariant": 7.20,
    "rlw": 1.46,
    "dwa": 3.20,
    "uncertainty_weighting": 3.23,
    "famo": 1.21,
    "go4align": 0.88,
    "mgda": 14.85,
    "pcgrad": 3.17,
    "cagrad": 2.48,
    "imtl_g": 0.84,
    "nash_mtl": 2.84,
    "fairgrad": 0.37,
    "ldc_mtl": -1.31,
}
# Table 3: mean, standard deviation, least and largest of the losses of the 40 tasks.
LOSSES = {
    "ldc_mtl": (0.189, 0.133, 0.029, 0.538),
    "linear_scalarization": (0.287, 0.195, 0.032, 0.729),
}
# Table 4: delta_m of LDC-MTL by lambda.
PENALTIES = {0.005: -1.27, 0.008: -1.16, 0.01: -1.31, 0.02: -0.96}
# Table 10: delta_m of LDC-MTL with the tasks in another order, by seed.
ORDERS = (-1.30, -1.00, -1.62)
# Figure 4, times of equal weights on CelebA, as far as section 5.1 puts it in numbers.
LDC_AT_MOST = 1.11  # LDC-MTL, over all benchmarks
NASH_OVER_LDC = 12.0  # approximately
