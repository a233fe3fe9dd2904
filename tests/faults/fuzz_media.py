"""Damages media files in every way and decodes them in worker processes: each is decoded, or refused with a reason.

    PYTHONPATH=.:tests python tests/faults/fuzz_media.py --count=2000 --seed=0 --out=fuzz_media.json

The originals are clips that are rendered here, in many containers and codecs, and, with VLAB_TEST_ASSETS, real ones.
A file follows from (seed, number) alone: `--only=17` decodes that one in this process and prints the outcome. The exit
status is 0 if every file was decoded or refused, 1 if one raised something else, crashed its worker process, or took
too long.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator

import numpy as np
from numbered_video import FORMATS, encode, encode_image, numbered, numbered_video

from vlab_jax.data import video
from vlab_jax.data.crash_guard import map_in_order
from vlab_jax.data.media import DecodeError, MediaLimits

LIMITS = MediaLimits(decode_seconds=20.0)
MORE = {
    "mkv-hevc": ("matroska", "libx265", "yuv420p10le"),
    "mov-prores": ("mov", "prores", "yuv422p10le"),
    "mkv-ffv1": ("matroska", "ffv1", "yuv444p"),
    "avi-mjpeg": ("avi", "mjpeg", "yuvj422p"),
    "asf-wmv2": ("asf", "wmv2", "yuv420p"),
    "flv": ("flv", "flv", "yuv420p"),
    "mp4-av1": ("mp4", "libsvtav1", "yuv420p"),
    "avi-rawvideo": ("avi", "rawvideo", "bgr24"),
}
LARGEST = 1_300_000  # bytes of a real clip that is worth the time
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a file: `decoded`, `refused`, `unnamed` (another exception) or `lost` (its process ended)."""

    number: int
    source: str
    damage: str
    kind: str
    reason: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0


@functools.cache
def originals(assets: str) -> dict[str, bytes]:
    """The files to damage, by name."""
    made = {name: numbered_video(name) for name in FORMATS}
    clip = [numbered(i) for i in range(12)]
    made |= {name: encode(clip, *how) for name, how in MORE.items()}
    made |= {kind: encode_image(numbered(170), kind, 6) for kind in ("JPEG", "PNG", "WEBP", "GIF")}
    real = sorted(pathlib.Path(assets).glob("videos/**/*.*")) if assets else []
    videos = [path for path in real if path.suffix in (".mp4", ".mkv", ".avi", ".mpg", ".gif")]
    few = [path for path in videos if "fight" not in path.parts] + [path for path in videos if "fight" in path.parts][
        ::20
    ]
    return made | {path.name: path.read_bytes() for path in few if path.stat().st_size <= LARGEST}


def damaged(seed: int, number: int, assets: str) -> tuple[str, str, bytes]:
    """The name of the original, the kinds of damage, and the bytes."""
    rng = np.random.default_rng([seed, number])
    files = originals(assets)
    names = sorted(files)
    name = names[rng.integers(len(names))]
    media, kinds = files[name], []
    for _ in range(rng.integers(1, 4)):
        how = list(DAMAGES)[rng.integers(len(DAMAGES))]
        other = files[names[rng.integers(len(names))]]
        media = DAMAGES[how](media, other, rng) or media[:1]
        kinds.append(how)
    return name, "+".join(kinds), media


def _somewhere(media: bytes, rng: np.random.Generator, count: int) -> np.ndarray:
    """Places in the header, at the end (where MP4 and AVI have their index), or anywhere."""
    kind, near = rng.integers(3), min(len(media), 600)
    low, high = [(0, near), (len(media) - min(len(media), 4000), len(media)), (0, len(media))][kind]
    return rng.integers(low, high, count)


