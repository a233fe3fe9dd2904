"""Lowering for an NVIDIA GPU that is not there.

`jit(f).trace(...).lower(lowering_platforms=("cuda",))` runs on any machine, but cuDNN's attention
(`jax.nn.dot_product_attention(..., implementation="cudnn")`) decides while it is traced whether it takes what it is
given, and asks a device for that: which cuDNN is installed, and which compute capability the first GPU has. Without a
GPU the first question raises "cuDNN is not detected", and the second one is answered as if the GPU were an old one.
JAX has no argument to say otherwise, so the three functions that ask are replaced, in the module that calls them.
"""

import contextlib
from collections.abc import Iterator
from importlib import import_module
from unittest import mock

# Of jax 0.10 and 0.11; the functions that ask a device.
FRONT_END = "jax._src.cudnn.fused_attention_stablehlo"


@contextlib.contextmanager
def cudnn_answers(version: int = 91000, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Within it, cuDNN's attention is traced for a GPU that is not there, and refuses what it would refuse on it.

    Nothing can be run within it; it holds for the whole process, not for one thread. What `jit` has traced before for
    the same shapes is not traced again.

    Args:
      version: of cuDNN, as it gives it itself: 91000 is 9.10.0.
      capability: of the GPU: (9, 0) are H100 and H200, (8, 0) is A100, (10, 0) is B200.

    Raises:
      AttributeError: the installed JAX asks by functions of other names.
    """

    def at_least(asked: str) -> bool:
        return capability >= _numbers(asked)

    def equal(asked: str) -> bool:
        return capability == _numbers(asked)

    with mock.patch.multiple(
        import_module(FRONT_END),
        check_cudnn_version=lambda: version,
        check_compute_capability=at_least,
        is_cuda_compute_capability_equal=equal,
    ):
        yield


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
