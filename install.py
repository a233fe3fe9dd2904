"""Installs requirements.txt and keeps the JAX of a machine with a GPU or TPU working with its accelerator.

    python install.py                the notebook for Colab runs this, too (experiments/vlab_colab.ipynb)
    python install.py --dry-run      only says what it would do

JAX reaches a GPU or TPU through a plugin, a separate package whose version must match. `pip install -r
requirements.txt` ignores plugins: it replaces a JAX that is too old and leaves its plugin, which then does not work.
This program

- keeps a JAX that requirements.txt allows, and its plugin;
- replaces one that is too old or too new, and its plugin (`jax[cuda12]`, `jax[tpu]`), by the newest version that
  requirements.txt and this Python allow (JAX 0.11 needs Python 3.12);
- installs the plugin for a GPU or TPU that has none.

If JAX does not find the accelerator afterwards, the program ends with one line that says so. `JAX_PLATFORMS=cpu` makes
it install for the CPU. It uses only the standard library, since it runs before anything is installed.
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

# The middle of the names of JAX's plugin packages (`jax-cuda12-plugin`, `jax-cuda12-pjrt`): the extra of `jax` that
# installs them.
_EXTRAS = {"cuda12": "cuda12", "cuda13": "cuda13", "rocm7": "rocm7-local", "oneapi": "oneapi"}
_PLUGIN = re.compile(r"jax-(\w+)-(?:plugin|pjrt)")

# From JAX's installation guide: CUDA 13 needs this driver and this compute capability; older GPUs use CUDA 12.
_CUDA_13_DRIVER, _CUDA_13_CAPABILITY = 580.0, 7.5

_GOOGLE = "0x1ae0"  # the PCI vendor of TPUs


def installed_packages() -> dict[str, str]:
    """The installed versions of JAX, jaxlib and all plugins, by package name."""
    found = {}
    for package in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"] or "").lower()
        if name in ("jax", "jaxlib", "libtpu") or _PLUGIN.fullmatch(name):
            found[name] = package.version
    return found


def jax_requirement(requirements: str) -> str:
    """The line for JAX in a requirements file."""
    return next(line for line in requirements.splitlines() if re.match(r"jax[<>=]", line))


def allows(requirement: str, version: str) -> bool:
    """Whether a version satisfies the bounds (`>=`, `<`) of a requirement."""
    bounds = re.findall(r"(>=|<)([\d.]+)", requirement)
    release = _release(version)
    return all(release >= _release(bound) if sign == ">=" else release < _release(bound) for sign, bound in bounds)


def _release(version: str) -> tuple[int, ...]:
    """(0, 10, 2) for `0.10.2.dev1+cuda`, (0, 12, 0) for `0.12`."""
    numbers = [int(number) for number in re.match(r"[\d.]*", version).group().split(".") if number]
    return (*numbers, 0, 0, 0)[:3]


def plan(installed: Mapping[str, str], requirement: str, detected: str) -> tuple[list[str], str]:
    """The requirements for pip besides requirements.txt, and a sentence that says why.

    Args:
      installed: `installed_packages`.
      requirement: `jax_requirement`.
      detected: the extra of `jax` for this machine's accelerator (`accelerator`), or "".

    Raises:
      SystemExit: JAX must be replaced, and the extra that installs its plugin is unknown.
    """
    plugins = {name: version for name, version in installed.items() if name not in ("jax", "jaxlib")}
    present = ", ".join(f"{name} {version}" for name, version in sorted(installed.items()))
    if plugins and allows(requirement, installed.get("jax", "0")) and _match(plugins, installed.get("jaxlib", "")):
        return [f"{name}=={version}" for name, version in sorted(installed.items())], f"kept: {present}"
    extras = {_extra(name) for name in plugins} or ({detected} if detected else set())
    if None in extras:
        raise SystemExit(
            f"{present}: VLAB-JAX needs {requirement}, and install.py cannot replace this plugin together with JAX; "
            "replace both as the plugin's makers say, then start install.py again"
        )
    if not extras:
        return [], f"found no GPU or TPU, and no plugin for one: {requirement} for the CPU"
    with_plugin = f"jax[{','.join(sorted(extras))}]{requirement.removeprefix('jax')}"
    return [with_plugin], f"found {present or 'no JAX'}: pip will install {with_plugin}, JAX and its plugin together"


def _extra(plugin: str) -> str | None:
    if plugin == "libtpu":
        return "tpu"
    return _EXTRAS.get(_PLUGIN.fullmatch(plugin).group(1))


def _match(plugins: Mapping[str, str], jaxlib: str) -> bool:
    """Whether the plugins have the version of jaxlib; libtpu's versions are its own."""
    return all(_release(version) == _release(jaxlib) for name, version in plugins.items() if name != "libtpu")


