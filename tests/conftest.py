import gc
import os

import jax
import pytest

# The tests compile much and compute little: these flags take a sixth of the compile time. Where
# XLA_FLAGS is set, to nothing for instance, they run with the compiler's own defaults.
_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_llvm_disable_expensive_passes=true"
)
if jax.__version_info__ < (0, 11):  # later compilers end the process at a flag that is gone
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)

# Where in the sources an operation stands is written into every program: a tenth of compilation.
jax.config.update("jax_include_full_tracebacks_in_locations", False)

# Traced programs are many small objects that live long: to look through them again and again for
# cycles takes a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 50, 100)


@pytest.fixture
def x64():
    """Runs a test in float64; never a global switch."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float64", "float32"])
def precision(request):
    """Runs a test in float64 and in float32."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def pytest_collection_modifyitems(items):
    """Keeps the tests of one method on one worker, where they share compiled functions."""
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")
        if name:
            item.add_marker(pytest.mark.xdist_group(name))
