"""Transformer layers that the CLIP towers, the video adapter and the multimodal decoder share.

All blocks of a transformer are one `nn.scan` over stacked parameters. A layer that a plain block does not have (a video
adapter, a cross-attention) is an `Insertion`. Parameters are float32; `dtype` is the type of matrix products; softmax
and norms are computed in float32 whatever `dtype` is.

Dimensions: `B` batch, `L` query tokens, `S` positions of a cache, `D` width, `H` heads, `d` head width, `M` MLP width,
`depth` blocks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import normal
from jaxtyping import Array, Float, Int

from vlab_jax.models.attention import Kernels, Rotation, attend, rotate
from vlab_jax.runtime.sharding import gather_kernel, gathered_dot_general, split_by_batch

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The fields that all blocks of a transformer share; see `TransformerModule`.

    Attributes:
      depth: the number of blocks; it scales the initialisation.
      key_bias: whether keys have a bias (EVA-CLIP's have none).
      gated_mlp, inner_norms: SwiGLU, and norms inside of attention and MLP (EVA-02).
    """

    depth: int
    heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    key_bias: bool = True
    gated_mlp: bool = False
    inner_norms: bool = False
    remat: str = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    kernels: Kernels = dataclasses.field(default_factory=Kernels)

    def norm(self, name: str) -> "LayerNorm":
        """A layer norm of this name."""
        return LayerNorm(self.epsilon, self.dtype, name=name)

    def dense(
        self, width: int, name: str, kernel_init: Callable, use_bias: bool = True, tensor_axis: int | None = None
    ) -> nn.Dense:
        """A linear layer of this name; `tensor_axis`: see `sharding.gather_kernel`."""
        options = {"dtype": self.dtype, "dot_general": gathered_dot_general(tensor_axis), "name": name}
        return nn.Dense(width, use_bias=use_bias, kernel_init=kernel_init, **options)


