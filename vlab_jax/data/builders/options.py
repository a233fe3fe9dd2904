"""Where data sets are read from and written to, and in which form: what `prepare` needs to know besides a spec."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlab_jax.data.limits import DEFAULT_LIMITS, MediaLimits
from vlab_jax.errors import InputError

VARIANTS = ("file", "frames")
_RANGES = {
    "frame_rate": (0.01, 1000.0),
    "short_side": (16, 65500),  # as much as JPEG allows
    "jpeg_quality": (1, 100),
    "workers": (-1, 1024),
}


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How data sets are prepared.

    Attributes:
      directory: where prepared data sets live, made if missing; empty: TFDS's default (`TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`).
      manual_dir: where official annotation files and media lie: `<manual_dir>/<data set name>/`, or `manual_dir`
        itself.
      allow_missing: leave out clips whose media are missing, instead of refusing to build.
      variant: `file`: encoded files as obtained; `frames`: resized JPEG frames.
      frame_rate: of the frames variant: frames a second, at most.
      short_side: of the frames variant: pixels of the short side, at most.
      jpeg_quality: of the frames variant: 1 to 100.
      workers: of the frames variant: processes that decode; -1: one for each core; 0: this process.
      limits: what reading and decoding one clip may take.
    """

    directory: str = ""
    manual_dir: str = ""
    allow_missing: bool = False
    variant: str = "file"
    frame_rate: float = 4.0
    short_side: int = 256
    jpeg_quality: int = 90
    workers: int = -1
    limits: MediaLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise InputError(f"variant is {self.variant!r}; it must be one of {', '.join(VARIANTS)}")
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from {low} to {high}")

    @property
    def form(self) -> str:
        """What a directory's name ends with, so that each form has its own; nothing for the variant `file`."""
        if self.variant == "file":
            return ""
        return f"-{self.variant}_{self.frame_rate:g}fps_{self.short_side}px_q{self.jpeg_quality}"

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "BuildOptions":
        """The options that the `data` fields of a config say (`config.build_fields`); other fields are passed over."""
        plain = {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name != "limits"}
        return cls(**plain, limits=MediaLimits.from_fields(fields["limits"]))
