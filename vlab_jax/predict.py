"""A trained model on one's own videos.

    python -m vlab_jax.predict index /my/videos --index=my_index --model=my_vlab
    python -m vlab_jax.predict search "a dog catches a frisbee" --index=my_index

Exit status: 0 done; 1 a fault of the program; 2 something to mend in the command or the files; 3 the model gives no
numbers; 5 done but for files that cannot be decoded.
"""

import argparse
import sys
from collections.abc import Sequence

from vlab_jax.errors import InputError, RunStopped
from vlab_jax.inference.search_commands import add_commands


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vlab_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_commands(parser.add_subparsers(dest="command", required=True), _load)
    given = parser.parse_args(arguments)
    try:
        return given.run(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"error: {error}", file=sys.stderr)
        return 3


def _load(path: str):
    from vlab_jax.inference.predictor import Predictor

    return Predictor.load(path)


if __name__ == "__main__":
    sys.exit(main())
