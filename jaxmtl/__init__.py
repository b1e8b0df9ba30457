"""Multi-task and multi-objective training in JAX: the way optax is for optimizers."""

from jaxmtl import solvers
from jaxmtl.aggregators.graddrop import graddrop
from jaxmtl.aggregators.trimmed_mean import trimmed_mean
from jaxmtl.base import Aggregator, Weighting, apply_updates, from_weighting
from jaxmtl.combinators import cr_mogm, every_k, scale_rows
from jaxmtl.jacobian import value_and_jacobian
from jaxmtl.linalg import combine, gramian
from jaxmtl.transforms.clip_rows import clip_rows
from jaxmtl.weightings.aligned_mtl import aligned_mtl
from jaxmtl.weightings.bargaining import fairgrad, nash_mtl
from jaxmtl.weightings.cagrad import cagrad
from jaxmtl.weightings.config import config
from jaxmtl.weightings.dual_cone import dual_proj, upgrad
from jaxmtl.weightings.fixed import linear_scalarization, rgw
from jaxmtl.weightings.gradvac import gradvac
from jaxmtl.weightings.imtl_g import imtl_g
from jaxmtl.weightings.krum import krum
from jaxmtl.weightings.mgda import mgda
from jaxmtl.weightings.pcgrad import pcgrad

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "Weighting",
    "aligned_mtl",
    "apply_updates",
    "cagrad",
    "clip_rows",
    "combine",
    "config",
    "cr_mogm",
    "dual_proj",
    "every_k",
    "fairgrad",
    "from_weighting",
    "graddrop",
    "gradvac",
    "gramian",
    "imtl_g",
    "krum",
    "linear_scalarization",
    "mgda",
    "nash_mtl",
    "pcgrad",
    "rgw",
    "scale_rows",
    "solvers",
    "trimmed_mean",
    "upgrad",
    "value_and_jacobian",
]
