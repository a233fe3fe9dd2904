"""Peak rates of devices, the compilation cache, the memory allocator, and the trace of some steps."""

import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from vlab_jax.runtime.profiling import StepTrace, keep_compiled_programs, peak_flops

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", 65e12),
        ("TPU v2", 22.5e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_a_device_is_found_by_its_kind(kind, peak):
    assert peak_flops([types.SimpleNamespace(device_kind=kind)] * 4) == 4 * peak


def test_a_cpu_has_no_known_peak():
    assert peak_flops(jax.devices("cpu")) is None


COMPILE = """
import jax
from jax import monitoring
from vlab_jax.runtime.profiling import keep_compiled_programs

hits = []
monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
print(keep_compiled_programs())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))
print(len(hits))
"""


def run(program: str, *arguments: str, **environment: str) -> list[str]:
    """What a program prints, run without this process's settings of JAX."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XDG_"))}
    variables = {**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    first, second = run(COMPILE, HOME=str(tmp_path)), run(COMPILE, HOME=str(tmp_path))
    assert first[0] == second[0] and first[0].startswith(str(tmp_path / ".cache" / "vlab_jax" / "compiled-"))
    assert first[1] == "0" and int(second[1]) >= 1


@pytest.fixture
def home(tmp_path, monkeypatch) -> pathlib.Path:
    """A home directory without any settings of a cache; nothing is set in JAX."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return tmp_path


def test_the_environment_chooses_the_cache_or_turns_it_off(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert keep_compiled_programs().is_relative_to(home / "xdg" / "vlab_jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "there"))
    assert keep_compiled_programs() == home / "there"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert keep_compiled_programs() is None


def test_without_a_writable_home_there_is_no_cache(home):
    (home / ".cache").write_text("a file")
    assert keep_compiled_programs() is None


ALLOCATE = """
import resource, sys
import numpy as np
from vlab_jax.runtime.profiling import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(1 << 24, np.uint8)  # 16 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    (count,) = run(ALLOCATE, how, MALLOC_MMAP_THRESHOLD_="1048576")
    return int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is a function of glibc")
def test_blocks_that_are_freed_and_allocated_again_cost_no_page_faults():
    assert page_faults("keep") < 0.2 * page_faults("give back")


def step(trace: StepTrace) -> None:
    trace.next_step()
    (jnp.ones((64, 64)) @ jnp.ones((64, 64))).block_until_ready()


def test_a_trace_holds_the_steps_asked_for_and_ends(tmp_path):
    with StepTrace(tmp_path / "profile", first=2, steps=2) as trace:
        step(trace)
        assert not (tmp_path / "profile").exists()
        step(trace)
        step(trace)
        step(trace)
        written = sorted(path.name for path in (tmp_path / "profile").rglob("*.xplane.pb"))
        assert len(written) == 1
    assert sorted(path.name for path in (tmp_path / "profile").rglob("*.xplane.pb")) == written


def test_a_run_that_ends_early_writes_what_it_has(tmp_path):
    with StepTrace(tmp_path / "profile", first=1, steps=100) as trace:
        step(trace)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_without_a_folder_there_is_none(tmp_path):
    with StepTrace(None, first=1, steps=1) as trace:
        step(trace)
        step(trace)
    assert not list(tmp_path.iterdir())
