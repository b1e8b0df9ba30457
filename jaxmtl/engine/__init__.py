"""Jacobian descent without the Jacobian: the Gramian of any JAX function.

To read it: ``program`` says what a use of a parameter is, ``build`` and ``prune`` find the uses in
a jaxpr, ``execute`` runs the program and pulls cotangents back, ``views`` and ``factors`` say when
inner products need no gradient, ``scales`` takes learned scales out of matrices, ``bottlenecks``
and ``small`` follow what else small values do, ``primitives`` holds what is known of each family of
primitives, ``structure`` says what the gradients of some uses are made of, ``plan`` chooses among
the paths, ``per_example`` puts it together for one loss per example.
``per_task`` is the route for m losses over one batch, for which ``heads`` cuts the program into
stages, ``task_plan`` chooses and ``task_pass`` computes; ``encoder`` that through a representation,
``separate`` that for a batch per loss; ``route`` says what they have in common, ``routes`` chooses,
``api`` is what users see, and ``norms`` what they see of the Gramian's diagonal.
"""

from jaxmtl.engine.api import cross_gramian, explain, value_and_grad, value_and_gramian
from jaxmtl.engine.norms import GradientNoise, clipped_sum, gradient_noise, per_example_norms

__all__ = [
    "GradientNoise",
    "clipped_sum",
    "cross_gramian",
    "explain",
    "gradient_noise",
    "per_example_norms",
    "value_and_grad",
    "value_and_gramian",
]
