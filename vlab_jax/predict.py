"""Uses a trained model on one's own videos.

    python -m vlab_jax.predict caption clip.mp4 --model=my_vlab
    python -m vlab_jax.predict answer clip.mp4 --question="what is the man doing?" --model=my_vlab
    python -m vlab_jax.predict rank clip.mp4 --text="a dog runs" --text="a cat sleeps" --model=my_vlab
    python -m vlab_jax.predict index /my/videos --index=my_index --model=my_vlab
    python -m vlab_jax.predict search "a dog catches a frisbee" --index=my_index
    python -m vlab_jax.predict serve --index=my_index

The model is a directory that vlab_jax.export wrote, or a run's workdir; `make demo` makes both. Videos are files of any
kind that FFmpeg reads, images, and folders of them. What is printed is the answer, on standard output; progress and
messages go to standard error. Each command's own help says more: python -m vlab_jax.predict caption --help

Exit status: 0 done; 1 a fault of the program; 2 something to mend in the command, the model or a video (the others are
done); 3 it cannot go on.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from vlab_jax.errors import InputError, RunStopped
from vlab_jax.inference import cli

COMMANDS = (cli.add_caption, cli.add_answer, cli.add_rank, cli.add_index, cli.add_search, cli.add_serve)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vlab_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(subparsers)
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        return given.run(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
