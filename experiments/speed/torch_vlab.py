"""The same model in PyTorch, written for the comparison of `train_step.py`: towers, conv adapters, decoder, losses.

It takes our parameters (`load`), so that both compute the same loss. It uses PyTorch's fused attention (SDPA) and one
product for query, key and value of each block. It supports only a pre-norm CLIP with concat blending; `VlabLoss`
refuses anything else. Names and shapes are as in `vlab_jax.models`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vlab_jax.models.towers import PIXEL_DEVIATION, PIXEL_MEAN

GELUS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class Attention(nn.Module):
    """Self-attention, or attention of text queries to `visual`."""

    def __init__(self, width: int, heads: int, crossed: bool = False) -> None:
        super().__init__()
        self.heads, self.crossed = heads, crossed
        self.query = nn.Linear(width, width if crossed else 3 * width)
        self.key_value = nn.Linear(width, 2 * width) if crossed else None
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, visual: torch.Tensor | None = None, mask: Any = None, causal: bool = False):
        """`mask` is true where a query may attend."""
        parts = [self.query(x)] if self.crossed else self.query(x).chunk(3, -1)
        if self.crossed:
            parts += self.key_value(visual).chunk(2, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.output(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm block; `before_attention` and `before_mlp` are functions of its input."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        width, epsilon = fields["width"], fields["epsilon"]
        self.ln_1, self.ln_2 = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
        self.attention = Attention(width, fields["heads"])
        self.input, self.output = nn.Linear(width, fields["mlp_width"]), nn.Linear(fields["mlp_width"], width)
        self.gelu = GELUS[fields["activation"]]

    def forward(self, x: torch.Tensor, mask: Any = None, causal: bool = False, before_mlp: Any = None):
        """Applies the block, with a cross-attention (`before_mlp`) if one is given."""
        x = x + self.attention(self.ln_1(x), mask=mask, causal=causal)
        x = x if before_mlp is None else before_mlp(x)
        return x + self.output(self.gelu(self.input(self.ln_2(x))))


class Adapter(nn.Module):
    """Down, depthwise convolution over the frames of a patch, activation, up; the class token is not changed."""

    def __init__(self, outer: int, fields: Mapping[str, Any]) -> None:
        super().__init__()
        width, kernel = fields["width"], tuple(fields["kernel"])
        self.down, self.up = nn.Linear(outer, width), nn.Linear(width, outer)
        self.conv = nn.Conv3d(width, width, kernel, padding=tuple(size // 2 for size in kernel), groups=width)
        self.gelu = GELUS[fields["activation"]]

    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        """Maps `[B·T, M, D]` to the same shape."""
        side = math.isqrt(x.shape[1] - 1)
        y = self.down(x[:, 1:]).unflatten(0, (-1, frames)).unflatten(2, (side, side))  # [B, T, h, w, A]
        y = self.conv(y.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        change = self.up(self.gelu(y.flatten(0, 1).flatten(1, 2)))
        return torch.cat([x[:, :1], x[:, 1:] + change], 1)


class Vision(nn.Module):
    """CLIP's vision tower, with the given adapters."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.patch, width, epsilon = fields["patch_size"], fields["width"], fields["epsilon"]
        tokens = (fields["image_size"] // self.patch) ** 2 + 1
        self.patch_embedding = nn.Linear(3 * self.patch**2, width, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
        self.blocks = nn.ModuleList(Block(fields) for _ in range(fields["depth"]))
        self.projection = nn.Linear(width, fields["embed_width"], bias=False)
        for name, values in (("mean", PIXEL_MEAN), ("deviation", PIXEL_DEVIATION)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, video: torch.Tensor, adapters: Mapping[str, Adapter] | None = None):
        """From uint8 `[B, T, S, S, 3]`: tokens `[B, T·M, D]` before `ln_post`, and embeddings `[B, T, E]`."""
        clips, frames = video.shape[:2]
        images = (video.flatten(0, 1).float() / 255 - self.mean) / self.deviation
        grid = images.unflatten(2, (-1, self.patch)).unflatten(1, (-1, self.patch))  # [F, h, P, w, P, 3]
        x = self.patch_embedding(grid.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2))
        first = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first.to(x.dtype), x], 1) + self.position_embedding)
        for number, block in enumerate(self.blocks):
            if adapters is not None and str(number) in adapters:
                x = adapters[str(number)](x, frames)
            x = block(x)
        return x.unflatten(0, (clips, frames)), self.projection(self.ln_post(x[:, 0])).unflatten(0, (clips, frames))


