"""cuDNN's attention is lowered for a GPU that is not here, and refuses what that GPU would refuse."""

import functools

import jax
import jax.numpy as jnp
import pytest

from vlab_jax.compiling.topologies import mock_cudnn


def lowered(tokens: int, width: int, gradient: bool = False) -> str:
    """Attention by cuDNN over so many tokens, lowered for CUDA; a new function each time, so that it is traced."""
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")

    def function(x):
        loss = lambda x: attend(x, x, x).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss)(x) if gradient else loss(x)

    x = jax.ShapeDtypeStruct((2, tokens, 4, width), jnp.bfloat16)
    return jax.jit(function).trace(x).lower(lowering_platforms=("cuda",)).as_text()


def test_cudnns_attention_lowers_without_a_gpu():
    with mock_cudnn():
        text = lowered(64, 64, gradient=True)
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text


def test_what_a_gpu_would_refuse_is_refused():
    with mock_cudnn(), pytest.raises(NotImplementedError, match="head dim"):
        lowered(64, 60)


def test_the_capability_decides_what_is_refused():
    with mock_cudnn(capability=(9, 0)):
        assert "__cudnn$fmha" in lowered(64, 192)
    with mock_cudnn(capability=(8, 0)), pytest.raises(NotImplementedError, match="head dim"):
        lowered(64, 192)


def test_afterwards_jax_asks_the_device_again():
    from jax._src.cudnn import fused_attention_stablehlo as front_end

    before = front_end.check_cudnn_version, front_end.check_compute_capability
    with mock_cudnn(version=91001):
        assert front_end.check_cudnn_version() == 91001
    assert (front_end.check_cudnn_version, front_end.check_compute_capability) == before
