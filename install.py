"""Installs requirements.txt on a machine that brings its own JAX, and keeps that JAX fit for its accelerator.

    python install.py                what Colab's notebook runs, too (experiments/vlab_colab.ipynb)
    python install.py --dry-run      says what it would do

JAX reaches a GPU or TPU by a plugin, a package beside it whose version has to fit. `pip install -r requirements.txt`
knows nothing of plugins: where JAX is too old, it replaces JAX and leaves the plugin, and the GPU is gone. Here,

- a JAX that requirements.txt allows stays as it is, and so does its plugin;
- one that is too old, or newer than requirements.txt allows, is replaced together with its plugin (`jax[cuda12]`,
  `jax[tpu]`), by the newest that is allowed and that this Python can have (JAX 0.11 needs Python 3.12);
- where a GPU or TPU is in sight and no plugin is there, the one for it is installed.

Afterwards JAX has to find the accelerator, or the program ends with one line that says so. `JAX_PLATFORMS=cpu` asks for
the CPU. The file needs the standard library alone, since it runs before anything is installed.
"""

import argparse
import glob
import importlib.metadata
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

REQUIREMENTS = pathlib.Path(__file__).with_name("requirements.txt")

# The plugin packages of JAX, by the middle of their names (`jax-cuda12-plugin`, `jax-cuda12-pjrt`), and the extra of
# `jax` that brings each.
_EXTRAS = {"cuda12": "cuda12", "cuda13": "cuda13", "rocm7": "rocm7-local", "oneapi": "oneapi"}
_PLUGIN = re.compile(r"jax-(\w+)-(?:plugin|pjrt)")

# JAX's installation guide: its CUDA 13 needs this driver and this compute capability; older ones take CUDA 12.
_CUDA_13_DRIVER, _CUDA_13_CAPABILITY = 580.0, 7.5

_GOOGLE = "0x1ae0"  # PCI's number of the vendor of TPUs


def installed_packages() -> dict[str, str]:
    """The versions of JAX, jaxlib and all plugins that are installed, by the packages' names."""
    found = {}
    for package in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"] or "").lower()
        if name in ("jax", "jaxlib", "libtpu") or _PLUGIN.fullmatch(name):
            found[name] = package.version
    return found


def jax_requirement(requirements: str) -> str:
    """The line of a requirements file that is about JAX."""
    return next(line for line in requirements.splitlines() if re.match(r"jax[<>=]", line))


def allows(requirement: str, version: str) -> bool:
    """Whether a version is within the bounds (`>=`, `<`) of a requirement."""
    bounds = re.findall(r"(>=|<)([\d.]+)", requirement)
    own = _release(version)
    return all(own >= _release(bound) if sign == ">=" else own < _release(bound) for sign, bound in bounds)


def _release(version: str) -> tuple[int, ...]:
    """(0, 10, 2) for `0.10.2.dev1+cuda`, (0, 12, 0) for `0.12`."""
    numbers = [int(number) for number in re.match(r"[\d.]*", version).group().split(".") if number]
    return (*numbers, 0, 0, 0)[:3]


def plan(installed: Mapping[str, str], requirement: str, seen: str) -> tuple[list[str], str]:
    """What pip has to be asked for beside requirements.txt, and a sentence that says why.

    Args:
      installed: `installed_packages`.
      requirement: `jax_requirement`.
      seen: the extra of `jax` for the accelerator in sight (`accelerator`), or "".

    Raises:
      SystemExit: JAX must be replaced, and its plugin is one that cannot be replaced along with it.
    """
    plugins = {name: version for name, version in installed.items() if name not in ("jax", "jaxlib")}
    present = ", ".join(f"{name} {version}" for name, version in sorted(installed.items()))
    if plugins and allows(requirement, installed.get("jax", "0")) and _fit(plugins, installed.get("jaxlib", "")):
        return [f"{name}=={version}" for name, version in sorted(installed.items())], f"these stay: {present}"
    extras = {_extra(name) for name in plugins} or ({seen} if seen else set())
    if None in extras:
        raise SystemExit(
            f"{present}: VLAB-JAX needs {requirement}, and for this plugin install.py does not know how to replace "
            "both; do it as the plugin's makers say, then start install.py again"
        )
    if not extras:
        return [], f"no GPU or TPU in sight, and no plugin for one: {requirement} for the CPU"
    asked = f"jax[{','.join(sorted(extras))}]{requirement.removeprefix('jax')}"
    return [asked], f"{present or 'no JAX here'}: asking pip for {asked}, JAX and its plugin together"


