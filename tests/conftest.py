"""Shape checks for the whole package, one fake device (or eight, for tests of meshes), and the folder of real files."""

import gc
import os
import pathlib
import tempfile

from compile_options import FLAGS

# JAX fixes the number of devices when it starts. `make test` runs the tests of meshes separately, on eight.
DEVICES = int(os.environ.get("VLAB_TEST_DEVICES", "1"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={DEVICES}", *FLAGS]
)

# Runs of one config compile once in a test session, subprocesses included; pytest's workers inherit the folder of the
# process that starts them. A limit makes JAX lock it, which several processes at once need.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="vlab-jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(4 * 2**30)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

from jaxtyping import install_import_hook

install_import_hook("vlab_jax", "beartype.beartype")

import pytest

# Tracing makes millions of objects, and nearly all of them stay. With Python's defaults, the garbage collector scans
# them so often that it takes a seventh of a trace's time.
gc.freeze()
gc.set_threshold(100_000, 20, 20)


def pytest_collection_modifyitems(config, items):
    """Leaves out the tests that are for another number of devices."""
    kept, left = [], []
    for item in items:
        (kept if bool(item.get_closest_marker("eight_devices")) == (DEVICES == 8) else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(scope="session")
def assets() -> pathlib.Path:
    """The folder of real videos and official annotation files that `VLAB_TEST_ASSETS` names."""
    folder = os.environ.get("VLAB_TEST_ASSETS")
    if not folder:
        pytest.skip("VLAB_TEST_ASSETS is unset: no real files to test against")
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """`motion/tiny`, built once."""
    from vlab_jax.datasets import registry  # here, because the hook must be there first
    from vlab_jax.datasets.records import BuildOptions

    folder = str(tmp_path_factory.mktemp("data"))
    registry.prepare("motion/tiny", BuildOptions(folder))
    return folder
