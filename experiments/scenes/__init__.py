"""Scene understanding: NYUv2 and Cityscapes by every method of the papers' tables.

    python -m experiments.scenes --smoke                                  # made-up scenes
    python -m experiments.scenes.convert ARCHIVE DIR --size 96x128        # NYUv2 from an archive
    python -m experiments.scenes --data-dir DIR --size 96x128 --width 8 --batch-size 8 --epochs 10
    python -m experiments.scenes --data-dir DIR                           # as in the papers
    python -m experiments.scenes --data-dir DIR --network pspnet --weights resnet50.safetensors
    python -m experiments.scenes --dataset cityscapes2 --data-dir DIR --methods ldc_mtl_router
    python -m experiments.scenes --dataset cityscapes3 --network pspnet --data-dir DIR

``nyuv2`` (classes, depth, normals) and ``cityscapes2`` (classes, inverse depth) are MTAN's folders
of ``.npy``, ``cityscapes3`` (classes, offsets from the instance's center, disparity) is Cityscapes'
own tree. Networks are ``mtan`` (SegNet with an attention tower per task), ``segnet``,
``cross_stitch`` and ``pspnet`` (a dilated ResNet-50). Sizes, batches, epochs and rates are by
default the papers', which need an accelerator; ``--size``, ``--width`` and ``--levels`` make them
smaller. Adam's rate is 1e-4 but for LDC-MTL, whose authors take 8e-5 on NYUv2 and 3e-4 on
Cityscapes; ``--learning-rate`` is one for all methods. ``ldc_mtl_router`` is LDC-MTL as in its
paper, with a router that reads the features; ``ldc_mtl`` has logits of its own in place of the
router. ``--penalty`` (LDC-MTL's lambda) and ``--task-weights`` (of linear scalarization) make files
of their own, whose delta_m is against the single tasks of the others.
``--resume`` goes on with a run that was cut short, from the end of its last epoch. A step touches
much memory: on Linux, ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` asks for it in large pages, which
took a third off a gradient of ``mtan`` at width 8.

A method combines the gradients of everything but the heads (of PSPNet, the decoders), which get the
gradient of their own loss, or, by methods that take one backward pass, the weighted one. So do
Senushkin et al., with the attention of all tasks among the shared parameters. Running averages of
BatchNorm are state that no gradient reaches. Adam's rate is halved after half the epochs; for
Cityscapes with three tasks, where the paper states no schedule, it is multiplied by 0.7 after 42
epochs and every three from there on, as its authors' code has it. ``-UB`` forms take the gradients
at the features: on MTAN every loss reads a feature of its own, so that their Gramian is diagonal,
MGDA-UB and Aligned-MTL-UB weigh by norms alone, and GradDrop drops nothing. Single-task networks
are the same with one tower and one head.

Results are means over the last epochs (10, or a fifth of a shorter run) of the metrics on the held
out part: one confusion matrix for all of its pixels, errors and angles over all defined ones. After
each epoch the gradients of two batches give the condition number, norms and cosines of the rows, as
they are and as the method balances them. What was found: ``results/scenes/notes.md``.

**Reference**: Liu, Johns and Davison 2019 (MTAN); Misra et al. 2016 (Cross-Stitch); Zhao et al.
2017 (PSPNet); Senushkin et al. 2023, tables 1-4, figures 4 and 7; Fernando et al. 2023, tables 2,
3, 5 and 6; Xiao et al. 2025, tables 1, 2, 7, 8 and 9; Zhou et al. 2022 (CR-MOGM), table 3.

**Differs from** the authors' codes: PCGrad draws an order for each task, GradVac updates targets
at every pair, Nash-MTL is solved exactly, features do not train LDC-MTL's router (see
`jaxmtl.ldc_mtl`), running variances are those of the batch without Bessel's correction, and a
Cross-Stitch unit is a matrix that starts with 0.9 of a network's own feature. A class that occurs
nowhere leaves the mean IoU.
"""
