"""Peak rates by the names that devices give themselves."""

import types

import jax
import pytest

from vlab_jax.runtime.profiling import peak_flops


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
