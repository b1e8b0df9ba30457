"""Molecules: eleven properties of a molecule from one network, by every method.

    python -m experiments.molecules --data-dir DIR                  # 10,000 molecules, RI-MP2
    python -m experiments.molecules --datasets qm9 --data-dir DIR   # QM9 as the papers have it

The network passes messages along all pairs of atoms, by an edge network and a GRU, pools the atoms
by Set2Set and has a linear head per property. A method combines the gradients of the shared part,
and every head gets its own; rules of the losses alone, and GradNorm, which looks at the last shared
layer, take one weighted backward pass. A training goes on after its last epoch under ``--resume``,
from ``OUT/molecules/checkpoints``. Adam, batch 120, the learning rate times 0.7 where delta_m on
the validation molecules has not fallen for more than 5 epochs; results are those of the epoch of
the best one. delta_m is measured against networks of one property each, which are trained first,
one after the other, by the same recipe.

The first set has 10,000 of QM9's molecules with properties by another calculation, which can be run
in hours on a CPU: width 32, 20 epochs. ``qm9`` is the benchmark of the papers, width 64 and 300
epochs, from MoleculeNet's ``gdb9.sdf``, figshare's xyz files or TFDS; it has not been run yet.
Where cores are few or busy, ``XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`` spares them threads
that wait. What was found: ``results/molecules/notes.md``.

**Reference**: Navon et al. 2022 (Nash-MTL), section 6.3; Xiao et al. 2025 (LDC-MTL), table 6 and
figure 5c; Gilmer et al. 2017 (the network).

**Differs from** their code: standardization by the training part alone; a minibatch has as many
molecules of each quarter by size, so that little is padded; single tasks are our own, not those of
another network; the molecules that QM9 marks as uncharacterized are left out by their numbers (old
versions of PyTorch Geometric were off by one). The edge network has twice the width at any width.
The bonds of xyz files and of the 10,000 molecules are guessed from distances.
"""
