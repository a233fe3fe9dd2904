"""The speed of reading video frames, compared with torchcodec and OpenCV, and whether all read the same frames.

    python -m experiments.speed.decode --videos=/a/folder/of/videos
    python -m experiments.speed.decode --videos=/a/folder/of/videos --most=2 --repeats=1 --batches=2        a trial

Each subfolder is a group. From every clip, the 8 frames at the centres of equal segments are read by their numbers and
resized to 224 x 224 by the same code. *Decoding* is timed in this process, in processor seconds, with alternating runs;
each library uses its fastest way for the group (`readers.py` defines the ways), and only clips that all of them can
read are timed. *Pipeline* is clips a second through worker processes, with random frames of equal segments: ours (Grain
over a built data set), and PyTorch's `DataLoader` with each of the other libraries.

Libraries that cannot read a clip, or read other frames than ours, are listed by name: two frames differ if their mean
absolute difference is above `--close` of 256 levels.
"""

import argparse
import collections
import contextlib
import functools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.speed.readers import READERS, NotRead
from experiments.timing import add_record, made_with, medians
from vlab_jax.data import pipeline, video
from vlab_jax.data.sampling import frames_at, segment_times
from vlab_jax.data.tokenizer import train_bpe
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions

RESULTS = pathlib.Path(__file__).with_name("decode.json")
FRAMES, SIZE = 8, 224
MOST_DRAWN = 20  # failures of a reader before the measurement fails


class Clip(NamedTuple):
    """A file, its bytes, its number of frames, and the numbers of the frames to read."""

    path: pathlib.Path
    media: bytes
    count: int
    numbers: tuple[int, ...]


