"""Transformer parts that the CLIP towers, the video adapter and the multimodal decoder share.

Dimensions: `B` batch, `L` query tokens, `K` key tokens, `D` width, `H` heads, `d` head width, `M` MLP width,
`depth` blocks. Parameters are float32; `dtype` is what matrix products are computed in; softmax and norms are
computed in float32 whatever `dtype` is.

All blocks of a transformer are one `nn.scan` over stacked parameters. What is not part of a plain block (a video
adapter, a cross-attention) is an `Insertion`: a pure function of its own stacked parameters, called at a given
place of the chosen blocks. The tree of a plain CLIP tower is thus the same with insertions and without.
"""

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


class Insertion(NamedTuple):
    """A function that runs inside chosen blocks of a transformer, before their attention or their MLP.

    `function(parameters, x, context)` returns the new `x` (its residual included). `parameters` are stacked over
    `blocks`, in order; `context` is any tree of arrays, the same for all blocks.
    """

    place: str  # 'attention' or 'mlp'
    function: Callable[[Any, jax.Array, Any], jax.Array]
    parameters: Any
    blocks: tuple[int, ...]
    context: Any = None
    active: jax.Array | None = None  # of parameters that are laid out over all blocks: which blocks carry them

    def laid_out(self, depth: int) -> "Insertion":
        """The same with its parameters laid out over all `depth` blocks, for use in a loop: it is done once then."""
        active, parameters = _spread(self, range(depth))
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

    With `inner_norm`, what the heads return is normalised, as one row, before the output projection (EVA-02).
    """

    heads: int
    depth: int
    causal: bool = False
    key_bias: bool = True
    inner_norm: bool = False
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

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
        width = x.shape[-1]
        biased = (0, 1, 2) if self.key_bias else (0, 2)
        project = HeadProjection(
            3, self.heads, width // self.heads, biased, width**-0.5, self.dtype, name="query_key_value"
        )
        query, key, value = project(x)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        seen: dict[str, Any] = {"causal": self.causal, "kv_lengths": lengths}
        if cache is not None:
            key, value = written(cache.key, key, cache.lengths), written(cache.value, value, cache.lengths)
            cache = KeyValueCache(key, value, cache.lengths)
            seen = {"causal": True, "query_starts": cache.lengths}
        y = attend(query, key, value, **seen, **self.kernels._asdict())  # [B, L, H, d]
        if self.inner_norm:
            norm = LayerNorm(self.epsilon, self.dtype, name="ln_inner")
            y = norm(y.reshape(x.shape)).reshape(y.shape)
        return output_projection(width, self.depth, self.dtype)(y), cache


def written(
    room: Float[Array, "B S H d"], new: Float[Array, "B L H d"], places: Int[Array, " B"]
) -> Float[Array, "B S H d"]:
    """`room` with `new` written into each row from its own place on."""

    def row(room, new, place):
        return jax.lax.dynamic_update_slice_in_dim(room, new.astype(room.dtype), place, axis=0)

    return jax.vmap(row)(room, new, places)


def output_projection(width: int, depth: int, dtype: Any) -> nn.Module:
    """The projection of `[B, L, H, d]` heads back to `[B, L, width]`, scaled at initialisation by depth as in CLIP."""
    stddev = width**-0.5 * (2 * depth) ** -0.5
    # DenseGeneral multiplies by its kernel as `[H, d, width]`.
    options = {"kernel_init": normal(stddev), "dot_general": whole_product(tensor_axis=0), "dtype": dtype}
    return nn.DenseGeneral(width, axis=(-2, -1), **options, name="output")


class MLP(nn.Module):
    """Dense, activation, Dense.

    With `gated`, the activation of a second Dense multiplies the first (SwiGLU, with `silu`); with `inner_norm`, what
    goes into the last Dense is normalised (both EVA-02).
    """

    width: int
    activation: str
    depth: int
    gated: bool = False
    inner_norm: bool = False
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        outer = x.shape[-1]
        inward = {"kernel_init": normal((2 * outer) ** -0.5), "dtype": self.dtype, "dot_general": whole_product(1)}
        y = nn.Dense(self.width, **inward, name="input")(x)  # [B, L, M]
        activation = ACTIVATIONS[self.activation]
        y = y * activation(nn.Dense(self.width, **inward, name="gate")(x)) if self.gated else activation(y)
        if self.inner_norm:
            y = LayerNorm(self.epsilon, self.dtype, name="ln_inner")(y)
        stddev = outer**-0.5 * (2 * self.depth) ** -0.5
        outward = {"kernel_init": normal(stddev), "dtype": self.dtype, "dot_general": whole_product(0)}
        return nn.Dense(outer, **outward, name="output")(y)


class Block(nn.Module):
    """A pre-norm transformer block, with the insertions of its transformer."""

    heads: int
    mlp_width: int
    depth: int
    activation: str
    epsilon: float
    key_bias: bool
    gated_mlp: bool
    inner_norms: bool
    causal: bool
    collect: bool
    inserted: tuple[tuple[str, Callable], ...]
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x, rotation, contexts, lengths, layer):
        insertions, stored = layer
        x = split_by_batch(x)
        cache = None if stored is None else KeyValueCache(*stored, lengths)
        norms = {"inner_norm": self.inner_norms, "epsilon": self.epsilon, "dtype": self.dtype}
        x = self._insert("attention", x, contexts, insertions)
        y = LayerNorm(self.epsilon, self.dtype, name="ln_1")(x)
        fields = {"causal": self.causal, "key_bias": self.key_bias, "kernels": self.kernels, **norms}
        attention = SelfAttention(self.heads, self.depth, **fields, name="attention")
        y, cache = attention(y, None if cache else lengths, rotation, cache)
        x = self._insert("mlp", x + y, contexts, insertions)
        y = LayerNorm(self.epsilon, self.dtype, name="ln_2")(x)
        x = x + MLP(self.mlp_width, self.activation, self.depth, self.gated_mlp, **norms, name="mlp")(y)
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
    """A stack of blocks, scanned.

    Attributes:
      remat: what the backward pass recomputes: `none`, `dots` (all but matrix products) or `full`.
      unroll: how many blocks one iteration of the scan holds.
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
    kernels: Kernels = Kernels()

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
        first, last, _ = blocks.indices(self.depth)
        if first >= last:
            return x, None
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=last - first,
            unroll=min(self.unroll, last - first),
            # The check traces the block a second time, to find outputs that are the same in all iterations: none is.
            check_constancy_invariants=False,
        )
        if last - first < self.depth:

            def chosen(parameters: Any) -> Any:
                return jax.tree.map(lambda leaf: leaf[first:last], parameters)

            scanned = nn.map_variables(scanned, "params", trans_in_fn=chosen)
        run = scanned(
            heads=self.heads,
            mlp_width=self.mlp_width,
            depth=self.depth,
            activation=self.activation,
            epsilon=self.epsilon,
            key_bias=self.key_bias,
            gated_mlp=self.gated_mlp,
            inner_norms=self.inner_norms,
            causal=causal,
            collect=collect,
            inserted=tuple((insertion.place, insertion.function) for insertion in insertions),
            dtype=self.dtype,
            kernels=self.kernels,
            name="blocks",
        )
        contexts = tuple(insertion.context for insertion in insertions)
        inserted = tuple(_spread(insertion, range(first, last)) for insertion in insertions)
        if cache is None:
            x, (every, _) = run(x, rotation, contexts, lengths, (inserted, None))
            return x, every
        x, (_, stored) = run(x, rotation, contexts, cache.lengths, (inserted, (cache.key, cache.value)))
        return x, KeyValueCache(*stored, cache.lengths)


def transformer_of(tower: nn.Module, **block: bool) -> Transformer:
    """The transformer that the fields of a tower describe, as its submodule `transformer`; `block` adds fields."""
    return Transformer(
        depth=tower.depth,
        heads=tower.heads,
        mlp_width=tower.mlp_width,
        activation=tower.activation,
        epsilon=tower.epsilon,
        remat=tower.remat,
        unroll=tower.unroll,
        dtype=tower.dtype,
        kernels=tower.kernels,
        name="transformer",
        **block,
    )


def _spread(insertion: Insertion, blocks: range) -> tuple[jax.Array | None, Any]:
    """An insertion's parameters laid out over these blocks, and which of them are active (None: all)."""
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
