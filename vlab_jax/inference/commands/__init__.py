"""The sub-commands of `python -m vlab_jax.predict`, one a file.

Each module has `add_parser(subparsers)`, which adds its parser and sets the parser's default `run` to a function of
the parsed arguments that returns the exit status. Nothing slow is imported before `run` is called: help is at once.
"""
