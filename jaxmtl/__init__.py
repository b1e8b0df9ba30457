"""Multi-task and multi-objective training in JAX: the way optax is for optimizers."""

from jaxmtl import fronts, metrics, rewards, solvers
from jaxmtl.base import from_rows, from_weighting
from jaxmtl.combinators import cr_mogm, every_k, scale_rows
from jaxmtl.engine import (
    GradientNoise,
    clipped_sum,
    cross_gramian,
    explain,
    gradient_noise,
    per_example_norms,
    value_and_grad,
    value_and_gramian,
)
from jaxmtl.gauss_newton import gauss_newton
from jaxmtl.jacobian import value_and_jacobian
from jaxmtl.linalg import combine, gramian
from jaxmtl.loop import apply_updates, check, frozen, monitor
from jaxmtl.names import named
from jaxmtl.nested import hypergradient
from jaxmtl.registry import make, methods
from jaxmtl.rules.aligned_mtl import aligned_mtl
from jaxmtl.rules.bargaining import fairgrad, nash_mtl
from jaxmtl.rules.bloop import bloop
from jaxmtl.rules.cagrad import cagrad
from jaxmtl.rules.config import config
from jaxmtl.rules.conic_grad import conic_grad
from jaxmtl.rules.cosmos import cosmos
from jaxmtl.rules.db_mtl import db_mtl
from jaxmtl.rules.dcgd import dcgd
from jaxmtl.rules.dibs_mtl import dibs_mtl
from jaxmtl.rules.dual_cone import dual_proj, upgrad
from jaxmtl.rules.dwa import dwa
from jaxmtl.rules.epo import epo
from jaxmtl.rules.excess_mtl import excess_mtl
from jaxmtl.rules.famo import famo
from jaxmtl.rules.fixed import linear_scalarization, rgw
from jaxmtl.rules.go4align import go4align
from jaxmtl.rules.graddrop import graddrop
from jaxmtl.rules.gradnorm import gradnorm
from jaxmtl.rules.gradvac import gradvac
from jaxmtl.rules.hypervolume_scalarization import hypervolume_scalarization
from jaxmtl.rules.imtl import imtl
from jaxmtl.rules.imtl_g import imtl_g
from jaxmtl.rules.krum import krum
from jaxmtl.rules.ldc_mtl import descend_lower, ldc_mtl
from jaxmtl.rules.learned_scale import imtl_l, uncertainty_weighting
from jaxmtl.rules.mgda import mgda
from jaxmtl.rules.moco import moco
from jaxmtl.rules.modo import modo
from jaxmtl.rules.pbi import pbi
from jaxmtl.rules.pcd import pcd
from jaxmtl.rules.pcgrad import pcgrad
from jaxmtl.rules.pmgda import pmgda
from jaxmtl.rules.rlw import rlw
from jaxmtl.rules.scale_invariant import gls, scale_invariant
from jaxmtl.rules.sdmgrad import sdmgrad
from jaxmtl.rules.stch import stch
from jaxmtl.rules.tchebycheff import tchebycheff
from jaxmtl.rules.trimmed_mean import trimmed_mean
from jaxmtl.transforms.clip_rows import clip_rows
from jaxmtl.transforms.multi_steps import multi_steps
from jaxmtl.transforms.track_gradients import track_gradients
from jaxmtl.types import Aggregator, Weighting

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "GradientNoise",
    "Weighting",
    "aligned_mtl",
    "apply_updates",
    "bloop",
    "cagrad",
    "check",
    "clip_rows",
    "clipped_sum",
    "combine",
    "config",
    "conic_grad",
    "cosmos",
    "cr_mogm",
    "cross_gramian",
    "db_mtl",
    "dcgd",
    "descend_lower",
    "dibs_mtl",
    "dual_proj",
    "dwa",
    "epo",
    "every_k",
    "excess_mtl",
    "explain",
    "fairgrad",
    "famo",
    "from_rows",
    "from_weighting",
    "fronts",
    "frozen",
    "gauss_newton",
    "gls",
    "go4align",
    "graddrop",
    "gradient_noise",
    "gradnorm",
    "gradvac",
    "gramian",
    "hypergradient",
    "hypervolume_scalarization",
    "imtl",
    "imtl_g",
    "imtl_l",
    "krum",
    "ldc_mtl",
    "linear_scalarization",
    "make",
    "methods",
    "metrics",
    "mgda",
    "moco",
    "modo",
    "monitor",
    "multi_steps",
    "named",
    "nash_mtl",
    "pbi",
    "pcd",
    "pcgrad",
    "per_example_norms",
    "pmgda",
    "rewards",
    "rgw",
    "rlw",
    "scale_invariant",
    "scale_rows",
    "sdmgrad",
    "solvers",
    "stch",
    "tchebycheff",
    "track_gradients",
    "trimmed_mean",
    "uncertainty_weighting",
    "upgrad",
    "value_and_grad",
    "value_and_gramian",
    "value_and_jacobian",
]
