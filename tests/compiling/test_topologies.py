"""Names of machines that are not here, and the errors where the machine cannot be compiled for."""

import importlib.util

import pytest

from vlab_jax.compiling import topologies
from vlab_jax.errors import InputError
from vlab_jax.runtime.profiling import PEAK_FLOPS, peak_flops


@pytest.mark.parametrize(
    ("name", "platform", "count"),
    [
        ("v5e:2x4", "tpu", 8),
        ("v5p:2x2x2", "tpu", 8),
        ("v6e:2x4", "tpu", 8),
        ("v5e:1x1", "tpu", 1),
        ("h200", "cuda", 1),
        ("h100:8", "cuda", 8),
        ("h100:2x8", "cuda", 16),
        ("a100:8", "cuda", 8),
    ],
)
def test_a_topology_counts_chips(name, platform, count):
    topology = topologies.parse(name)
    assert (topology.platform, topology.count) == (platform, count)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "there is no 'v9'; known chips are v5e"),
        ("v5e", "a number of chips along each side, as in v5e:2x2"),
        ("v5e:", "as in v5e:2x2"),
        ("v5e:2x0", "as in v5e:2x2"),
        ("v5p:2x4", "has 2 sides; chips of v5p lie along 3, as in v5p:2x2x2"),
        ("v5e:2x2x2", "has 3 sides; chips of v5e lie along 2"),
        ("v6e:3x3", "the first two sides must be even; a single chip is v6e:1x1"),
        ("h100:1x2x8", "h100:2x8 (hosts x GPUs)"),
    ],
)
def test_a_wrong_topology_is_an_error_of_one_line(name, message):
    with pytest.raises(InputError) as raised:
        topologies.parse(name)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x4", "compile-tpu"), ("h200", "compile-gpu")])
def test_without_the_compiler_one_line_says_how_to_get_it(name, extra, monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"pip install -e '\.\[{extra}\]'"):
        topologies.environment(topologies.parse(name))


def test_libtpu_is_found_where_the_environment_says(tmp_path, monkeypatch):
    library = tmp_path / "libtpu.so"
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(library))
    with pytest.raises(InputError, match="is not a file"):
        topologies.environment(topologies.parse("v5e:2x4"))
    library.touch()
    variables = topologies.environment(topologies.parse("v5e:2x4"))
    assert variables["TPU_LIBRARY_PATH"] == str(library)
    assert variables["JAX_PLATFORMS"] == "cpu"


def test_the_users_xla_flags_are_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    flags = topologies.environment(topologies.parse("h200"))["XLA_FLAGS"].split()
    assert {"--xla_one=1", "--xla_gpu_autotune_level=0"} <= set(flags)


def test_a_gpus_memory_is_the_share_that_jax_takes(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    whole = topologies.CHIPS["h200"].memory
    assert topologies.parse("h200").memory == pytest.approx(0.75 * whole)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")
    assert topologies.parse("h200").memory == pytest.approx(0.92 * whole)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(InputError, match="is not a number"):
        _ = topologies.parse("h200").memory


def test_a_gpus_compiler_gets_the_properties_of_the_device():
    text = topologies.parse("a100:8").chip.target
    assert "cuda_compute_capability { major: 8 }" in text
    assert "core_count: 108" in text
    assert 'device_description_str: "NVIDIA A100-SXM4-80GB"' in text
    assert text.count("{") == text.count("}")


def test_the_peak_of_every_gpu_is_known():
    for chip in topologies.CHIPS.values():
        if not chip.sides:
            named = type("Device", (), {"device_kind": chip.name})
            assert peak_flops([named]) in dict(PEAK_FLOPS).values()
