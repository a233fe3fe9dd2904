"""A trace of some steps, when it is asked for."""

import jax.numpy as jnp

from vlab_jax.runtime.profiling import StepTrace


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