def accelerator(nvidia_smi: str, tpu: bool) -> str:
    """The extra of `jax` for an accelerator: `tpu`, `cuda13`, `cuda12`, or "" if there is none.

    Args:
      nvidia_smi: for each GPU a line with its driver's version and its compute capability: `580.65.06, 9.0`.
      tpu: whether the machine has a TPU.
    """
    if tpu:
        return "tpu"
    gpus = re.findall(r"^(\d+)[\d.]*, (\d+\.\d+)$", nvidia_smi, re.MULTILINE)
    if not gpus:
        return ""
    newest = all(
        float(driver) >= _CUDA_13_DRIVER and float(capability) >= _CUDA_13_CAPABILITY for driver, capability in gpus
    )
    return "cuda13" if newest else "cuda12"


def _detect_accelerator() -> str:
    """`accelerator` for this machine; "" if `JAX_PLATFORMS` selects the CPU."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        gpus = ""
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    vendors = (pathlib.Path(path).read_text().strip() for path in glob.glob("/sys/bus/pci/devices/*/vendor"))
    return accelerator(gpus, tpu="TPU_ACCELERATOR_TYPE" in os.environ or (bool(devices) and _GOOGLE in vendors))


def missing_accelerator(detected: str, platform: str) -> str:
    """One line if JAX does not find the machine's accelerator, else "".

    Args:
      detected: the result of `accelerator`.
      platform: on which JAX computes (`cpu`, `gpu`, `tpu`), or the error that it ended with.
    """
    if not detected or platform in ("gpu", "tpu"):
        return ""
    kind = "TPU" if detected == "tpu" else "GPU"
    found = "finds only the CPU" if platform == "cpu" else f"does not start ({platform})"
    return (
        f'this machine has a {kind}, but its JAX {found}: pip install "jax[{detected}]" (docs.jax.dev, Installation), '
        "then start again; or set JAX_PLATFORMS=cpu to compute on the CPU"
    )


def _platform() -> str:
    """The platform of JAX: a new process finds it, unless this one uses JAX, and so the accelerator, already."""
    if "jax" in sys.modules:
        return sys.modules["jax"].default_backend()
    program = "import jax; print(jax.default_backend())"
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    lines = (ended.stderr if ended.returncode else ended.stdout).strip().splitlines()
    return lines[-1] if lines else f"it ends with status {ended.returncode}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Installs, then checks that JAX finds the accelerator.

    Raises:
      SystemExit: with one line that says what failed and what to do.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="pip prints only warnings and errors")
    parser.add_argument("--dry-run", action="store_true", help="say what would be installed, and stop")
    options = parser.parse_args(arguments)
    before, detected = installed_packages(), _detect_accelerator()
    requirements, why = plan(before, jax_requirement(REQUIREMENTS.read_text()), detected)
    command = [sys.executable, "-m", "pip", "install", *["--quiet"] * options.quiet, *requirements]
    command += ["-r", str(REQUIREMENTS)]
    print(why)
    if options.dry_run:
        print(shlex.join(command))
        return
    if subprocess.run(command).returncode:
        raise SystemExit("pip could not install everything, and says why above; nothing else was tried")
    if "jax" in sys.modules and installed_packages() != before:
        raise SystemExit(
            "JAX was replaced while this process used it: restart the session (or kernel), and start again"
        )
    if line := missing_accelerator(detected, _platform() if detected else ""):
        raise SystemExit(line)


if __name__ == "__main__":
    main()