class Text(nn.Module):
    """CLIP's text tower, or (`crossed`) the decoder with the same architecture."""

    def __init__(self, fields: Mapping[str, Any], vision_width: int = 0, frames: int = 0) -> None:
        super().__init__()
        width, depth, epsilon = fields["width"], fields["depth"], fields["epsilon"]
        self.token_embedding = nn.Embedding(fields["vocab_size"], width)
        self.position_embedding = nn.Parameter(torch.zeros(fields["context_length"], width))
        self.blocks = nn.ModuleList(Block(fields) for _ in range(depth))
        self.ln_final = nn.LayerNorm(width, epsilon)
        if not vision_width:
            self.projection = nn.Linear(width, fields["embed_width"], bias=False)
            return
        self.mask_embedding = nn.Parameter(torch.zeros(width))
        self.crossings = nn.ModuleList(Attention(width, fields["heads"], crossed=True) for _ in range(depth))
        self.crossing_norms = nn.ModuleList(nn.LayerNorm(width, epsilon) for _ in range(depth))
        for stream in ("image", "video"):
            self.add_module(f"{stream}_norm", nn.LayerNorm(vision_width, epsilon))
            self.add_module(f"{stream}_projection", nn.Linear(vision_width, width))
            self.register_parameter(f"{stream}_type", nn.Parameter(torch.zeros(width)))
            self.register_parameter(f"{stream}_frame_position", nn.Parameter(torch.zeros(frames, width)))

    def embed(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The projected end-of-text token."""
        x = self.token_embedding(tokens) + self.position_embedding
        for block in self.blocks:
            x = block(x, causal=True)
        return self.projection(self.ln_final(x)[torch.arange(len(x), device=x.device), lengths - 1])

    def look(self, streams: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The input of the cross-attentions: both streams' tokens, the image stream's first."""
        parts = []
        for stream in ("image", "video"):
            if stream not in streams:
                continue
            x, positions = streams[stream], getattr(self, f"{stream}_frame_position")
            y = getattr(self, f"{stream}_projection")(getattr(self, f"{stream}_norm")(x))  # [B, T, M, W]
            if len(positions) != x.shape[1]:
                positions = F.interpolate(positions.T[None], x.shape[1], mode="linear")[0].T
            parts.append((y + (positions[:, None] + getattr(self, f"{stream}_type"))).flatten(1, 2))
        return torch.cat(parts, 1)

    def decode(self, tokens: torch.Tensor, streams: Any, causal: bool, lengths: Any = None, masked: Any = None):
        """Logits over the vocabulary."""
        visual = self.look(streams)
        x = self.token_embedding(tokens)
        if masked is not None:
            x = torch.where(masked[..., None], self.mask_embedding.to(x.dtype), x)
        x = x + self.position_embedding
        mask = None
        if lengths is not None:
            mask = (torch.arange(tokens.shape[1], device=x.device) < lengths[:, None])[:, None, None]
        for block, norm, crossing in zip(self.blocks, self.crossing_norms, self.crossings, strict=True):
            x = block(x, mask, causal, lambda x, norm=norm, crossing=crossing: x + crossing(norm(x), visual))
        return F.linear(self.ln_final(x), self.token_embedding.weight)


class VlabLoss(nn.Module):
    """The loss of a batch: contrastive learning, captioning and masked language modelling.

    Args:
      fields: those of `vlab_jax.models.vlab.VLAB`, as a dictionary.
      streams: those of the stage; image_frames: the frames of the image stream.

    Raises:
      ValueError: this implementation does not support the model.
    """

    def __init__(
        self, fields: Mapping[str, Any], streams: tuple[str, ...], image_frames: tuple[int, ...], smoothing: float
    ) -> None:
        super().__init__()
        vision, adapter, decoder = fields["vision"], fields["adapter"], fields["decoder"]
        known = decoder["blending"] == "concat" and decoder["cross_attention_every"] == 1
        known &= adapter["mixer"] == "conv" and not adapter["before_mlp"] and fields["image_encoder"] == "separate"
        known &= vision["pre_norm"] and vision["key_bias"] and not vision["gated_mlp"]
        if not known:
            raise ValueError("the PyTorch model knows CLIP, conv adapters, concat blending, separate image encoders")
        self.streams, self.image_frames, self.smoothing = streams, list(image_frames), smoothing
        self.blend = fields["embedding_blend"]
        self.vision, self.image_encoder = Vision(vision), Vision(vision)
        self.text = Text(fields["text"])
        self.decoder = Text(fields["text"], vision["width"], fields["frames"])
        self.video_adapter = nn.ModuleDict(
            {str(number): Adapter(vision["width"], adapter) for number in adapter["blocks"]}
        )
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch: that of our training step, with `masked`."""
        tokens, lengths, masked = batch["tokens"], batch["lengths"], batch["masked"]
        visual, mean = self.see(batch["video"])
        clips, texts = (F.normalize(each.float(), dim=-1) for each in (mean, self.text.embed(tokens, lengths)))
        logits = self.logit_scale.clamp(max=math.log(100)).exp() * clips @ texts.T
        own = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        present = torch.arange(1, tokens.shape[1], device=tokens.device) < lengths[:, None]
        words = self.decoder.decode(tokens, visual, causal=True)[:, :-1]
        loss = loss + _cross_entropy(words, tokens[:, 1:], present, self.smoothing)
        words = self.decoder.decode(tokens, visual, causal=False, lengths=lengths, masked=masked)
        return loss + _cross_entropy(words, tokens, masked, 0.0)

    def see(self, video: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Each stream's tokens, and the clips' embeddings before normalisation."""
        visual, means = {}, {}
        if "video" in self.streams:
            visual["video"], embeddings = self.vision(video, self.video_adapter)
            means["video"] = embeddings.mean(1)
        if "image" in self.streams:
            visual["image"], embeddings = self.image_encoder(video[:, self.image_frames])
            means["image"] = embeddings.mean(1)
        if len(means) == 1:
            return visual, next(iter(means.values()))
        return visual, self.blend * means["image"] + (1 - self.blend) * means["video"]


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, present: torch.Tensor, smoothing: float):
    targets = torch.where(present, targets, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), label_smoothing=smoothing)


