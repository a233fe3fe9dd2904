"""Compiled programs are kept on disk."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
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


def run(home: pathlib.Path, **environment: str) -> list[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XDG_"))}
    given = {**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(home), **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=given, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    assert first[0] == second[0] and first[0].startswith(str(tmp_path / ".cache" / "vlab_jax" / "compiled-"))
    assert first[1] == "0" and int(second[1]) >= 1


def test_the_environment_chooses_the_place_or_none(tmp_path):
    there = str(tmp_path / "there")
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=there)[0] == there
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR="")[0] == "None"
    elsewhere = run(tmp_path, XDG_CACHE_HOME=str(tmp_path / "xdg"))[0]
    assert elsewhere.startswith(str(tmp_path / "xdg" / "vlab_jax"))


def test_a_home_that_cannot_be_written_to_is_done_without(tmp_path):
    (tmp_path / ".cache").write_text("a file")
    assert run(tmp_path)[0] == "None"
