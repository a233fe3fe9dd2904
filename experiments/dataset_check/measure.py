"""Peak memory and time of `vlab_jax.datasets.check` on WebVid CSVs with the given numbers of rows.

    python -m experiments.dataset_check.measure --rows 100000 1000000

The rows are synthetic: every `--every`-th row has its video, a link to one small file, in folders of a thousand; the
other videos are missing. Peak memory is that of the largest process, as the system counts it (`ru_maxrss`); the check
runs in a process of its own.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from vlab_jax.datasets.motion.dataset import CONFIGS, video_clips

VALIDATION_ROWS = 5_000


def write_corpus(folder: pathlib.Path, rows: int, every: int) -> None:
    """Writes annotations of both splits, and the videos of some rows."""
    clip = next(video_clips(CONFIGS["tiny"], "validation")).media
    (folder / "one.bin").write_bytes(clip)
    for split, count, first in (("train", rows, 0), ("val", VALIDATION_ROWS, rows)):
        with open(folder / f"results_10M_{split}.csv", "w", encoding="utf-8") as file:
            file.write("videoid,contentUrl,duration,page_dir,name\n")
            for number in range(first, first + count):
                page = f"{number // 1000 * 1000:06d}_{number // 1000 * 1000 + 999:06d}"
                caption = f"aerial view of harbour number {number % 977}, boats and clouds, take {number}"
                file.write(f'{number},https://example.org/{number}.mp4,PT00H00M10S,{page},"{caption}"\n')
                if number % every == 0:
                    (folder / "videos" / page).mkdir(parents=True, exist_ok=True)
                    os.link(folder / "one.bin", folder / "videos" / page / f"{number}.mp4")


def measure(rows: int, every: int, work: pathlib.Path) -> dict[str, float]:
    """Returns peak memory in MiB, time in seconds and size of the state in MiB of one check."""
    folder = work / str(rows) / "webvid"
    folder.mkdir(parents=True)
    write_corpus(folder, rows, every)
    out = work / f"{rows}.tsv"
    command = [sys.executable, "-m", "vlab_jax.datasets.check", "--dataset=webvid/10m", f"--manual_dir={folder.parent}"]
    begun = time.monotonic()
    process = subprocess.Popen([*command, f"--out={out}"])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begun
    assert os.waitstatus_to_exitcode(status) == 2, "missing videos are an error"
    with open(out, encoding="utf-8") as file:
        missing = sum(line.startswith("missing\t") for line in file)
    assert missing == sum(number % every > 0 for number in range(rows + VALIDATION_ROWS)), missing
    state = out.with_name(f"{out.name}.state").stat().st_size
    shutil.rmtree(folder.parent)
    return {"rows": rows, "peak_mib": usage.ru_maxrss / 1024, "seconds": seconds, "state_mib": state / 2**20}


def main() -> None:
    """Measures each number of rows, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--every", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        for rows in given.rows:
            print(json.dumps(measure(rows, given.every, pathlib.Path(work))))


if __name__ == "__main__":
    main()
