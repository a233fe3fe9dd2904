"""What accelerators can do at most: the peak rates that utilisation is measured against."""

from collections.abc import Sequence
from typing import Any

# Dense bfloat16 products with float32 sums, in FLOP/s a device as JAX counts devices, by a part of the device's kind;
# the first that is found counts. Sources: the vendors' data sheets (NVIDIA's without sparsity). A device of TPU v2 and
# v3 is a core, half of the chip that the data sheet is of.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("V100", 125e12),  # float16; it has no bfloat16
    ("T4", 65e12),  # float16
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("TPU7x", 2307e12),
    ("TPU v6", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v3", 61.5e12),
    ("TPU v2", 22.5e12),
)


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOP/s of all devices together; None where the table has not their kind (CPUs among them)."""
    kind = devices[0].device_kind
    peak = next((rate for name, rate in PEAK_FLOPS if name.lower() in kind.lower()), None)
    return None if peak is None else peak * len(devices)
