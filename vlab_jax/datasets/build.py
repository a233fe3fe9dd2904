"""Prepares a data set ahead of time: as the files are obtained, or as frames, which trains fast.

    python -m vlab_jax.datasets.build --dataset=msrvtt --manual_dir=/data/msrvtt --variant=frames
    python -m vlab_jax.datasets.build --dataset=folder:/my/videos --variant=frames --frame_rate=2 --short_side=224

A run with the same data.directory, data.variant and so on then finds it. (Without this command, the first run prepares
it.) The frames variant decodes each clip once, on all cores, and stores its frames as JPEGs, `--frame_rate` of them a
second, with a short side of `--short_side` pixels. A clip that cannot be decoded is stored without frames and listed in
`failures.tsv` beside the data; runs count it as a clip that cannot be decoded.

Corpora that are too large for one machine are prepared by Apache Beam (pip install 'apache-beam>=2.77,<3'):

    python -m vlab_jax.datasets.build --dataset=webvid --manual_dir=/mnt/corpus/webvid \\
      --directory=/mnt/corpus/prepared --variant=frames \\
      --beam --beam_options=--runner=FlinkRunner,--flink_master=host:8081

Workers need this package, and the files under the same paths, or under others that `--beam_paths` gives. After an
interruption, the same command continues. docs/frames.md has Dataflow, Flink and Spark.

Exit status: 0 done; 1 a bug in the program; 2 an error in the command or the data; 3 the build cannot go on.
"""

import argparse
import functools
import logging
import re
import sys
from collections.abc import Sequence

from absl import logging as absl_logging

from vlab_jax.data.media import add_limit_flags, limit_fields
from vlab_jax.datasets import beam_build, records, registry
from vlab_jax.datasets.beam_build import BeamOptions
from vlab_jax.datasets.records import VARIANTS, BuildOptions
from vlab_jax.errors import InputError, RunStopped


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command line, with the names of the fields of a config's `data`."""
    default = BuildOptions()
    parser = argparse.ArgumentParser(
        prog="python -m vlab_jax.datasets.build",
        description=__doc__,
        epilog=registry.specs_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", required=True, help="name, name/configuration or folder:directory")
    add("--manual_dir", default="", help="directory of official annotation files and media")
    add("--directory", default="", help="directory of prepared data sets (default: TFDS_DATA_DIR or TFDS's own)")
    add("--allow_missing", action="store_true", help="leave out clips whose media are missing, instead of refusing")
    add("--variant", choices=VARIANTS, default=default.variant, help="what is stored (default: %(default)s)")
    add("--frame_rate", type=float, default=default.frame_rate, help="frames a second (default: %(default)s)")
    add("--short_side", type=int, default=default.short_side, help="pixels, at most (default: %(default)s)")
    add("--jpeg_quality", type=int, default=default.jpeg_quality, help="1 to 100 (default: %(default)s)")
    add("--workers", type=int, default=-1, help="processes that decode; 0: this one (default: one for each core)")
    add_limit_flags(parser)
    add("--beam", action="store_true", help="run as an Apache Beam pipeline")
    runner = "flags of Beam and its runner, separated by commas (default: Beam's runner on this machine)"
    add("--beam_options", default="", metavar="--runner=...,--...", help=runner)
    add("--beam_paths", default="", metavar="HERE=THERE", help="the workers' paths, as in /mnt/b=gs://b")
    add("--clips_per_shard", type=int, default=BeamOptions.clips_per_shard, help="with --beam (default: %(default)s)")
    return parser


def _split_flags(text: str) -> tuple[str, ...]:
    """Splits flags at the commas between them, not at those within a value."""
    return tuple(filter(None, re.split(r",(?=--)", text)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    flags = make_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    try:
        options = BuildOptions.from_fields({**vars(flags), "limits": limit_fields(vars(flags))})
        beam = BeamOptions(_split_flags(flags.beam_options), flags.clips_per_shard, flags.beam_paths)
        if beam != BeamOptions() and not flags.beam:
            raise InputError("--beam_options, --beam_paths and --clips_per_shard are for --beam; add it")
        build = functools.partial(beam_build.build, beam=beam) if flags.beam else records.build
        builder = registry.prepare(flags.dataset, options, build)
    except (InputError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 3
    print(f"{builder.info.full_name} in {builder.data_dir}")
    for name, split in builder.info.splits.items():
        print(f"  {name}: {split.num_examples:,} clips, {split.num_bytes / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
