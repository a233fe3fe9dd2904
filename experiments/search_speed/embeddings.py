"""Synthetic embeddings shaped like a video-text model's, and queries for them.

Real embeddings of one modality lie in a narrow cone, cluster by topic and by video, and use few of their dimensions
fully; those of texts lie in another cone (arXiv 2203.02053). A clip's embedding here is the normalised sum of

    cone + topic + video + window

whose squared lengths (`SHARES`) are the cosines that they add: 0.58 between clips of different topics, 0.70 of one
topic, 0.90 of one video. Topics have sizes by Zipf's law (exponent 1), and a video has `WINDOWS` windows. All but the
cone are normal, with variances that fall as k^-0.8 along random axes. README.md compares this with real embeddings.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

WIDTH, WINDOWS, TOPICS, DECAY = 512, 10, 2000, 0.8
SHARES = {"cone": 0.58, "topic": 0.12, "video": 0.20, "window": 0.10}
# For a text: its own cone, the subject of its video, and the rest, again as squared lengths; the cosine of the cones.
TEXT_SHARES, CONES = {"cone": 0.55, "content": 0.045, "rest": 0.405}, 0.318


@dataclasses.dataclass(frozen=True)
class Made:
    """Unit vectors: `clips` `[V, E]`, and queries of two kinds, `[Q, E]` each: `texts`, other `windows` of videos."""

    clips: Float[np.ndarray, "V E"]
    texts: Float[np.ndarray, "Q E"]
    windows: Float[np.ndarray, "Q E"]


def make(count: int, queries: int, seed: int = 0) -> Made:
    """Makes embeddings of clips (in multiples of `WINDOWS`) and queries of each kind, of random videos."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    variances = np.arange(1, WIDTH + 1) ** -DECAY
    scaled = axes * np.sqrt(variances / variances.sum()).astype(np.float32)[:, None]  # rows are axes

    def spread(rows: int) -> np.ndarray:  # [rows, E], of squared length 1 on average
        return rng.normal(size=(rows, WIDTH)).astype(np.float32) @ scaled

    cone, other = _unit(rng.normal(size=(2, WIDTH)).astype(np.float32))
    videos = count // WINDOWS
    topics = spread(TOPICS) * SHARES["topic"] ** 0.5
    content = topics[_topic_of(videos, rng)] + spread(videos) * SHARES["video"] ** 0.5  # [videos, E]

    def windows_of(chosen: Int[np.ndarray, " n"]) -> np.ndarray:
        noise = spread(len(chosen)) * SHARES["window"] ** 0.5
        return _unit(cone * np.float32(SHARES["cone"] ** 0.5) + content[chosen] + noise)

    clips = windows_of(np.repeat(np.arange(videos), WINDOWS))
    described = rng.integers(videos, size=queries)
    across = _unit((other - (other @ cone) * cone)[None])[0]
    texts_cone = CONES * cone + (1 - CONES**2) ** 0.5 * across
    texts = _unit(
        texts_cone * np.float32(TEXT_SHARES["cone"] ** 0.5)
        + _unit(content[described]) * np.float32(TEXT_SHARES["content"] ** 0.5)
        + spread(queries) * np.float32(TEXT_SHARES["rest"] ** 0.5)
    )
    return Made(clips, texts.astype(np.float32), windows_of(rng.integers(videos, size=queries)))


def statistics(made: Made, seed: int = 0) -> dict[str, float]:
    """Statistics for a comparison with a model's embeddings."""
    rng = np.random.default_rng(seed)
    some = rng.choice(len(made.clips), 2000, replace=False)
    similar = made.clips[some] @ made.clips[some].T
    texts = made.texts @ made.clips.T
    eigenvalues = np.linalg.eigvalsh(np.cov(made.clips[some].T))
    return {
        "clip and clip, mean": float(similar[np.triu_indices(len(some), 1)].mean()),
        "windows of one video, mean": float(
            np.einsum("ve,ve->v", made.clips[::WINDOWS], made.clips[1::WINDOWS]).mean()
        ),
        "text and clip, mean": float(texts.mean()),
        "text and its best clip, mean": float(texts.max(axis=1).mean()),
        "dimensions (participation ratio)": float(eigenvalues.sum() ** 2 / (eigenvalues**2).sum()),
    }


def _topic_of(videos: int, rng: np.random.Generator) -> Int[np.ndarray, " videos"]:
    shares = 1 / np.arange(1, TOPICS + 1)
    return rng.choice(TOPICS, size=videos, p=shares / shares.sum())


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
