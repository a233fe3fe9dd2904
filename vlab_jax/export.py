"""Writes the model of a run into a directory that others can load.

    python -m vlab_jax.export --checkpoint=workdir --out=my_vlab
    python -m vlab_jax.export --checkpoint=workdir --out=my_vlab --replace
    python -m vlab_jax.export --checkpoint=workdir --out=my_clip --format=clip

The first command writes the whole VLAB: `model.safetensors` (named as the parameters are), `config.json`,
`tokenizer.json` and a model card; `python -m vlab_jax.predict` uses it, and `configs/pretrain.py:pretrained=my_vlab`
starts from it. The second replaces the first. The third writes its CLIP, without video adapters and decoder, in the
format of `transformers.CLIPModel.from_pretrained`.

Exit status: 0 done; 1 an error in the program; 2 a mistake in the command or the checkpoint.
"""

import argparse
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from vlab_jax.errors import InputError

FORMATS = ("vlab", "clip")  # a whole VLAB; its CLIP in Hugging Face's format


def export(checkpoint: pathlib.Path, out: pathlib.Path, kind: str = "vlab", replace: bool = False) -> None:
    """Writes a checkpoint's model, with the moving average of its parameters if the run kept one.

    Args:
      checkpoint: a run's workdir (its tested checkpoint, or its newest) or one of its `checkpoints/<step>`.
      kind: of `FORMATS`.
      replace: whether an export at `out` is replaced.

    Raises:
      InputError: there is no checkpoint, `out` exists, or `transformers` does not have this kind of CLIP.
    """
    from vlab_jax.data import tokenizer as tokenizers  # here, because these imports take seconds
    from vlab_jax.pretrained import export as formats
    from vlab_jax.restore import restore
    from vlab_jax.runtime import sharding

    with formats.new_folder(out, replace) as folder:
        restored = restore(checkpoint, sharding.make_mesh())
        home, config, parameters = restored.home, restored.config, restored.parameters
        text = config["model"]["text"]
        tokenizer = tokenizers.load(home, text["context_length"])
        if kind == "vlab":
            saved = {"training": config, "step": restored.step, "stage": restored.stage}
            formats.write_vlab(folder, parameters, saved)
        else:
            ends = tokenizer.start, tokenizer.end
            formats.write_hugging_face(folder, parameters, config["model"]["vision"], text, *ends)
            if tokenizer.is_clips():
                formats.write_tokenizer_config(folder, text["context_length"])
        shutil.copyfile(home / tokenizers.FILE, folder / tokenizers.FILE)
        results, base = _read_json(home / "results.json") or {}, _read_json(home / "pretrained.json")
        (folder / "README.md").write_text(formats.model_card(kind, config, restored.step, results, base))


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vlab_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a run's workdir, or one of its checkpoints/<step>")
    parser.add_argument("--out", required=True, help="the directory to create")
    parser.add_argument("--format", choices=FORMATS, default="vlab", help="the whole VLAB (default), or its CLIP")
    parser.add_argument("--replace", action="store_true", help="replace an export that exists")
    options = parser.parse_args(arguments)
    try:
        export(pathlib.Path(options.checkpoint), pathlib.Path(options.out), options.format, options.replace)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
