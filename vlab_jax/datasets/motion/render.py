"""Renders scenes of the `motion` data set into pixels, with or without a glyph, and pixels into the bytes of a file."""

import io
from collections.abc import Sequence

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, Float32, Int, UInt8
from PIL import Image

from vlab_jax.datasets.motion.scene import FRAMES, OPACITY, REACH, Glyph, Scene, Shape

FRAMES_PER_SECOND = 12
PALETTE = {"red": (215, 35, 40), "green": (25, 150, 55), "blue": (35, 70, 215), "yellow": (245, 225, 45)}
# Signed distances to the outlines in radii, below 0 inside, for shapes of about the same area.
_SHAPES = {
    "circle": lambda u, v: np.hypot(u, v) - 0.95,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.85) - 0.3,
    "bar": lambda u, v: np.maximum(np.abs(u) - 1.13, np.abs(v) - 0.38),
}
_ROOT = np.sqrt(np.float32(2))
_GLYPHS = {
    "plus": lambda u, v: np.minimum(_GLYPHS["dash"](u, v), _GLYPHS["pillar"](u, v)),
    "cross": lambda u, v: _GLYPHS["plus"]((u + v) / _ROOT, (v - u) / _ROOT),
    "dash": lambda u, v: np.maximum(np.abs(u) - 1, np.abs(v) - 0.28),
    "pillar": lambda u, v: _GLYPHS["dash"](v, u),
    "dot": lambda u, v: np.hypot(u, v) - 0.6,
    "box": lambda u, v: np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.75) - 0.25,
}
_GLYPH_RADIUS = 4 / 48  # in shares of the frame's side
_WHITE = 250
# Every frame an IDR frame with a constant quantiser and nothing carried from one to the next: then the frames of a
# reversed clip are, decoded, bit for bit the frames of the clip in reverse.
_X264 = "keyint=1:bframes=0:scenecut=0:qp=18:mbtree=0:rc-lookahead=0:sync-lookahead=0:sliced-threads=0:threads=1"


def render(
    scene: Scene, resolution: int = 48, frames: Sequence[int] = range(FRAMES), unfaded: bool = False
) -> UInt8[np.ndarray, "t h w 3"]:
    """Renders frames of the scene, antialiased; `unfaded` shows every shape in full, whatever its opacity."""
    states = scene.states(frames)
    if unfaded:
        states[..., OPACITY] = 1
    background = render_background(scene.background, scene.background_seed, resolution)
    image = np.repeat(background[None], len(frames), axis=0)
    for shape, state in zip(scene.shapes, states, strict=True):
        _paint(image, shape, state)
    return (image + 0.5).astype(np.uint8)


def _paint(image: Float32[np.ndarray, "t h w 3"], shape: Shape, state: Float[np.ndarray, "t 5"]) -> None:
    """Blends the shape into the frames, in place, within a window around it in each frame."""
    resolution = image.shape[1]
    x, y, radius, angle, opacity = (state[:, column, None].astype(np.float32) for column in range(5))
    side = min(resolution, int(np.ceil(2 * REACH * radius.max() * resolution)) + 3)
    columns, rows = (_window(centre, side, resolution) for centre in (x, y))
    across, down = ((cells + 0.5) / resolution for cells in (columns.astype(np.float32), rows.astype(np.float32)))
    across, down = ((across - x) / radius)[:, None, :], ((down - y) / radius)[:, :, None]
    cos, sin, radius, opacity = (value[:, None] for value in (np.cos(angle), np.sin(angle), radius, opacity))
    distance = _SHAPES[shape.kind](cos * across + sin * down, cos * down - sin * across)
    cover = opacity * np.clip(0.5 - distance * (radius * resolution), 0, 1)  # the edge is one pixel soft
    window = np.arange(len(image))[:, None, None], rows[:, :, None], columns[:, None, :]
    under = image[window]
    image[window] = under + cover[..., None] * (np.array(PALETTE[shape.colour], np.float32) - under)


def _window(centre: Float32[np.ndarray, "t 1"], side: int, resolution: int) -> Int[np.ndarray, "t side"]:
    """The indices of `side` pixels around each centre, within the frame."""
    first = np.clip(np.round(centre * resolution - side / 2).astype(int), 0, resolution - side)
    return first + np.arange(side)


def stamp(frames: UInt8[np.ndarray, "t h w 3"], glyph: Glyph) -> UInt8[np.ndarray, "t h w 3"]:
    """The frames with the glyph on top, antialiased."""
    side = frames.shape[1]
    place = (np.arange(side, dtype=np.float32) + 0.5) / side
    across, down = np.meshgrid(*((place - np.float32(centre)) / np.float32(_GLYPH_RADIUS) for centre in glyph.centre))
    cover = np.clip(0.5 - _GLYPHS[glyph.kind](across, down) * (_GLYPH_RADIUS * side), 0, 1)[..., None]
    return (frames * (1 - cover) + cover * _WHITE + 0.5).astype(np.uint8)


def render_background(kind: str, seed: int, resolution: int) -> Float32[np.ndarray, "h w 3"]:
    """A constant background in dull middle tones, of low contrast so that every shape stands out."""
    rng = np.random.default_rng(seed)
    tone = rng.uniform(95, 160) + rng.uniform(-12, 12, 3)
    contrast = rng.uniform(2, 5)
    return (tone + contrast * _pattern(kind, rng, resolution)[..., None]).astype(np.float32)


def _pattern(kind: str, rng: np.random.Generator, resolution: int) -> Float[np.ndarray, "h w"]:
    """The background's pattern between about -1 and 1."""
    place = (np.arange(resolution) + 0.5) / resolution - 0.5
    angle, cell, shift = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.16), rng.uniform(0, 1, 2)
    slope = np.cos(angle) * place[None, :] + np.sin(angle) * place[:, None]
    if kind == "plain":
        return np.zeros((resolution, resolution))
    if kind == "shaded":
        return 2 * slope
    if kind == "striped":
        return np.sign(np.sin(np.pi * (slope / cell + 2 * shift[0])))
    if kind == "checked":
        across, down = (np.floor(place / cell + s) % 2 for s in shift)
        return 2 * np.abs(across[None, :] - down[:, None]) - 1
    grains = 24
    nearest = np.arange(resolution) * grains // resolution
    return rng.uniform(-1, 1, (grains, grains))[np.ix_(nearest, nearest)]


def encode_video(frames: UInt8[np.ndarray, "t h w 3"]) -> bytes:
    """An H.264 clip in MP4 (12 frames a second, 4:2:0), each frame coded by itself; sides must be even."""
    file, reformatter = io.BytesIO(), VideoReformatter()
    options = {"preset": "superfast", "x264-params": _X264}
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(reformatter.reformat(rgb, format="yuv420p")))
        container.mux(stream.encode(None))
    return file.getvalue()


def encode_image(frame: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A JPEG of quality 95 with 4:2:0 colour, as in the clips."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=95)
    return file.getvalue()
