"""Stored frames versus decoding: clips a second, error, bytes; and 8 frames of a minute versus all of its frames.

    python -m experiments.frames.measure --videos=/a/folder/of/videos

Each subfolder of the folder is a group. A clip's media are in memory, like a record after reading; `video.decode_clip`
is timed, for 8 frames of 224 x 224 pixels at the centres of segments. Times are processor seconds of the working
thread, so that other processes on the machine matter little. All runs of one comparison alternate, and the ratio of
medians counts.

The minute is made of the videos themselves, cut to 480 x 360 pixels and 25 frames a second, one after the other, and
encoded by libx264 with a maximum distance between key frames: with further key frames at cuts, as files usually have,
and without. Decoding the whole minute decodes every frame and converts none.
"""

import argparse
import fractions
import io
import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import av
import av.video.frame
import numpy as np
import PIL.Image

from experiments.timing import commit, medians
from vlab_jax.data import video
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.runtime.disk import write_json

FRAMES, SIZE = 8, 224
RATE, SECONDS, PICTURE = 25, 60, (480, 360)
# Maximum distance between key frames, and whether there are others at cuts.
GOPS = {
    "250, and at cuts (x264's default)": (250, True),
    "250": (250, False),
    "50": (50, False),
    "12": (12, False),
    "one": (RATE * SECONDS, False),
}


def store(media: bytes, short_side: int) -> list[bytes]:
    """Encodes a clip as stored frames, with the default rate and quality."""
    default = BuildOptions()
    form = {"frame_rate": default.frame_rate, "quality": default.jpeg_quality}
    return video.store_frames(media, start=0.0, end=math.inf, short_side=short_side, **form)


def decode(media: bytes | Sequence[bytes], num_frames: int = FRAMES) -> np.ndarray:
    """Decodes the frames that a model gets in evaluation."""
    return video.decode_clip(media, num_frames=num_frames, size=SIZE)