class TransformerModule(nn.Module, kw_only=True):
    """A module around a transformer, with the fields that CLIP's towers and the decoder share.

    Attributes:
      remat: what the backward pass recomputes: `none`, `dots` (all but matrix products) or `full`.
      unroll: blocks per iteration of the scan.
      dtype: the type of matrix products.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    remat: str = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @property
    def config(self) -> TransformerConfig:
        """The config of the transformer, from the fields of the same names."""
        names = [field.name for field in dataclasses.fields(TransformerConfig) if hasattr(self, field.name)]
        return TransformerConfig(**{name: getattr(self, name) for name in names})


class Insertion(NamedTuple):
    """A pure function, with stacked parameters of its own, that runs in chosen blocks of a transformer.

    The parameters of the plain transformer stay as they are, so that a CLIP tower can be loaded with or without it.
    For example, an adapter before the attention of blocks 2 and 5:

        adapter = VideoAdapter(width=64, frames=8, parent=None)
        parameters = stacked_init(adapter, 2, example)(rng)  # each leaf [2, …]: of block 2, of block 5
        function = lambda parameters, x: adapter.apply({"params": parameters}, x)
        insertion = Insertion("attention", function, parameters, blocks=(2, 5))
        tokens, _ = transformer(x, insertions=(insertion,))

    In block 5, `x = function(parameters of block 5, x)` runs before the attention.

    Attributes:
      place: `attention` or `mlp`.
      function: from `(parameters, x)` to the new `x`, its residual included.
      parameters: a tree of arrays, stacked over `blocks` in order.
      blocks: the indices of the blocks that it runs in.
      active: bool `[len(blocks)]`: the blocks among them that it really runs in; None: all.
    """

    place: str
    function: Callable[[Any, jax.Array], jax.Array]
    parameters: Any
    blocks: tuple[int, ...]
    active: jax.Array | None = None

    def expanded(self, blocks: range) -> "Insertion":
        """The same with parameters stacked over all these blocks."""
        if self.blocks == tuple(blocks):
            return self
        slots = jnp.array([self.blocks.index(i) if i in self.blocks else 0 for i in blocks])
        active = jnp.array([i in self.blocks for i in blocks])
        if self.active is not None:
            active &= self.active[slots]
        parameters = jax.tree.map(lambda leaf: leaf[slots], self.parameters)
        return self._replace(parameters=parameters, blocks=tuple(blocks), active=active)


class KeyValueCache(NamedTuple):
    """Keys and values of earlier tokens, `[depth, B, S, H, d]`, and the number of tokens of each row."""

    key: jax.Array
    value: jax.Array
    lengths: jax.Array  # int32 [B]

    def take(self, rows: Int[Array, " Q"]) -> "KeyValueCache":
        """The cache of these rows, in their order; a row can be taken several times."""
        return KeyValueCache(self.key[:, rows], self.value[:, rows], self.lengths[rows])

    def append(self, key: Float[Array, "B L H d"], value: Float[Array, "B L H d"]) -> "KeyValueCache":
        """The cache of a single block, `[B, S, H, d]`, with new tokens after each row's; lengths are unchanged."""

        @jax.vmap
        def write_row(cached, new, start):
            return jax.lax.dynamic_update_slice_in_dim(cached, new.astype(cached.dtype), start, axis=0)

        key, value = write_row(self.key, key, self.lengths), write_row(self.value, value, self.lengths)
        return self._replace(key=key, value=value)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32 by the two-pass variance, cast to `dtype`."""

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        norm = nn.LayerNorm(self.epsilon, dtype=jnp.float32, use_fast_variance=False, name="norm")
        return norm(x).astype(self.dtype)


class HeadProjection(nn.Module):
    """Projects `D` to `parts` tensors of `H` heads at once: kernel `[D, parts, H, d]`; `biased` parts have a bias."""

    config: TransformerConfig
    parts: int
    biased: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> tuple[jax.Array, ...]:
        dtype, width = self.config.dtype, x.shape[-1]
        shape = (self.parts, self.config.heads, width // self.config.heads)
        kernel = self.param("kernel", normal(width**-0.5), (width, *shape))
        kernel = gather_kernel(kernel.astype(dtype), tensor_axis=2)
        y = jnp.einsum("bld,dphk->blphk", x.astype(dtype), kernel)  # [B, L, parts, H, d]
        bias = self.param("bias", nn.initializers.zeros, (len(self.biased), *shape[1:])).astype(dtype)
        if len(self.biased) < self.parts:
            bias = jnp.zeros(shape, dtype).at[jnp.array(self.biased)].set(bias)
        y = y + bias
        return tuple(y[:, :, part] for part in range(self.parts))


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused projection; `inner_norms` normalises the concatenated heads (EVA-02)."""

    config: TransformerConfig
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        lengths: Int[Array, " B"] | None = None,
        rotation: Rotation | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Float[Array, "B L D"], KeyValueCache | None]:
        """The output, and this block's cache with the keys and values of `x` appended; see `Transformer.__call__`."""
        config, biased = self.config, (0, 1, 2) if self.config.key_bias else (0, 2)
        query, key, value = HeadProjection(config, 3, biased, name="query_key_value")(x)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        masking: dict[str, Any] = {"causal": self.causal, "kv_lengths": lengths}
        if cache is not None:
            cache = cache.append(key, value)
            key, value = cache.key, cache.value
            masking = {"causal": True, "query_starts": cache.lengths}
        y = attend(query, key, value, **masking, kernels=config.kernels)  # [B, L, H, d]
        if config.inner_norms:
            y = config.norm("ln_inner")(y.reshape(x.shape)).reshape(y.shape)
        return output_projection(config, x.shape[-1])(y), cache


def output_projection(config: TransformerConfig, width: int) -> nn.Module:
    """The projection of heads `[B, L, H, d]` to `[B, L, width]`; initialisation is scaled by depth, as in CLIP."""
    initial = normal(width**-0.5 * (2 * config.depth) ** -0.5)
    # DenseGeneral multiplies by its kernel as `[H, d, width]`.
    options = {"dot_general": gathered_dot_general(tensor_axis=0), "dtype": config.dtype, "name": "output"}
    return nn.DenseGeneral(width, axis=(-2, -1), kernel_init=initial, **options)