def load(model: VlabLoss, parameters: Mapping[str, Any]) -> dict[str, list[nn.Parameter]]:
    """Copies our parameters into the model; returns its parameters by our paths, for the same parameter groups.

    Raises:
      ValueError: one of the two has parameters that the other lacks.
    """
    paths: dict[str, list[nn.Parameter]] = {}
    ours = dict(_flat(parameters))
    filled: set[int] = set()

    def take(path: str, *into: tuple[nn.Parameter, Any]) -> None:
        ours.pop(path)
        for parameter, values in into:
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(np.array(values)).reshape(parameter.shape))
            filled.add(id(parameter))
            paths.setdefault(path, []).append(parameter)

    for path, values in list(ours.items()):
        take(path, *_places(model, path, values))
    missed = [name for name, parameter in model.named_parameters() if id(parameter) not in filled]
    if ours or missed:
        raise ValueError(f"not loaded: {sorted(ours)}; not filled: {missed}")
    return paths


def _flat(tree: Mapping[str, Any], prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield prefix + key, np.asarray(value)


def _places(model: VlabLoss, path: str, values: np.ndarray) -> list[tuple[nn.Parameter, np.ndarray]]:
    """The parameters into which one of ours is copied: one for each block if ours is stacked over blocks."""
    head, _, rest = path.partition("/")
    owner = getattr(model, head)
    if head == "logit_scale":
        return [(owner, values)]
    if head == "video_adapter":
        blocks, rest = list(owner.values()), rest.partition("/")[2]
    elif rest.startswith("transformer/blocks/"):
        blocks, rest = list(owner.blocks), rest.removeprefix("transformer/blocks/")
    elif rest.startswith("cross_attention/"):
        rest = rest.removeprefix("cross_attention/")
        blocks = list(owner.crossing_norms if rest.startswith("ln/") else owner.crossings)
        rest = rest.removeprefix("ln/").removeprefix("attend/")
    else:
        return [_place(owner, rest, values)]
    return [_place(block, rest, part) for block, part in zip(blocks, values, strict=True)]


def _place(owner: nn.Module, path: str, values: np.ndarray) -> tuple[nn.Parameter, np.ndarray]:
    if path.startswith("conv_"):
        kernel = path == "conv_kernel"  # [t, h, w, A]
        return (owner.conv.weight if kernel else owner.conv.bias), (values.transpose(3, 0, 1, 2) if kernel else values)
    *names, leaf = [name for name in path.split("/") if name not in ("norm", "mlp")]
    for name in names:
        owner = getattr(owner, "query" if name == "query_key_value" else name)
    if leaf == "token_embedding":
        return owner.token_embedding.weight, values
    if leaf in ("scale", "bias", "kernel"):
        parameter = owner.bias if leaf == "bias" else owner.weight
        if leaf == "kernel":
            values = values.reshape(-1, parameter.shape[0]) if names[-1] != "output" else values
            values = values.reshape(parameter.shape[1], parameter.shape[0]).T
        return parameter, values
    return getattr(owner, leaf), values
