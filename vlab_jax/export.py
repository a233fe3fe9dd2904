"""Writes the model of a run into a directory that others can load.

    python -m vlab_jax.export --checkpoint=workdir --out=my_vlab
    python -m vlab_jax.export --checkpoint=workdir --out=my_vlab --replace
    python -m vlab_jax.export --checkpoint=workdir --out=my_clip --format=clip

The first writes the whole VLAB: `model.safetensors` (named as the parameters are), `config.json`, `tokenizer.json` and
a model card; `python -m vlab_jax.predict` uses it, and `configs/pretrain.py:pretrained=my_vlab` starts from it. The
second takes the place of the first. The third writes the CLIP in it, without video adapters and decoder, as
`transformers.CLIPModel.from_pretrained` reads it.

Exit status: 0 done; 1 a fault of the program; 2 something to mend in the command or the checkpoint.
"""

import argparse
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from vlab_jax.errors import InputError

FORMATS = ("vlab", "clip")


def export(checkpoint: pathlib.Path, out: pathlib.Path, kind: str = "vlab", replace: bool = False) -> None:
    """Writes a checkpoint's model; its parameters' moving average where the run kept one.

    Args:
      checkpoint: a run's workdir (the checkpoint it was tested with, or its newest) or its `checkpoints/<step>`.
      out: the directory to make.
      kind: `vlab` (all of it) or `clip` (the CLIP in it, in Hugging Face's format).
      replace: whether an export at `out` is replaced.

    Raises:
      InputError: there is no checkpoint, `out` exists, or the CLIP is of a kind that `transformers` does not have.
    """
    from vlab_jax.data import tokenizer as tokenizers  # here, because all this takes seconds
    from vlab_jax.pretrained import export as writing
    from vlab_jax.pretrained.export import model_card
    from vlab_jax.restore import restore
    from vlab_jax.runtime import sharding

    with writing.new_folder(out, replace) as folder:
        restored = restore(checkpoint, sharding.make_mesh())
        home, step, config, parameters = restored.home, restored.step, restored.config, restored.parameters
        text = config["model"]["text"]
        tokenizer = tokenizers.load(home, text["context_length"])
        if kind == "vlab":
            writing.write_vlab(folder, parameters, {"training": config, "step": step, "stage": restored.stage})
        else:
            ends = (tokenizer.start, tokenizer.end)
            writing.write_hugging_face(folder, parameters, config["model"]["vision"], text, *ends)
            if tokenizer.is_clips():
                writing.write_tokenizer_config(folder, text["context_length"])
        shutil.copyfile(home / tokenizers.FILE, folder / tokenizers.FILE)
        card = model_card(kind, config, step, _json(home / "results.json") or {}, _json(home / "pretrained.json"))
        (folder / "README.md").write_text(card)


def _json(path: pathlib.Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vlab_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a run's workdir, or one of its checkpoints/<step>")
    parser.add_argument("--out", required=True, help="the directory to make")
    parser.add_argument("--format", choices=FORMATS, default="vlab", help="what to write (default: the whole VLAB)")
    parser.add_argument("--replace", action="store_true", help="take the place of an export that is there")
    given = parser.parse_args(arguments)
    try:
        export(pathlib.Path(given.checkpoint), pathlib.Path(given.out), given.format, given.replace)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
