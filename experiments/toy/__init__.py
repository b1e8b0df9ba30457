"""The landscape of Liu et al. 2021 under three papers' methods: who reaches the Pareto front.

    python -m experiments.toy --out experiments/results                  # a few minutes
    python -m experiments.toy --out experiments/results --report-only    # tables and figures alone

Two parameters, two losses, Adam, and each paper's starts, steps, rates and noise; the landscape,
its front and how its printed forms differ are in ``landscape``. Starts and seeds are ``vmap``ped, a
run is one ``scan``; a method gets gradients and losses and is never named by the driver. A run has
reached the front (or an optimum) if its losses are within 0.5 of it, of 20 by which either loss
falls along the front; runs that do not are stuck in a valley or still on the way. What was found:
``results/toy/notes.md``.

**Reference**: Fernando et al. 2023, figures 1 to 3 and appendix F.1; Senushkin et al. 2023, figures
1 and 6 and appendix C; Xiao et al. 2025, figure 1 and appendix A.3.

**Differs from** the papers: MoCo's noise, optimizer and decay of the rate are those of the authors'
code, as is its exact lambda (``moco``; ``moco_algorithm_1`` is the paper's). LDC-MTL's figure shows
other starts than its text prints: both are run. Float64, but for ``aligned_float32``.
"""
