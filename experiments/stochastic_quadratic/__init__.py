"""Stochastic quadratics: rules that weigh noisy gradients do not converge, averaged ones do.

    python -m experiments.stochastic_quadratic

Example (4) of Zhou et al. 2022: two quadratics in the plane, each with two equally likely
outcomes, whose expectations have the Pareto set {(a, 0): |a| <= 1} on the domain |x| <= 1,
y >= 0. Weights that a rule computes from the drawn gradients are correlated with them, so that
the expected direction can point away from the Pareto set; ``cr_mogm`` averages the weights over the
steps. The expected directions are computed exactly, over the four pairs of outcomes, in float64.
The runs start at (0, 0.4) with eta_k = 0.006 / sqrt(k) and corollary 1's alpha_k; as a second
choice alpha = 0.9. What was found: ``results/stochastic_quadratic/notes.md``.

**Reference**: Zhou et al. 2022, section 4 (example 4, theorem 1, figure 1), corollary 1 and
section 6.

**Differs from** Zhou et al., who do not say it: both objectives draw their outcomes
independently, and iterates are projected onto the domain. Of the Gaussian noise only the name is
known here: ``gaussian`` has the covariance of the two-point noise, ``isotropic`` its deviations
alone.
"""
