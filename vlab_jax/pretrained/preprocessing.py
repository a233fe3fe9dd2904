"""How a checkpoint wants its images, where its files say so: this package does what CLIP does, and nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlab_jax.errors import InputError
from vlab_jax.models.clip import PIXEL_DEVIATION, PIXEL_MEAN
from vlab_jax.pretrained.files import Files

BICUBIC = (3, "bicubic", None)  # as Pillow numbers it, as OpenCLIP names it, as configs leave it out
SHORTEST = ("shortest", None)


def check_preprocessing(files: Files) -> None:
    """Compares what the folder of a checkpoint says of its images with CLIP's preprocessing.

    Raises:
      InputError: it has other means or deviations, another filter, or does not crop the centre.
    """
    ours = files.json("preprocessor_config.json")
    if ours is not None:
        where = str(files.folder / "preprocessor_config.json")
        _check_pixels(ours.get("image_mean"), ours.get("image_std"), where)
        _check_one_of(ours, "resample", BICUBIC, where)
        _check_one_of(ours, "do_center_crop", (True, None), where)
    theirs = (files.json("open_clip_config.json") or {}).get("preprocess_cfg")
    if isinstance(theirs, Mapping):
        where = f"{files.folder / 'open_clip_config.json'}: preprocess_cfg"
        _check_pixels(theirs.get("mean"), theirs.get("std"), where)
        _check_one_of(theirs, "interpolation", BICUBIC, where)
        _check_one_of(theirs, "resize_mode", SHORTEST, where)


def _check_pixels(mean: Sequence[float] | None, deviation: Sequence[float] | None, where: str) -> None:
    for name, found, wanted in (("mean", mean, PIXEL_MEAN), ("deviation", deviation, PIXEL_DEVIATION)):
        if found is not None and any(abs(one - other) > 1e-4 for one, other in zip(found, wanted, strict=True)):
            raise InputError(f"{where} asks for pixels of {name} {list(found)}; known: CLIP's {list(wanted)}")


def _check_one_of(config: Mapping[str, Any], key: str, known: Sequence[Any], where: str) -> None:
    if config.get(key) not in known:
        raise InputError(f"{where}: {key} is {config[key]!r}; known: {known[0]!r}, as in CLIP")