def decode_whole(media: bytes) -> int:
    """Decodes all frames of a video, and returns their number."""
    with av.open(io.BytesIO(media)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return sum(1 for _ in container.decode(video=0))


def videos(folder: pathlib.Path, most: int) -> dict[str, list[bytes]]:
    """The decodable media of each subfolder; if there are more than `most`, evenly spread ones."""
    groups: dict[str, list[bytes]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            media = path.read_bytes()
            video.measure_duration(media)
        except video.DecodeError:
            continue
        groups.setdefault(path.relative_to(folder).parts[0], []).append(media)
    return {name: clips[:: math.ceil(len(clips) / most)] for name, clips in groups.items()}


def compare_group(clips: list[bytes], repeats: int) -> dict[str, Any]:
    """Clips a second and bytes of both variants, and the difference of their pixels."""
    started = time.process_time()
    stored = [store(media, BuildOptions().short_side) for media in clips]
    storing = time.process_time() - started
    runs = {"direct": lambda: list(map(decode, clips)), "frames": lambda: list(map(decode, stored))}
    seconds = medians(runs, repeats, time.process_time)
    held = sum(map(len, stored))
    return {
        "clips": len(clips),
        "seconds of video": round(sum(video.measure_duration(media) for media in clips), 1),
        "clips a second, direct": len(clips) / seconds["direct"],
        "clips a second, frames": len(clips) / seconds["frames"],
        "direct / frames": seconds["direct"] / seconds["frames"],
        "clips a second, storing": len(clips) / storing,
        "bytes of the files": sum(map(len, clips)),
        "bytes of the frames": sum(len(jpeg) for jpegs in stored for jpeg in jpegs),
        "bytes a frame": sum(len(jpeg) for jpegs in stored for jpeg in jpegs) / held,
        "difference, stored at 224": difference(clips, [store(media, SIZE) for media in clips]),
        "difference, stored at 256": difference(clips, stored),
    }


def difference(clips: list[bytes], stored: list[list[bytes]]) -> dict[str, float]:
    """The difference between stored frames and the same frames decoded directly, in levels of 256 and in decibels."""
    means, squares = [], []
    for media, jpegs in zip(clips, stored, strict=True):
        error = decode(media, len(jpegs)).astype(np.float32) - decode(jpegs, len(jpegs))
        means.append(float(np.abs(error).mean()))
        squares.append(float((error**2).mean()))
    psnr = 10 * math.log10(255**2 / statistics.mean(squares))
    return {"mean": statistics.mean(means), "mean of the worst clip": max(means), "PSNR": psnr}


def compare_qualities(clips: list[bytes]) -> dict[str, Any]:
    """Bytes a frame and mean difference at 224 x 224 in levels of 256, by quality and chroma, from 4 frames a clip."""
    pictures = [picture for media in clips for picture in video.read_frames(media, 0.0, math.inf, _four, _small)]
    found = {}
    for quality, chroma in itertools.product((75, 85, 90, 95), ("4:2:0", "4:4:4")):
        sizes, errors = [], []
        for picture in pictures:
            buffer = io.BytesIO()
            PIL.Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=chroma, optimize=True)
            sizes.append(buffer.tell())
            both = [video.resize_and_crop(each, SIZE) for each in (picture, np.asarray(PIL.Image.open(buffer)))]
            errors.append(float(np.abs(np.subtract(*both, dtype=np.int16)).mean()))
        found[f"{quality}, {chroma}"] = {"bytes a frame": statistics.mean(sizes), "mean": statistics.mean(errors)}
    return {"frames": len(pictures), **found}


def _four(times: np.ndarray, stop: float) -> np.ndarray:
    return np.linspace(0, len(times) - 1, 4).astype(int)


def _small(rgb: np.ndarray, aspect: float) -> np.ndarray:
    return video.resize(rgb, min(BuildOptions().short_side, *video.shown_size(*rgb.shape[:2], aspect)), aspect)


def minute(clips: Sequence[bytes]) -> Iterator[av.VideoFrame]:
    """A minute of frames, one clip after the other."""
    width, height = PICTURE
    number = 0
    while True:
        for media in clips:
            with av.open(io.BytesIO(media)) as container:
                for frame in container.decode(video=0):
                    if number == RATE * SECONDS:
                        return
                    frame = frame.reformat(width, height, "yuv420p")
                    frame.pts, frame.time_base = number, 1 / fractions.Fraction(RATE)
                    frame.pict_type = av.video.frame.PictureType.NONE  # otherwise the source's key frames are kept
                    number += 1
                    yield frame


def encode(clips: Sequence[bytes], gop: int, cuts: bool) -> bytes:
    """Encodes a minute of the clips with a distance between key frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        options = {"g": str(gop), "preset": "medium", **({} if cuts else {"sc_threshold": "0"})}
        stream = output.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height = PICTURE
        stream.pix_fmt = "yuv420p"
        for frame in minute(clips):
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def compare_minute(media: bytes, repeats: int) -> dict[str, Any]:
    """Seconds for 8 frames, from the video and from stored frames, and for the whole minute."""
    stored = store(media, BuildOptions().short_side)
    assert decode_whole(media) == RATE * SECONDS
    seconds = medians(
        {
            "whole": lambda: decode_whole(media),
            "8 frames, direct": lambda: decode(media),
            "8 frames, frames": lambda: decode(stored),
        },
        repeats,
        time.process_time,
    )
    with av.open(io.BytesIO(media)) as container:
        keys = sum(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
    ratios = {f"{name} / whole": seconds[name] / seconds["whole"] for name in seconds if name != "whole"}
    sizes = {"bytes": len(media), "bytes of the frames": sum(map(len, stored))}
    return {"key frames": keys, **sizes, "seconds": seconds, **ratios}


def machine() -> dict[str, Any]:
    """The machine and the versions of a measurement."""
    versions = {"python": platform.python_version(), "av": av.__version__, "pillow": PIL.__version__}
    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    return {"commit": commit(), "cores": os.cpu_count(), "cpu": _cpu(), **versions, "libavcodec": ffmpeg}


def _cpu() -> str:
    """The processor's name, on Linux."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def main() -> None:
    """Measures and writes `results.json` beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=pathlib.Path, required=True, help="a folder of folders of videos")
    parser.add_argument("--repeats", type=int, default=7, help="counted runs")
    parser.add_argument("--most", type=int, default=20, help="maximum number of clips in a group")
    parser.add_argument("--minute", default="misc", help="the group whose clips make up the minute")
    given = parser.parse_args()
    groups = videos(given.videos, given.most)
    results: dict[str, Any] = {"groups": {}, "minute": {}}
    for name, clips in groups.items():
        results["groups"][name] = compare_group(clips, given.repeats)
        print(name, json.dumps(results["groups"][name], indent=2), file=sys.stderr, flush=True)
    results["qualities"] = compare_qualities([media for clips in groups.values() for media in clips])
    for name, (gop, cuts) in GOPS.items():
        results["minute"][name] = compare_minute(encode(groups[given.minute], gop, cuts), given.repeats)
        print(name, json.dumps(results["minute"][name], indent=2), file=sys.stderr, flush=True)
    recorded = {"repeats": given.repeats, "most": given.most, **results, **machine()}
    write_json(pathlib.Path(__file__).with_name("results.json"), recorded)


if __name__ == "__main__":
    main()
