"""Multi-task and multi-objective training in JAX: the way optax is for optimizers."""

from jaxmtl import fronts, metrics, solvers
from jaxmtl.aggregators.db_mtl import db_mtl
from jaxmtl.aggregators.excess_mtl import excess_mtl
from jaxmtl.aggregators.graddrop import graddrop
from jaxmtl.aggregators.moco import moco
from jaxmtl.aggregators.trimmed_mean import trimmed_mean
from jaxmtl.balancing.dwa import dwa
from jaxmtl.balancing.famo import famo
from jaxmtl.balancing.go4align import go4align
from jaxmtl.balancing.gradnorm import gradnorm
from jaxmtl.balancing.imtl import imtl
from jaxmtl.balancing.ldc_mtl import ldc_mtl
from jaxmtl.balancing.learned_scale import imtl_l, uncertainty_weighting
from jaxmtl.balancing.rlw import rlw
from jaxmtl.balancing.scale_invariant import gls, scale_invariant
from jaxmtl.balancing.stch import stch
from jaxmtl.base import Aggregator, Weighting, apply_updates, from_weighting
from jaxmtl.combinators import cr_mogm, every_k, scale_rows
from jaxmtl.engine import cross_gramian, explain, value_and_grad, value_and_gramian
from jaxmtl.gauss_newton import gauss_newton
from jaxmtl.jacobian import value_and_jacobian
from jaxmtl.linalg import combine, gramian
from jaxmtl.nested import hypergradient
from jaxmtl.transforms.clip_rows import clip_rows
from jaxmtl.transforms.multi_steps import multi_steps
from jaxmtl.transforms.track_gradients import track_gradients
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
from jaxmtl.weightings.modo import modo
from jaxmtl.weightings.pcgrad import pcgrad
from jaxmtl.weightings.sdmgrad import sdmgrad

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
    "cross_gramian",
    "db_mtl",
    "dual_proj",
    "dwa",
    "every_k",
    "excess_mtl",
    "explain",
    "fairgrad",
    "famo",
    "from_weighting",
    "fronts",
    "gauss_newton",
    "gls",
    "go4align",
    "graddrop",
    "gradnorm",
    "gradvac",
    "gramian",
    "hypergradient",
    "imtl",
    "imtl_g",
    "imtl_l",
    "krum",
    "ldc_mtl",
    "linear_scalarization",
    "metrics",
    "mgda",
    "moco",
    "modo",
    "multi_steps",
    "nash_mtl",
    "pcgrad",
    "rgw",
    "rlw",
    "scale_invariant",
    "scale_rows",
    "sdmgrad",
    "solvers",
    "stch",
    "track_gradients",
    "trimmed_mean",
    "uncertainty_weighting",
    "upgrad",
    "value_and_grad",
    "value_and_gramian",
    "value_and_jacobian",
]