def flip_bits(media: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    changed = np.frombuffer(media, np.uint8).copy()
    places = _somewhere(media, rng, int(2 ** rng.uniform(0, 8)))
    changed[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
    return changed.tobytes()


def truncate(media: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    return media[: int(len(media) * rng.random())]


def behead(media: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    return media[int(_somewhere(media, rng, 1)[0]) :]


def splice(media: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    return media[: int(len(media) * rng.random())] + other[int(len(other) * rng.random()) :]


def join(media: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    return media + other


def edit_fields(media: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    """Numbers become extreme ones: sizes, counts, offsets, in either byte order."""
    changed = bytearray(media)
    for place in _somewhere(media, rng, int(rng.integers(1, 9))):
        width = int(rng.choice([1, 2, 4]))
        value = EXTREMES[rng.integers(len(EXTREMES))] & (256**width - 1)
        changed[place : place + width] = value.to_bytes(width, "big" if rng.random() < 0.6 else "little")
    return bytes(changed[: len(media)])


def edit_boxes(media: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    """The number before or behind a name of four letters: an MP4 box, a RIFF chunk, a PNG chunk."""
    names = [match.start() for match in re.finditer(rb"[a-zA-Z]{4}", media[:20_000] + media[-20_000:])]
    changed = bytearray(media)
    for _ in range(int(rng.integers(1, 4)) if names else 0):
        place = names[rng.integers(len(names))]
        place = place if place < 20_000 else place - 40_000 + len(media)
        place = max(0, place + int(rng.choice([-4, 4, 8, 12, 16])))
        changed[place : place + 4] = EXTREMES[rng.integers(len(EXTREMES))].to_bytes(4, "big")
    return bytes(changed[: len(media)])


def repeat_part(media: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    low, high = sorted(_somewhere(media, rng, 2))
    return media[:high] + media[low:high] * int(rng.integers(1, 5)) + media[high:]


def remove_part(media: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    low, high = sorted(_somewhere(media, rng, 2))
    return media[:low] + media[high:]


def blank_part(media: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    low, high = sorted(_somewhere(media, rng, 2))
    return media[:low] + bytes([int(rng.choice([0, 255]))]) * (high - low) + media[high:]


DAMAGES = {
    each.__name__: each
    for each in (
        *(flip_bits, truncate, behead, splice, join),
        *(edit_fields, edit_boxes, repeat_part, remove_part, blank_part),
    )
}


def decode_all_ways(media: bytes, seed: int) -> None:
    """Decodes a file as training, evaluation, checking and building do. Raises `DecodeError`, and nothing else."""
    errors = []
    form = {"start": 0.0, "end": float("inf"), "frame_rate": 1.0, "short_side": 32, "quality": 80}
    for attempt in (
        lambda: video.decode_clip(media, num_frames=4, size=32, limits=LIMITS, rng=np.random.default_rng(seed)),
        lambda: video.decode_clip(media, num_frames=2, size=32, limits=LIMITS, start=0.5, end=1.5),
        lambda: video.measure_duration(media, LIMITS),
        lambda: video.store_frames(media, **form, limits=LIMITS),
    ):
        try:
            attempt()
        except DecodeError as error:
            errors.append(str(error))
            assert error.args and "\n" not in errors[-1]
    if len(errors) == 4:
        raise DecodeError(errors[0])


def outcome(seed: int, assets: str, number: int) -> Outcome:
    """Decodes one damaged file."""
    source, damage, media = damaged(seed, number, assets)
    _reset_peak()
    began = time.monotonic()
    kind, reason = "decoded", ""
    try:
        decode_all_ways(media, number)
    except DecodeError as error:
        kind, reason = "refused", str(error)
    except Exception as error:  # the finding
        kind, reason = "unnamed", f"{type(error).__name__}: {error}"
    return Outcome(number, source, damage, kind, reason, time.monotonic() - began, _peak_mib())


def _reset_peak() -> None:
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    """The most memory that this process has held since the last reset."""
    line = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return int(line.group(1)) / 1024


def _lost(seed: int, assets: str, number: int) -> Outcome:
    source, damage, _ = damaged(seed, number, assets)
    return Outcome(number, source, damage, "lost", "its process ended, by a crash or for lack of time")


def run(count: int, seed: int, workers: int, assets: str) -> Iterator[Outcome]:
    """The outcome of each file, in order."""
    each, on_crash = (functools.partial(function, seed, assets) for function in (outcome, _lost))
    return map_in_order(each, range(count), workers, on_crash, LIMITS.clock_seconds)


def summary(outcomes: list[Outcome]) -> dict:
    """Counts by kind and by reason, and the slowest and the largest."""
    reasons = collections.Counter(re.sub(r"\d[\d,.]*", "N", each.reason)[:90] for each in outcomes if each.reason)
    slowest, largest = (max(outcomes, key=lambda each: getattr(each, name)) for name in ("seconds", "peak_mib"))
    return {
        "files": len(outcomes),
        "kinds": dict(collections.Counter(each.kind for each in outcomes)),
        "reasons": dict(reasons.most_common(40)),
        "slowest": dataclasses.asdict(slowest),
        "most memory": dataclasses.asdict(largest),
        "findings": [dataclasses.asdict(each) for each in outcomes if each.kind in ("unnamed", "lost")],
    }


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="")
    parser.add_argument("--only", type=int, default=-1)
    args = parser.parse_args()
    assets = os.environ.get("VLAB_TEST_ASSETS", "")
    if args.only >= 0:
        print(outcome(args.seed, assets, args.only))
        return 0
    began = time.monotonic()
    outcomes = []
    for each in run(args.count, args.seed, args.workers, assets):
        outcomes.append(each)
        if len(outcomes) % 100 == 0:
            print(len(outcomes), dict(collections.Counter(each.kind for each in outcomes)), flush=True)
    result = {"seed": args.seed, "wall seconds": round(time.monotonic() - began, 1), **summary(outcomes)}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        pathlib.Path(args.out).write_text(text + "\n", encoding="utf-8")
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
