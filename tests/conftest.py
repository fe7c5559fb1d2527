"""Shared by all tests: one random seed per run, weights carried from PyTorch, the parity measure."""

import gc
import os
import secrets
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported: the tolerances are those of fp32 on a CPU
# The networks are tiny and their programs many: half the time in the compiler, the same arithmetic. What users compile
# is run by tests/test_unchanged.py, tests/test_newest.py and the first picture of .ci/run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("BDM_JAX_DTYPE", "float32")  # also in the commands that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub but its own

import jax  # noqa: E402
import numpy as np
import pytest
import torch
from jax.experimental.compilation_cache import compilation_cache

from bdm_jax.runtime import programs

pytest_plugins = ["bridge", "sdxl", "sources", "hub"]  # two tiny systems; records of every format; a hub

_CACHE = pytest.StashKey[str]()  # compiled programs of this run's commands: what a user has kept plays no part
PARITY = 1e-4  # fp32 on both sides: what remains is the order of summation, measured at 1e-6 to 1e-5


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="seed of all random weights and inputs (default: fresh)")


def pytest_configure(config):
    if config.option.seed is None:
        config.option.seed = secrets.randbelow(2**31)
    if not hasattr(config, "workerinput"):  # xdist's workers and all commands that tests start inherit it
        config.stash[_CACHE] = os.environ["BDM_JAX_CACHE"] = tempfile.mkdtemp(prefix="bdm_jax-programs-")
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_grad_enabled(False)


def pytest_unconfigure(config):
    if _CACHE in config.stash:
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


def pytest_report_header(config):
    return f"random seed: {config.option.seed} (repeat with --seed {config.option.seed})"


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs go with the module that made them: thousands of them use up the maps that the kernel grants a
    process (65,530), and the compiler then dies of a segmentation fault. A command that was called as a function has
    switched JAX's cache on; it is off again, as programs that come from there cannot be kept once more.
    """
    yield
    programs.keep(None)
    if jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def seed(request):
    """The run's seed; pytest shows the printed line with every failure."""
    print(f"--seed {request.config.option.seed}")
    return request.config.option.seed


@pytest.fixture
def rng(seed):
    """A NumPy generator made from the run's seed."""
    return np.random.default_rng(seed)


@pytest.fixture
def randomised(seed):
    """A function that fills every parameter of a torch module, whatever it started as, and returns it."""

    def fill(module):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                noise /= parameter[0].numel() ** 0.5
            elif name.endswith("weight"):
                noise = 1 + 0.2 * noise
            else:
                noise = 0.2 * noise
            parameter.copy_(noise)
        return module.eval()

    return fill


@pytest.fixture
def torch_params():
    """A function from a torch module and our config to our parameters, by way of convert/.

    Keys that begin with `drop` are left out; `prefix` is put before keys that lack it (transformers 5 names the CLIP
    text tower's parameters without the `text_model.` that every file carries).
    """
    from bdm_jax.formats.detect import table_for
    from bdm_jax.formats.layouts import tree_from_torch
    from bdm_jax.models import functional
    from bdm_jax.models.config import Config, to_json

    def carry(module, config, *, drop="\0", prefix=""):
        tensors = {
            name if name.startswith(prefix) else prefix + name: tensor.numpy()
            for name, tensor in module.state_dict().items()
            if not name.startswith(drop) and not name.endswith(("position_ids", "token_type_ids"))
        }
        table = table_for(to_json(config) if isinstance(config, Config) else {})
        return tree_from_torch(tensors, functional.abstract(config), type(module).__name__, table)

    return carry


@pytest.fixture
def assert_parity():
    """A function that asserts max |ours - reference| <= PARITY x max |reference|, shapes equal, all finite."""

    def check(ours, reference, tolerance=PARITY):
        ours, reference = np.asarray(ours), np.asarray(reference)
        assert ours.shape == reference.shape
        assert np.isfinite(ours).all()
        difference = np.abs(ours - reference).max() / np.abs(reference).max()
        print(f"relative difference {difference:.2e}")
        assert difference <= tolerance

    return check


@pytest.fixture
def nhwc():
    """A function from a torch NCHW tensor to an NHWC array."""
    return lambda tensor: tensor.permute(0, 2, 3, 1).numpy()


@pytest.fixture
def nchw():
    """A function from an NHWC array to a torch NCHW tensor."""
    return lambda array: torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))
