"""`install.py`: which JAX pip installs on a machine, and the line when JAX does not find the accelerator."""

import os
import pathlib
import subprocess
import sys
import types

import pytest

import install

ROOT = pathlib.Path(__file__).parents[1]
REQUIREMENT = "jax>=0.10.2,<0.13"


def with_plugin(name: str, version: str, plugin: str = "") -> dict[str, str]:
    """Installed packages: JAX and jaxlib of a version, and a plugin of the same or another one."""
    return {"jax": version, "jaxlib": version, name: plugin or version}


def requirements(installed: dict[str, str], detected: str = "") -> list[str]:
    return install.plan(installed, REQUIREMENT, detected)[0]


@pytest.mark.parametrize("version", ["0.10.2", "0.11.1", "0.12.0.1", "0.11.2.dev20260701+cuda"])
def test_a_jax_that_is_allowed_is_kept_with_its_plugin(version):
    installed = with_plugin("jax-cuda12-plugin", version) | {"jax-cuda12-pjrt": version}
    assert (
        requirements(installed)
        == requirements(installed, detected="cuda13")
        == [f"{name}=={version}" for name in sorted(installed)]
    )
    assert "libtpu==0.0.48" in requirements(with_plugin("libtpu", version, plugin="0.0.48"))


@pytest.mark.parametrize("version", ["0.7.2", "0.10.1", "0.13.0", "0.13.0.1"])
def test_a_jax_that_is_too_old_or_too_new_is_replaced_together_with_its_plugin(version):
    assert requirements(with_plugin("jax-cuda12-plugin", version)) == ["jax[cuda12]>=0.10.2,<0.13"]
    assert requirements(with_plugin("jax-cuda13-pjrt", version)) == ["jax[cuda13]>=0.10.2,<0.13"]
    assert requirements(with_plugin("libtpu", version, plugin="0.0.17")) == ["jax[tpu]>=0.10.2,<0.13"]
    assert requirements(with_plugin("jax-rocm7-plugin", version)) == ["jax[rocm7-local]>=0.10.2,<0.13"]


def test_a_plugin_that_does_not_fit_its_jax_is_replaced():
    assert requirements(with_plugin("jax-cuda12-plugin", "0.10.2", plugin="0.7.2")) == ["jax[cuda12]>=0.10.2,<0.13"]


def test_a_machine_without_plugin_gets_the_one_for_its_accelerator():
    assert (
        requirements({}, detected="tpu")
        == requirements({"jax": "0.10.2", "jaxlib": "0.10.2"}, detected="tpu")
        == ["jax[tpu]>=0.10.2,<0.13"]
    )
    assert requirements({}) == requirements({"jax": "0.7.2", "jaxlib": "0.7.2"}) == []


def test_a_plugin_that_nobody_here_can_replace_ends_with_one_line():
    assert requirements(with_plugin("jax-other-plugin", "0.10.2")) == [
        "jax==0.10.2",
        "jax-other-plugin==0.10.2",
        "jaxlib==0.10.2",
    ]
    with pytest.raises(SystemExit, match=r"^jax 0\.7\.2, jax-other-plugin 0\.7\.2.*makers.*$"):
        requirements(with_plugin("jax-other-plugin", "0.7.2"))


@pytest.mark.parametrize(
    ("nvidia_smi", "extra"),
    [
        ("580.65.06, 9.0\n580.65.06, 9.0\n", "cuda13"),
        ("550.54.15, 7.5\n", "cuda12"),
        ("580.65.06, 7.0\n", "cuda12"),  # a V100, which CUDA 13 has no code for
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", ""),
        ("No devices were found\n", ""),
        ("", ""),
    ],
)
def test_the_plugin_for_a_gpu_follows_its_driver(nvidia_smi, extra):
    assert install.accelerator(nvidia_smi, tpu=False) == extra
    assert install.accelerator(nvidia_smi, tpu=True) == "tpu"


def test_an_accelerator_that_jax_does_not_find_is_one_line():
    assert (
        install.missing_accelerator("", "cpu")
        == install.missing_accelerator("tpu", "tpu")
        == install.missing_accelerator("cuda12", "gpu")
        == ""
    )
    line = install.missing_accelerator("cuda12", "cpu")
    assert 'a GPU, but its JAX finds only the CPU: pip install "jax[cuda12]"' in line and "\n" not in line
    assert "a TPU, but its JAX does not start (RuntimeError: busy)" in install.missing_accelerator(
        "tpu", "RuntimeError: busy"
    )


def test_the_bounds_are_those_of_the_requirements():
    found = install.jax_requirement((ROOT / "requirements.txt").read_text())
    assert install.allows(found, "0.10.2") and not install.allows(found, "0.10.1") and not install.allows(found, "1.0")


def test_what_is_installed_is_read_from_the_packages_metadata(tmp_path, monkeypatch):
    for name, version in (("jax", "0.7.2"), ("jax_cuda12_plugin", "0.7.2"), ("jaxtyping", "0.3"), ("libtpu", "0.0.1")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert install.installed_packages() == {"jax": "0.7.2", "jax-cuda12-plugin": "0.7.2", "libtpu": "0.0.1"}


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU and an old JAX: its commands, pip's exit status, and the platform that JAX finds."""
    state = types.SimpleNamespace(commands=[], pip=0, platform="gpu")

    def run(command, **_):
        state.commands.append(command[1:])
        return subprocess.CompletedProcess(command, state.pip if "pip" in command else 0, f"{state.platform}\n", "")

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install, "installed_packages", lambda: with_plugin("jax-cuda12-plugin", "0.7.2"))
    monkeypatch.setattr(install, "_detect_accelerator", lambda: "cuda12")
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    return state


def test_installing_is_one_command_of_pip_and_a_look_at_the_accelerator(machine, capsys):
    install.main(["--quiet"])
    pip, look = machine.commands
    assert pip == ["-m", "pip", "install", "--quiet", "jax[cuda12]>=0.10.2,<0.13", "-r", str(ROOT / "requirements.txt")]
    assert "default_backend" in look[1]
    assert capsys.readouterr().out.startswith("found jax 0.7.2, jax-cuda12-plugin 0.7.2, jaxlib 0.7.2: ")


def test_installing_fails_where_the_accelerator_is_gone_or_pip_fails(machine):
    machine.platform = "cpu"
    with pytest.raises(SystemExit, match="finds only the CPU"):
        install.main([])
    machine.pip = 1
    with pytest.raises(SystemExit, match="pip could not install"):
        install.main([])
    assert "pip" in machine.commands[-1]  # and did not go on to JAX


def test_a_dry_run_installs_nothing(machine, capsys):
    install.main(["--dry-run"])
    assert machine.commands == [] and "'jax[cuda12]>=0.10.2,<0.13' -r" in capsys.readouterr().out


def test_a_gpu_that_jax_does_not_find_is_one_line(tmp_path):
    """The whole program, except that pip fetches nothing."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 550.54.15, 7.5\n")
    smi.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment |= {"PATH": str(tmp_path), "PIP_DRY_RUN": "1", "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1"}
    program = [sys.executable, str(ROOT / "install.py"), "--quiet"]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1
    assert "pip will install jax[cuda12]>=0.10.2,<0.13" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("this machine has a GPU, but its JAX finds only the CPU")


def test_it_runs_before_anything_is_installed():
    program = [sys.executable, "-I", "-S", str(ROOT / "install.py"), "--dry-run"]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("found no GPU or TPU")
