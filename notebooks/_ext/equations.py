r"""The update of each method as it is printed, in LaTeX; the docstring has it in plain text.

Symbols: g_i gradients, G their Gramian, \ell_i losses, w weights, u the update, \Delta the simplex.
"""

EQUATIONS = {
    "aligned_mtl": r"u = \sum_i w_i g_i, \quad w = \sqrt{\lambda_{\min}}\, V \Sigma^{-1} V^\top p, "
    r"\qquad G = V \Sigma^2 V^\top",
    "bloop": r"u = g_{\text{main}} + \lambda \Big(g_{\text{aux}} - "
    r"\frac{\langle g_{\text{aux}}, e\rangle}{\lVert e\rVert^2}\, e\Big), \qquad e \text{ a moving average of } g_{\text{main}}",
    "cagrad": r"u = \arg\max_{d}\, \min_i \langle g_i, d\rangle \quad \text{subject to} \quad "
    r"\lVert d - g_0\rVert \le c\,\lVert g_0\rVert, \qquad g_0 = \sum_i p_i g_i",
    "config": r"u = \Big(\sum_i \langle g_i, v\rangle\Big) v, \qquad v = "
    r"\frac{\hat J^{+} p}{\lVert \hat J^{+} p\rVert}, \quad \hat J \text{ the unit rows}",
    "conic_grad": r"u = \arg\max_{d}\, \min_i \langle g_i, d\rangle \quad \text{subject to} \quad "
    r"\langle d, g_0\rangle \ge c\,\lVert d\rVert \lVert g_0\rVert,\ \lVert d\rVert = \lVert g_0\rVert",
    "cosmos": r"\ell = p^\top \ell - \lambda \cos(p, \ell)",
    "cr_mogm": r"w_k = \alpha_k w_{k-1} + (1 - \alpha_k)\, v_k, \qquad v_k \text{ the weights of the rule inside}",
    "db_mtl": r"y_i \leftarrow \beta_k y_i + (1 - \beta_k) \nabla \log \ell_i, \qquad "
    r"u = \max_j \lVert y_j\rVert \sum_i \frac{y_i}{\lVert y_i\rVert}",
    "dcgd": r"u = s \text{ where } \langle s, g_i\rangle \ge 0 \text{ for all } i, \text{ else } \frac1m \sum_i "
    r"\Big(s - \frac{\langle s, g_i\rangle}{\lVert g_i\rVert^2}\, g_i\Big), \qquad s = \sum_i g_i",
    "dibs_mtl": r"\delta \leftarrow \delta - \eta \sum_i \lVert \delta + \rho\, \hat g_i\rVert\, \hat g_i, "
    r"\qquad \hat g_i = \frac{g_i}{\lVert g_i\rVert}",
    "dual_proj": r"u = \sum_i w_i g_i, \quad w = \arg\min_{v \ge p} v^\top G v",
    "dwa": r"w_i = m\, \operatorname{softmax}_i\big(r / T\big), \qquad r_i = \frac{\ell_i(t-1)}{\ell_i(t-2)}",
    "epo": r"w \text{ moves } \ell \text{ towards the ray } p_1 \ell_1 = \dots = p_m \ell_m, "
    r"\text{ then down along it}",
    "every_k": r"w_t = v_{k \lfloor t / k \rfloor}, \qquad v \text{ the weights of the rule inside}",
    "excess_mtl": r"w_i \leftarrow \frac{w_i \exp(\eta\, e_i / e_{i0})}{\sum_j w_j \exp(\eta\, e_j / e_{j0})}, "
    r"\qquad e_i = g_i^\top \operatorname{diag}(S_i)^{-1/2} g_i",
    "fairgrad": r"G w = w^{-1/\alpha}, \qquad w > 0",
    "famo": r"u \propto \sum_i \frac{z_i}{\ell_i - b_i} g_i, \qquad z = \operatorname{softmax}(\xi), "
    r"\quad \xi \text{ learned so that all } \log \ell_i \text{ fall alike}",
    "gls": r"u = \nabla \Big(\prod_i \ell_i\Big)^{1/m}, \qquad w_i = \frac{(\prod_j \ell_j)^{1/m}}{m\, \ell_i}",
    "go4align": r"w_i = \text{mean over the group of } i \text{ of } \frac{\sum_j \ell_j}{\ell_i} p_i, "
    r"\qquad p \leftarrow \frac{p\, e^{-\eta \ell}}{\sum_j p_j e^{-\eta \ell_j}}",
    "graddrop": r"u = \sum_i \big(\mathbb 1[U < P]\, g_i^+ - \mathbb 1[U > P]\, g_i^-\big), \qquad "
    r"P = \tfrac12 \Big(1 + \frac{\sum_i g_i}{\sum_i |g_i|}\Big)",
    "gradnorm": r"\min_w \sum_i \Big| w_i \lVert g_i\rVert - \bar n\, r_i^{\alpha} \Big|, \qquad "
    r"r_i = \frac{\ell_i / \ell_{i0}}{\tfrac1m \sum_j \ell_j / \ell_{j0}}",
    "gradvac": r"g_i \leftarrow g_i + \frac{\lVert g_i\rVert \big(\varphi_{ij} \sqrt{1 - c_{ij}^2} - c_{ij} "
    r"\sqrt{1 - \varphi_{ij}^2}\big)}{\lVert g_j\rVert \sqrt{1 - \varphi_{ij}^2}}\, g_j \quad "
    r"\text{where } c_{ij} < \varphi_{ij}",
    "hypervolume_scalarization": r"\ell = -\Big(\min_i \frac{b_i - \ell_i}{u_i}\Big)^m, \qquad u = \frac{p}{\lVert p\rVert}",
    "imtl": r"w \text{ from imtl_g on the shared part, on losses scaled by } e^{s_i} \text{ as in imtl_l}".replace(
        "_", r"\_"
    ),
    "imtl_g": r"\Big\langle \frac{g_i}{\lVert g_i\rVert}, u\Big\rangle = \Big\langle \frac{g_j}{\lVert g_j\rVert}, u\Big\rangle "
    r"\text{ for all } i, j, \qquad \sum_i w_i = 1",
    "imtl_l": r"\min_s \sum_i e^{s_i} \ell_i - s_i, \qquad w_i = e^{s_i}",
    "krum": r"u = g_{i^*}, \qquad i^* = \arg\min_i \sum_{j \in N(i)} \lVert g_i - g_j\rVert^2, "
    r"\quad N(i) \text{ the } m - f - 2 \text{ nearest}",
    "ldc_mtl": r"\min_{W, x}\ \sum_i \big|\tau_i \tilde \ell_i - \tau_{i+1} \tilde \ell_{i+1}\big| + "
    r"\lambda \sum_i \sigma_i(W)\, \tilde \ell_i",
    "linear_scalarization": r"u = \sum_i w_i g_i, \qquad w_i = \tfrac1m \text{ by default}",
    "mgda": r"u = \sum_i w_i g_i, \quad w = \arg\min_{v \in \Delta} v^\top G v",
    "moco": r"y_i \leftarrow y_i - \beta_k (y_i - g_i), \quad \lambda \leftarrow "
    r"\Pi_\Delta\big(\lambda - \gamma_k (Y Y^\top + \rho I) \lambda\big), \quad u = Y^\top \lambda",
    "modo": r"w \leftarrow \Pi_\Delta\big(w - \gamma\, (G_{12} w + \rho w)\big), \qquad u = J_3^\top w",
    "nash_mtl": r"G w = 1 / w, \qquad w > 0",
    "pbi": r"\ell = d_1 + \theta\, d_2, \qquad d_1 = \frac{(\ell - z)^\top p}{\lVert p\rVert}, \quad "
    r"d_2 = \Big\lVert (\ell - z) - d_1 \frac{p}{\lVert p\rVert}\Big\rVert",
    "pcd": r"u = \arg\min_d \lVert d - s_1 g_1\rVert \quad \text{subject to} \quad \langle s_j g_j, d\rangle "
    r"\ge \tau \lVert s_j g_j\rVert^2 \ (j > 1)",
    "pcgrad": r"u = \sum_i v_i, \qquad v_i \leftarrow v_i - \frac{\min(0, \langle v_i, g_j\rangle)}{\lVert g_j\rVert^2}\, g_j "
    r"\text{ for } j \ne i \text{ in random order}, \quad v_i = g_i \text{ at first}",
    "pmgda": r"h = \Big\lVert \ell - \frac{\ell^\top p}{p^\top p}\, p\Big\rVert, \qquad u = \begin{cases} \arg\min_{w \in \Delta, \nu} "
    r"\lVert \sum_i w_i g_i + \nu\, \nabla h\rVert & h < \varepsilon \\ \arg\max_d \min_i \langle g_i, d\rangle "
    r"\ \text{ with } \langle \nabla h, d\rangle \ge \sigma \lVert \nabla h\rVert & \text{else} \end{cases}",
    "rgw": r"w = \operatorname{softmax}(\varepsilon), \qquad \varepsilon \sim \mathcal N(0, I_m)",
    "rlw": r"w = \operatorname{softmax}(\varepsilon), \qquad \varepsilon \sim \mathcal N(0, I_m)",
    "scale_invariant": r"u = \nabla \sum_i \log \ell_i, \qquad w_i = \frac{1}{\ell_i}",
    "scale_rows": r"w \text{ of the rule inside on } \frac{g_i}{\lVert g_i\rVert},\ \frac{g_i}{\ell_i} "
    r"\text{ or } \frac{g_i}{\ell_i \lVert g_i\rVert}",
    "sdmgrad": r"w \leftarrow \Pi_\Delta\big(w - \eta\, (G_{12} w + \lambda G_{12} p)\big), \qquad "
    r"u = \frac{J_3^\top w + \lambda J_3^\top p}{1 + \lambda}",
    "stch": r"u = \nabla\, \mu \log \sum_i \exp \frac{p_i (\ell_i - z_i)}{\mu}",
    "tchebycheff": r"\ell = \max_i\, p_i (\ell_i - z_i)",
    "trimmed_mean": r"u_n = \text{mean of } (g_{1n}, \dots, g_{mn}) \text{ without the } k \text{ largest and smallest}",
    "uncertainty_weighting": r"\min_s \sum_i a_i e^{-s_i} \ell_i + \tfrac12 s_i, \qquad w_i = a_i e^{-s_i}",
    "upgrad": r"u = \sum_i p_i\, \pi(g_i), \qquad \pi(g) = \arg\min_{d} \lVert d - g\rVert \ \text{ subject to } "
    r"\langle g_j, d\rangle \ge 0 \text{ for all } j",
}