class MLP(nn.Module):
    """Dense, activation, Dense.

    With `gated_mlp`, the activation of a second Dense multiplies the first (SwiGLU, with `silu`), and `inner_norms`
    normalises the input of the last Dense (both as in EVA-02).
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        config, outer = self.config, x.shape[-1]
        activation, inward = ACTIVATIONS[config.activation], normal((2 * outer) ** -0.5)
        y = config.dense(config.mlp_width, "input", inward, tensor_axis=1)(x)  # [B, L, M]
        if config.gated_mlp:
            y = y * activation(config.dense(config.mlp_width, "gate", inward, tensor_axis=1)(x))
        else:
            y = activation(y)
        if config.inner_norms:
            y = config.norm("ln_inner")(y)
        return config.dense(outer, "output", normal(outer**-0.5 * (2 * config.depth) ** -0.5), tensor_axis=0)(y)


class Block(nn.Module):
    """A pre-norm transformer block that also runs insertions, of which `inserted` has places and functions."""

    config: TransformerConfig
    causal: bool
    inserted: tuple[tuple[str, Callable], ...]

    @nn.compact
    def __call__(self, x, rotation, lengths, layer):
        (insertions, cached), config = layer, self.config
        x = split_by_batch(x)
        cache = None if cached is None else KeyValueCache(*cached, lengths)
        x = self._insert("attention", x, insertions)
        attention = SelfAttention(config, self.causal, name="attention")
        y, cache = attention(config.norm("ln_1")(x), None if cache else lengths, rotation, cache)
        x = self._insert("mlp", x + y, insertions)
        x = x + MLP(config, name="mlp")(config.norm("ln_2")(x))
        return x, None if cache is None else (cache.key, cache.value)

    def _insert(self, place, x, insertions):
        for (where, function), (active, parameters) in zip(self.inserted, insertions, strict=True):
            if where == place and active is None:
                x = function(parameters, x)
            elif where == place:
                x = jax.lax.cond(active, function, lambda parameters, x: x, parameters, x)
        return x


class Transformer(nn.Module):
    """A stack of blocks, scanned over their stacked parameters."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        causal: bool = False,
        lengths: Int[Array, " B"] | None = None,
        insertions: tuple[Insertion, ...] = (),
        rotation: Rotation | None = None,
        cache: KeyValueCache | None = None,
        blocks: slice = slice(None),
    ) -> tuple[Float[Array, "B L D"], KeyValueCache | None]:
        """The last block's output, and the cache with the keys and values of `x` appended.

        Args:
          lengths: the number of valid tokens of each row; later ones are masked out. None: all are valid.
          cache: earlier tokens, its `lengths` unchanged; each token of `x` attends to them and to those of `x` up to
            itself. None: `x` has all tokens.
          blocks: the blocks to run (initialisation runs all); the blocks of insertions are counted in the whole stack.
        """
        if self.is_initializing():
            blocks = slice(None)
        first, last, _ = blocks.indices(self.config.depth)
        if first >= last:
            return x, None
        block = Block
        if self.config.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},  # the latter for Flax's `capture_intermediates`
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=last - first,
            unroll=min(self.config.unroll, last - first),
            # The check traces the block a second time, to find outputs that are the same in all iterations: none is.
            check_constancy_invariants=False,
        )
        if last - first < self.config.depth:
            slice_blocks = functools.partial(jax.tree.map, lambda leaf: leaf[first:last])
            scanned = nn.map_variables(scanned, "params", trans_in_fn=slice_blocks)
        functions = tuple((insertion.place, insertion.function) for insertion in insertions)
        run = scanned(self.config, causal, functions, name="blocks")
        expanded = [insertion.expanded(range(first, last)) for insertion in insertions]
        inserted = tuple((insertion.active, insertion.parameters) for insertion in expanded)
        if cache is None:
            return run(x, rotation, lengths, (inserted, None))
        x, updated = run(x, rotation, cache.lengths, (inserted, (cache.key, cache.value)))
        return x, KeyValueCache(*updated, cache.lengths)


def stacked_init(module: nn.Module, count: int, *example: Any) -> Callable[[jax.Array], Any]:
    """An initialiser for `count` copies of `module`'s parameters, stacked on a new first axis."""

    def initialise(rng: jax.Array) -> Any:
        return jax.vmap(lambda key: module.init(key, *example)["params"])(jax.random.split(rng, count))

    return initialise


def interpolate_positions(positions: Float[Array, "P D"], length: int) -> Float[Array, "length D"]:
    """Learned positions, linearly interpolated to another `length`."""
    if positions.shape[0] == length:
        return positions
    return jax.image.resize(positions, (length, positions.shape[1]), "linear")
