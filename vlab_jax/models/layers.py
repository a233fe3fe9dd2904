"""Transformer parts that the CLIP towers, the video adapter and the multimodal decoder share.

Dimensions: `B` batch, `L` query tokens, `K` key tokens, `D` width, `H` heads, `d` head width, `M` MLP width,
`depth` blocks. Parameters are float32; `dtype` is what matrix products are computed in; softmax and norms are
computed in float32 whatever `dtype` is.

All blocks of a transformer are one `nn.scan` over stacked parameters. What is not part of a plain block (a video
adapter, a cross-attention) is an `Insertion`: a pure function of its own stacked parameters, called at a given
place of the chosen blocks. The tree of a plain CLIP tower is thus the same with insertions and without.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlab_jax.models.attention import Kernels, attend
from vlab_jax.models.partition import gathered, split_by_batch, whole_product
from vlab_jax.models.rotary import Rotation, rotate

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
    """What all blocks of a transformer have in common.

    Attributes:
      depth: the number of blocks, by which initialisation is scaled.
      key_bias: whether keys have a bias (EVA-CLIP's have none).
      gated_mlp, inner_norms: SwiGLU, and norms inside of attention and MLP (EVA-02).
      remat: what the backward pass recomputes: `none`, `dots` (all but matrix products) or `full`.
      unroll: how many blocks one iteration of the scan holds.
      dtype: what matrix products are computed in.
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

    @classmethod
    def of(cls, tower: nn.Module) -> "TransformerConfig":
        """The config of a tower's transformer: the tower's fields of the same names."""
        names = [field.name for field in dataclasses.fields(cls) if hasattr(tower, field.name)]
        return cls(**{name: getattr(tower, name) for name in names})


class Insertion(NamedTuple):
    """A function that runs inside chosen blocks of a transformer, before their attention or before their MLP.

    It leaves the parameters of the plain transformer as they are, so that a CLIP tower can be loaded with or without
    it. For example, an adapter with its own parameters before the attention of blocks 2 and 5:

        adapter = VideoAdapter(width=64, frames=8, parent=None)
        parameters = stacked_init(adapter, 2, example)(rng)  # each leaf [2, …]: of block 2, of block 5
        insertion = Insertion("attention", apply_function(adapter), parameters, blocks=(2, 5))
        tokens, _ = transformer(x, insertions=(insertion,))

    In block 5, `x = function(parameters of block 5, x, context)` runs before the attention.

    Attributes:
      place: `attention` or `mlp`.
      function: from `(parameters, x, context)` to the new `x`, its residual included.
      parameters: a tree of arrays, stacked over `blocks` in order.
      blocks: the numbers of the blocks that it runs in.
      context: any tree of arrays, the same for all blocks.
      active: bool `[depth]`, set by `expanded` alone: the blocks that it runs in, of parameters stacked over all blocks.
    """

    place: str
    function: Callable[[Any, jax.Array, Any], jax.Array]
    parameters: Any
    blocks: tuple[int, ...]
    context: Any = None
    active: jax.Array | None = None

    def expanded(self, depth: int) -> "Insertion":
        """The same with parameters stacked over all `depth` blocks, so that a loop around the transformer does not
        gather them each time."""
        active, parameters = _expand_to_blocks(self, range(depth))
        return self._replace(active=active, parameters=parameters, blocks=tuple(range(depth)))


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens so far, `[depth, B, S, H, d]` with room for `S`, and how many each row has."""

    key: jax.Array
    value: jax.Array
    lengths: jax.Array  # int32 [B]


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32 by the two-pass variance, cast to `dtype`."""

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        norm = nn.LayerNorm(self.epsilon, dtype=jnp.float32, use_fast_variance=False, name="norm")
        return norm(x).astype(self.dtype)


def normal(stddev: float) -> nn.initializers.Initializer:
    """Normal initialiser with the given standard deviation."""
    return nn.initializers.normal(stddev)


class HeadProjection(nn.Module):
    """Projects `D` to `parts` tensors of `H` heads at once: kernel `[D, parts, H, d]`.

    `biased` lists the parts that have a bias (EVA-CLIP's keys have none).
    """

    parts: int
    heads: int
    head_width: int
    biased: tuple[int, ...]
    stddev: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> tuple[jax.Array, ...]:
        shape = (self.parts, self.heads, self.head_width)
        kernel = self.param("kernel", normal(self.stddev), (x.shape[-1], *shape))
        kernel = gathered(kernel.astype(self.dtype), tensor_axis=2)
        y = jnp.einsum("bld,dphk->blphk", x.astype(self.dtype), kernel)  # [B, L, parts, H, d]
        if self.biased:
            bias = self.param("bias", nn.initializers.zeros, (len(self.biased), *shape[1:]))
            full = jnp.zeros(shape, self.dtype).at[jnp.array(self.biased)].set(bias.astype(self.dtype))
            y = y + (bias.astype(self.dtype) if len(self.biased) == self.parts else full)
        return tuple(y[:, :, part] for part in range(self.parts))


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused query, key and value projection.

    With `inner_norms`, the heads' results are normalised, as one row, before the output projection (EVA-02).
    """

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
        """The output, and the cache (of this block) with the keys and values of `x` written behind each row's own.

        Args:
          lengths: how many tokens each row has; those behind are not looked at. None: all of them.
          cache: makes the attention causal, from each row's own length on.
        """
        config, width = self.config, x.shape[-1]
        biased = (0, 1, 2) if config.key_bias else (0, 2)
        sizes = (3, config.heads, width // config.heads)
        query, key, value = HeadProjection(*sizes, biased, width**-0.5, config.dtype, name="query_key_value")(x)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        seen: dict[str, Any] = {"causal": self.causal, "kv_lengths": lengths}
        if cache is not None:
            key = update_cache(cache.key, key, cache.lengths)
            value = update_cache(cache.value, value, cache.lengths)
            cache = KeyValueCache(key, value, cache.lengths)
            seen = {"causal": True, "query_starts": cache.lengths}
        y = attend(query, key, value, **seen, **config.kernels._asdict())  # [B, L, H, d]
        if config.inner_norms:
            norm = LayerNorm(config.epsilon, config.dtype, name="ln_inner")
            y = norm(y.reshape(x.shape)).reshape(y.shape)
        return output_projection(width, config.depth, config.dtype)(y), cache


def update_cache(
    cache: Float[Array, "B S H d"], new: Float[Array, "B L H d"], starts: Int[Array, " B"]
) -> Float[Array, "B S H d"]:
    """The cache with `new` written into each row from its own start on."""

    def update_row(cache, new, start):
        return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), start, axis=0)

    return jax.vmap(update_row)(cache, new, starts)


def output_projection(width: int, depth: int, dtype: Any) -> nn.Module:
    """The projection of `[B, L, H, d]` heads back to `[B, L, width]`, scaled at initialisation by depth as in CLIP."""
    stddev = width**-0.5 * (2 * depth) ** -0.5
    # DenseGeneral multiplies by its kernel as `[H, d, width]`.
    options = {"kernel_init": normal(stddev), "dot_general": whole_product(tensor_axis=0), "dtype": dtype}
    return nn.DenseGeneral(width, axis=(-2, -1), **options, name="output")


class MLP(nn.Module):
    """Dense, activation, Dense.

    With `gated_mlp`, the activation of a second Dense multiplies the first (SwiGLU, with `silu`); with `inner_norms`,
    the input of the last Dense is normalised (both EVA-02).
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        config, outer = self.config, x.shape[-1]
        activation = ACTIVATIONS[config.activation]
        inward = {"kernel_init": normal((2 * outer) ** -0.5), "dtype": config.dtype, "dot_general": whole_product(1)}
        y = nn.Dense(config.mlp_width, **inward, name="input")(x)  # [B, L, M]
        y = y * activation(nn.Dense(config.mlp_width, **inward, name="gate")(x)) if config.gated_mlp else activation(y)
        if config.inner_norms:
            y = LayerNorm(config.epsilon, config.dtype, name="ln_inner")(y)
        stddev = outer**-0.5 * (2 * config.depth) ** -0.5
        outward = {"kernel_init": normal(stddev), "dtype": config.dtype, "dot_general": whole_product(0)}
        return nn.Dense(outer, **outward, name="output")(y)


class Block(nn.Module):
    """A pre-norm transformer block, with the insertions of its transformer."""

    config: TransformerConfig
    causal: bool
    collect: bool
    inserted: tuple[tuple[str, Callable], ...]

    @nn.compact
    def __call__(self, x, rotation, contexts, lengths, layer):
        insertions, cached = layer
        norm = functools.partial(LayerNorm, self.config.epsilon, self.config.dtype)
        x = split_by_batch(x)
        cache = None if cached is None else KeyValueCache(*cached, lengths)
        x = self._insert("attention", x, contexts, insertions)
        attention = SelfAttention(self.config, self.causal, name="attention")
        y, cache = attention(norm(name="ln_1")(x), None if cache else lengths, rotation, cache)
        x = self._insert("mlp", x + y, contexts, insertions)
        x = x + MLP(self.config, name="mlp")(norm(name="ln_2")(x))
        return x, (x if self.collect else None, None if cache is None else (cache.key, cache.value))

    def _insert(self, place, x, contexts, insertions):
        for (where, function), context, (active, parameters) in zip(self.inserted, contexts, insertions, strict=True):
            if where != place:
                continue
            if active is None:
                x = function(parameters, x, context)
            else:
                x = jax.lax.cond(active, function, lambda parameters, x, context: x, parameters, x, context)
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
        collect: bool = False,
        rotation: Rotation | None = None,
        cache: KeyValueCache | None = None,
        blocks: slice = slice(None),
    ) -> tuple[Float[Array, "B L D"], Any]:
        """Returns the last block's output and, with `collect`, every block's, `[depth, B, L, D]`.

        Of the stack, `blocks` are run (initialisation runs all); insertions stand at their blocks' places in the whole.
        Tokens behind a row's `lengths` are not looked at (None: all are).

        With a `cache`, `x` are the tokens behind those in it, each of which sees those before it, and what is returned
        beside the output is the cache with `x` in it, but for its `lengths`, which are left as they are.
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
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=last - first,
            unroll=min(self.config.unroll, last - first),
            check_constancy_invariants=False,  # nothing is broadcast out: one more trace of every block, for nothing
        )
        if last - first < self.config.depth:

            def chosen(parameters: Any) -> Any:
                return jax.tree.map(lambda leaf: leaf[first:last], parameters)

            scanned = nn.map_variables(scanned, "params", trans_in_fn=chosen)
        functions = tuple((insertion.place, insertion.function) for insertion in insertions)
        run = scanned(self.config, causal, collect, functions, name="blocks")
        contexts = tuple(insertion.context for insertion in insertions)
        inserted = tuple(_expand_to_blocks(insertion, range(first, last)) for insertion in insertions)
        if cache is None:
            x, (every, _) = run(x, rotation, contexts, lengths, (inserted, None))
            return x, every
        x, (_, updated) = run(x, rotation, contexts, cache.lengths, (inserted, (cache.key, cache.value)))
        return x, KeyValueCache(*updated, cache.lengths)


def _expand_to_blocks(insertion: Insertion, blocks: range) -> tuple[jax.Array | None, Any]:
    """An insertion's parameters stacked over these blocks, and which of them it runs in (None: all)."""
    if insertion.blocks == tuple(blocks):
        return insertion.active, insertion.parameters
    slots = jnp.array([insertion.blocks.index(i) if i in insertion.blocks else 0 for i in blocks])
    active = jnp.array([i in insertion.blocks for i in blocks])
    if insertion.active is not None:
        active &= insertion.active[slots]
    return active, jax.tree.map(lambda leaf: leaf[slots], insertion.parameters)


def stacked_init(module: nn.Module, count: int, *example: Any) -> Callable[[jax.Array], Any]:
    """An initialiser for `count` copies of `module`'s parameters, stacked on a new first axis."""

    def initialise(rng: jax.Array) -> Any:
        return jax.vmap(lambda key: module.init(key, *example)["params"])(jax.random.split(rng, count))

    return initialise


def apply_function(module: nn.Module) -> Callable[..., jax.Array]:
    """`module` as a pure function of `(parameters, *inputs)`."""
    return lambda parameters, *inputs: module.apply({"params": parameters}, *inputs)


def interpolate_positions(positions: Float[Array, "P D"], length: int) -> Float[Array, "length D"]:
    """Learned positions, linearly interpolated where `length` differs from what was learned."""
    if positions.shape[0] == length:
        return positions
    return jax.image.resize(positions, (length, positions.shape[1]), "linear")
