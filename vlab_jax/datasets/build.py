"""Prepares a data set ahead of time: in the form in which its files come, or as frames, which is what trains fast.

    python -m vlab_jax.datasets.build --dataset=msrvtt --manual_dir=/data/msrvtt --variant=frames
    python -m vlab_jax.datasets.build --dataset=folder:/my/videos --variant=frames --frame_rate=2 --short_side=224

Whoever trains or evaluates with the same data.directory, data.variant and so on then finds it. (Without this command it
is prepared on first use.) The frames variant decodes each clip once, on all cores, and stores its frames as JPEGs,
`--frame_rate` of them a second, with a short side of `--short_side` pixels. A clip that cannot be decoded is stored
without frames and listed in `failures.tsv` beside the data; runs count it as a clip that cannot be decoded.

Corpora that outgrow one machine are prepared by Apache Beam (pip install 'apache-beam>=2.77,<3'):

    python -m vlab_jax.datasets.build --dataset=webvid --manual_dir=/mnt/corpus/webvid --directory=/mnt/corpus/prepared \\
      --variant=frames --beam --beam_options=--runner=FlinkRunner,--flink_master=host:8081

Workers need this package, and files under the paths they have here, or under others that `--beam_paths` says. Ended
early, the same command goes on where it stopped. docs/frames.md has Dataflow, Flink and Spark.

Exit status: 0 done; 1 a fault of the program; 2 something to mend in the command or the data; 3 it cannot go on.
"""

import argparse
import functools
import logging
import pathlib
import re
import sys
from collections.abc import Sequence

import tensorflow_datasets as tfds
from absl import logging as absl_logging

from vlab_jax.data.media import add_flags, given_limits
from vlab_jax.datasets import registry
from vlab_jax.datasets.clip_builder import build as build_here
from vlab_jax.datasets.distributed import BeamOptions
from vlab_jax.datasets.distributed import build as build_by_beam
from vlab_jax.datasets.records import VARIANTS, BuildOptions
from vlab_jax.errors import InputError, RunStopped


def parser() -> argparse.ArgumentParser:
    """The flags of the command line, named as the fields of a config's `data` are."""
    default = BuildOptions()
    flags = argparse.ArgumentParser(
        prog="python -m vlab_jax.datasets.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = flags.add_argument
    add("--dataset", required=True, help="name, name/configuration or folder:directory")
    add("--manual_dir", default="", help="where official annotation files and media lie")
    add("--directory", default="", help="where prepared data sets go (default: TFDS_DATA_DIR or ~/tensorflow_datasets)")
    add("--allow_missing", action="store_true", help="leave out clips whose media are missing, instead of refusing")
    add("--variant", choices=VARIANTS, default=default.variant, help="what is stored (default: %(default)s)")
    add("--frame_rate", type=float, default=default.frame_rate, help="frames a second (default: %(default)s)")
    add("--short_side", type=int, default=default.short_side, help="pixels, at most (default: %(default)s)")
    add("--jpeg_quality", type=int, default=default.jpeg_quality, help="1 to 100 (default: %(default)s)")
    add("--workers", type=int, default=-1, help="processes that decode; 0: this one (default: one for each core)")
    add_flags(flags)
    add("--beam", action="store_true", help="run as an Apache Beam pipeline")
    add(
        "--beam_options",
        default="",
        metavar="--runner=...,--...",
        help="of Beam and its runner, with commas between (default: Beam's runner on this machine)",
    )
    add("--beam_paths", default="", metavar="HERE=THERE", help="what workers have instead, as in /mnt/b=gs://b")
    add("--clips_per_shard", type=int, default=BeamOptions.clips_per_shard, help="with --beam (default: %(default)s)")
    return flags


def build(given: argparse.Namespace) -> tfds.core.DatasetBuilder:
    """Prepares what the command line says. Raises `InputError` and `RunStopped`."""
    fields = {**vars(given), "directory": str(pathlib.Path(given.directory).expanduser()) if given.directory else ""}
    options = BuildOptions.from_fields({**fields, "limits": given_limits(fields)})
    beam = BeamOptions(_split_flags(given.beam_options), given.clips_per_shard, given.beam_paths)
    if not given.beam and (beam != BeamOptions()):
        raise InputError("--beam_options, --beam_paths and --clips_per_shard are for --beam; add it")
    by = functools.partial(build_by_beam, beam=beam) if given.beam else build_here
    return registry.prepare(given.dataset, options, by)


def _split_flags(text: str) -> tuple[str, ...]:
    """Flags with commas between; a comma within a value stays."""
    return tuple(filter(None, re.split(r",(?=--)", text)))


def _told(builder: tfds.core.DatasetBuilder) -> str:
    lines = [f"{builder.info.full_name} in {builder.data_dir}"]
    for name, split in builder.info.splits.items():
        lines.append(f"  {name}: {split.num_examples:,} clips, {split.num_bytes / 1e6:,.1f} MB")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    try:
        print(_told(build(given)))
    except (InputError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