def _extra(plugin: str) -> str | None:
    if plugin == "libtpu":
        return "tpu"
    return _EXTRAS.get(_PLUGIN.fullmatch(plugin).group(1))


def _fit(plugins: Mapping[str, str], jaxlib: str) -> bool:
    """Whether plugins are of the version of jaxlib; libtpu has versions of its own."""
    return all(_release(version) == _release(jaxlib) for name, version in plugins.items() if name != "libtpu")


def accelerator(nvidia_smi: str, tpu: bool) -> str:
    """The extra of `jax` for what is in sight: `tpu`, `cuda13`, `cuda12`, or "" where nothing is.

    Args:
      nvidia_smi: a line for each GPU, of its driver's version and its compute capability: `580.65.06, 9.0`.
      tpu: whether a TPU is there.
    """
    if tpu:
        return "tpu"
    gpus = re.findall(r"^(\d+)[\d.]*, (\d+\.\d+)$", nvidia_smi, re.MULTILINE)
    if not gpus:
        return ""
    newest = all(float(driver) >= _CUDA_13_DRIVER and float(has) >= _CUDA_13_CAPABILITY for driver, has in gpus)
    return "cuda13" if newest else "cuda12"


def _accelerator_in_sight() -> str:
    """`accelerator` of this machine; "" where `JAX_PLATFORMS` asks for the CPU."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        listed = ""
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    vendors = (pathlib.Path(path).read_text().strip() for path in glob.glob("/sys/bus/pci/devices/*/vendor"))
    return accelerator(listed, tpu="TPU_ACCELERATOR_TYPE" in os.environ or (bool(devices) and _GOOGLE in vendors))


def lost(seen: str, platform: str) -> str:
    """One line if JAX does not find the accelerator that is in sight, else "".

    Args:
      seen: `accelerator`.
      platform: that JAX computes on (`cpu`, `gpu`, `tpu`), or what it said instead of one.
    """
    if not seen or platform in ("gpu", "tpu"):
        return ""
    kind = "TPU" if seen == "tpu" else "GPU"
    found = "finds the CPU alone" if platform == "cpu" else f"does not start ({platform})"
    return (
        f'this machine has a {kind}, but its JAX {found}: pip install "jax[{seen}]" (docs.jax.dev, Installation), then '
        "start anew; or set JAX_PLATFORMS=cpu to compute on the CPU"
    )


def _platform() -> str:
    """What JAX computes on. A process of its own says so, unless this one has JAX already, and so the accelerator."""
    if "jax" in sys.modules:
        return sys.modules["jax"].default_backend()
    program = "import jax; print(jax.default_backend())"
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return lines[-1] if lines else f"it ends with status {done.returncode}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Installs, and looks for the accelerator.

    Raises:
      SystemExit: with one line: what failed, and what to do.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="pip shows warnings and errors alone")
    parser.add_argument("--dry-run", action="store_true", help="say what would be installed, and stop")
    given = parser.parse_args(arguments)
    before, seen = installed_packages(), _accelerator_in_sight()
    asked, why = plan(before, jax_requirement(REQUIREMENTS.read_text()), seen)
    command = [sys.executable, "-m", "pip", "install", *["--quiet"] * given.quiet, *asked, "-r", str(REQUIREMENTS)]
    print(why)
    if given.dry_run:
        print(shlex.join(command))
        return
    if subprocess.run(command).returncode:
        raise SystemExit("pip could not install all of it, and says above why; nothing more was tried")
    if "jax" in sys.modules and installed_packages() != before:
        raise SystemExit("JAX was in use while it was replaced: restart the session (or kernel), and begin again")
    if line := lost(seen, _platform() if seen else ""):
        raise SystemExit(line)


if __name__ == "__main__":
    main()