def clips(folder: pathlib.Path, most: int) -> dict[str, list[Clip]]:
    """The readable clips of each subfolder; if there are more than `most`, evenly spread ones."""
    paths = collections.defaultdict(list)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"):
        paths[path.relative_to(folder).parts[0]].append(path)
    groups = collections.defaultdict(list)
    for name, there in paths.items():
        for path in there[:: -(-len(there) // most)]:
            media = path.read_bytes()
            try:
                groups[name].append(Clip(path, media, *sampled_frames(media)))
            except video.DecodeError as error:
                print(f"{path.name}: {error}", file=sys.stderr)
    return groups


def sampled_frames(media: bytes) -> tuple[int, tuple[int, ...]]:
    """The number of frames, and the numbers of the frames at the centres of equal segments."""
    count, numbers = 0, ()

    def choose(times: np.ndarray, stop: float) -> np.ndarray:
        nonlocal count, numbers
        chosen = frames_at(segment_times(float(times[0]), stop, FRAMES), times)
        count, numbers = len(times), tuple(chosen.tolist())
        return chosen

    video.read_frames(media, 0.0, float("inf"), choose, lambda *_: None)
    return count, numbers


def read(reader: str, clip: Clip) -> np.ndarray:
    """The clip's chosen frames, with 224 x 224 pixels."""
    found = READERS[reader](clip.media, clip.path, clip.numbers)
    return np.stack([video.resize_and_crop(np.asarray(frame), SIZE) for frame in found])


def disagreements(clip: Clip, close: float) -> dict[str, str]:
    """The readers that cannot read a clip, or read other frames than ours, each with its error."""
    expected, found = read("ours", clip).astype(np.float32), {}
    for reader in READERS:
        try:
            difference = np.abs(read(reader, clip) - expected).mean(axis=(1, 2, 3))
        except Exception as error:  # whatever a library makes of a file
            found[reader] = f"fails: {str(error).splitlines()[0][:100] if str(error) else type(error).__name__}"
            continue
        if difference.max() > close:
            found[reader] = (
                f"{int((difference > close).sum())} of {FRAMES} frames differ, by {difference.max():.1f} levels"
            )
    return found


def decoding(group: Sequence[Clip], repeats: int) -> dict[str, Any]:
    """Clips a second of each reader, and of each library's fastest way, over clips that all of them can read."""
    runs = {name: functools.partial(lambda name: [read(name, clip) for clip in group], name) for name in READERS}
    seconds = medians(runs, repeats, time.process_time)
    rates = {name: len(group) / each for name, each in seconds.items()}
    best = {name.split(",")[0]: 0.0 for name in rates}
    for name, rate in rates.items():
        best[name.split(",")[0]] = max(best[name.split(",")[0]], rate)
    return {
        "clips a second of a processor": rates,
        "ours over the best of torchcodec": best["ours"] / best["torchcodec"],
        "ours over the best of OpenCV": best["ours"] / best["OpenCV"],
        "best": {library: max((n for n in rates if n.startswith(library)), key=rates.get) for library in best},
    }


class Random:
    """A PyTorch data set of random frames in equal segments of clips, by a reader; endless, in random order.

    If the reader fails at some frames, as at the last ones of some files, other frames are drawn.
    """

    def __init__(self, group: Sequence[Clip], reader: str, length: int) -> None:
        self.group, self.reader, self.length = list(group), reader, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        for _ in range(MOST_DRAWN):
            clip = self.group[rng.integers(len(self.group))]
            numbers = segment_times(0, clip.count, FRAMES, rng).astype(int)
            with contextlib.suppress(Exception):  # whatever a library makes of a file
                return read(self.reader, clip._replace(numbers=tuple(numbers.tolist())))
        raise NotRead(f"{self.reader} fails at {MOST_DRAWN} draws in a row")


def our_batches(group: Sequence[Clip], folder: pathlib.Path, batch: int, workers: int) -> pipeline.Batches:
    """Training batches of the clips, from a data set that is built of them."""
    source, lines = folder / "clips", []
    source.mkdir()
    for number, clip in enumerate(group):
        name = f"{number}{clip.path.suffix}"
        (source / name).write_bytes(clip.media)
        lines.append(json.dumps({"video": name, "captions": ["a clip"], "split": "train"}))
    (source / "annotations.jsonl").write_text("\n".join(lines) + "\n")
    data = registry.open_split(f"folder:{source}", "train", BuildOptions(str(folder / "built")))
    options = pipeline.FrameOptions(FRAMES, SIZE)
    tokenizer = train_bpe(["a clip"], 300, 8)
    return pipeline.training_batches([data], [1.0], options, tokenizer, batch_size=batch, seed=0, workers=workers)


def clips_a_second(batches: Iterator[Any], batch: int, count: int) -> float:
    """Clips a second after the first batches, which wait for the workers to start."""
    for _ in range(2):
        next(batches)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * batch / (time.perf_counter() - started)


def through_workers(group: Sequence[Clip], best: dict[str, str], given: argparse.Namespace) -> dict[str, Any]:
    """Clips per wall second with the given number of worker processes."""
    from torch.utils.data import DataLoader

    rates = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        our_batches(group, pathlib.Path(folder), given.batch, given.workers) as batches,
    ):
        rates["ours"] = clips_a_second(batches, given.batch, given.batches)
    for library in ("torchcodec", "OpenCV"):
        clips = Random(group, best[library], (given.batches + 2 + 4 * given.workers) * given.batch)
        loader = DataLoader(clips, given.batch, num_workers=given.workers, multiprocessing_context="spawn")
        rates[library] = clips_a_second(iter(loader), given.batch, given.batches)
    ratios = {f"ours over {name}": rates["ours"] / rate for name, rate in rates.items() if name != "ours"}
    return {"clips a second": rates, **ratios}


def main() -> None:
    """Measures the videos of a folder, and adds each group to `decode.json` as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=pathlib.Path, required=True, help="a folder of folders of videos")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs")
    parser.add_argument("--most", type=int, default=20, help="maximum number of clips in a group")
    parser.add_argument("--close", type=float, default=4.0, help="maximum difference of equal frames, in levels of 256")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the pipelines")
    parser.add_argument("--batch", type=int, default=8, help="clips in a batch of the pipelines")
    parser.add_argument("--batches", type=int, default=20, help="timed batches")
    given = parser.parse_args()
    settings = {name: value for name, value in vars(given).items() if name != "videos"}
    for name, group in clips(given.videos.resolve(), given.most).items():
        add_record(RESULTS, name, {**settings, **compared(group, given), **versions(), **made_with()})


def compared(group: Sequence[Clip], given: argparse.Namespace) -> dict[str, Any]:
    """All measurements of a group of clips."""
    differing = {}
    for clip in group:
        found = disagreements(clip, given.close)
        if found:
            differing[clip.path.name] = found
    timed = [clip for clip in group if not _fails(differing.get(clip.path.name, {}))]
    record: dict[str, Any] = {"clips": len(group), "read by all": len(timed), "differ from ours": differing}
    if timed:
        record["decoding"] = decoding(timed, given.repeats)
        record["pipeline"] = through_workers(timed, record["decoding"]["best"], given)
    return record


def _fails(found: dict[str, str]) -> bool:
    return any(what.startswith("fails") for what in found.values())


def versions() -> dict[str, str]:
    """The versions of the libraries."""
    import av
    import cv2
    import torchcodec

    return {"av": av.__version__, "torchcodec": torchcodec.__version__, "opencv": cv2.__version__}


if __name__ == "__main__":
    main()
