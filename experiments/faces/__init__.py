"""Faces: CelebA's 40 attributes from one network by every method of LDC-MTL's table.

    python -m experiments.faces --smoke                 # made-up faces, in seconds
    python -m experiments.faces --data-dir DIR          # as in the paper; --resume goes on
    python -m experiments.faces --methods famo --learning-rate 3e-4 --no-schedule --data-dir DIR
    python -m experiments.faces --methods ldc_mtl --order 0 --data-dir DIR
    python -m experiments.faces --timing                # what a step costs; needs no data

``DIR`` is the publishers' tree (``Anno``, ``Eval``, ``Img/img_align_celeba``), or TFDS's folder,
which has ``celeb_a``; without it TFDS downloads. Images are resized to 64 x 64 once and mapped from
a file. Seven convolutions with BatchNorm and two dense layers are shared; each attribute has a
linear head. Adam with batches of 256, a rate of 0.001 that is multiplied by 0.3 after every third
epoch, 15 epochs; results are those of the epoch of the best mean F1 on the validation part.

A method by rows combines the gradients of the trunk, and every head gets its own; methods of the
losses alone take one weighted backward pass. UB forms take the gradients at the trunk's output,
GradNorm their norms at the last shared layer. ``--timing`` takes every rule of the library but
those that need two batches; with ``--resume`` only those that are not recorded yet. Running
averages of BatchNorm are state that no gradient reaches. delta_m is measured against networks of
one attribute each, ours where all 40 are recorded, which come last, and those of the paper's code.

CelebA has not been at hand: there is no result on faces yet. The times at 40 tasks are in
``results/faces/notes.md``.

**Reference**: Liu et al. 2015 (CelebA); Ban and Ji 2024 (FairGrad), whose set-up this is; Xiao et
al. 2025 (LDC-MTL), tables 2, 3, 4 and 10, figures 4 and 7.

**Differs from** their codes: the last batch of an epoch, which is not full, is left out; running
variances are those of the batch without Bessel's correction; PCGrad draws an order for each task,
and Nash-MTL is solved exactly.
"""
