"""Real multi-task tables: every rule of the library beside tuned scalarization and single tasks.

    python -m experiments.tabular                  # downloads from OpenML by scikit-learn
    python -m experiments.tabular --data-dir DIR   # reads the folder of ``tabular.data``

**Yeast** has 14 labels of 1,500 genes; a network of two shared layers of 32 and linear towers.
**Census-Income** has 199,523 rows and two labels, an income above 50,000 and never having married;
a shared bottom of 32 units, or 8 experts of 4 with a gate per task, and towers of 8. A rule
combines the gradients of the shared parameters; those of one task get their own gradient, or, by
rules that take one backward pass, the weighted one. Adam follows, with batches of 100 and 1,024.

``--datasets sarcos``, ``rf1`` and ``water_quality`` are regressions with 7, 8 and 14 targets on two
shared layers of 64, measured by the relative root mean squared error; they need ``--data-dir``.
Of SARCOS the published test part of 4,449 rows is split anew; of RF1 the 120 rows with missing
values are dropped.

The learning rate (Yeast: 0.003 or 0.01) and the number of epochs (Yeast: up to 24) are those of the
best validation mean of the areas under the curve, for every method alike; so are the weights of the
tuned scalarization. Rules run with their defaults and are not tuned further: one that loses here
might do better with parameters of its own. Census-Income gets one pass at one learning rate. Seeds
differ in initial parameters and minibatches, which all methods share. *Cost* is CPU time per step
beside that of equal weights, on a machine with much else to do. What was found:
``results/tabular/notes.md``.

**Reference**: Ma et al. 2018 (MMoE), section 6; Kurin et al. 2022 ("In defense of the unitary
scalarization"); Xin et al. 2022 ("Do current multi-task optimization methods even help?").

**Differs from** Ma et al.: one pass in place of a search over networks and learning rates, so their
areas under the curve are not set beside these. Education stays among the inputs. ``sdmgrad`` and
``modo`` take the cross-Gramian from the halves of the next minibatch, and the step from the whole
of the current one: the batches are independent and the data per step are those of the other rules.
"""
