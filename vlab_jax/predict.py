"""Use a trained model on your own videos.

    python -m vlab_jax.predict caption clip.mp4 --model=my_vlab
    python -m vlab_jax.predict answer clip.mp4 --question="what is the man doing?" --model=my_vlab
    python -m vlab_jax.predict rank clip.mp4 --text="a dog runs" --text="a cat sleeps" --model=my_vlab
    python -m vlab_jax.predict index /my/videos --index=my_index --model=my_vlab
    python -m vlab_jax.predict search "a dog catches a frisbee" --index=my_index
    python -m vlab_jax.predict serve --index=my_index

The model is a directory that vlab_jax.export wrote, or a run's workdir; `make demo` makes both. Videos are files of any
kind that FFmpeg reads, images, and folders of them. Answers go to standard output, progress and messages to standard
error. Each command has its own help: python -m vlab_jax.predict caption --help

Exit status: 0 success; 1 a bug in the program; 2 the command, the model or a video has to be mended (other videos are
done); 3 the program cannot go on.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from vlab_jax.errors import InputError, RunStopped
from vlab_jax.inference import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vlab_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_commands(parser.add_subparsers(title="commands", metavar="COMMAND", required=True))
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        return args.run(args)
    except (InputError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 3
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
