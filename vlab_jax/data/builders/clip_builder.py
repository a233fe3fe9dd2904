"""What the builders of all data sets have in common: they say which clips there are."""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from vlab_jax.data import schema
from vlab_jax.data.builders.options import BuildOptions
from vlab_jax.data.builders.store import read


class ClipBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set of clips. `clips` names them; how they are stored is not its business.

    Its configuration may have an attribute `clips`: examples in all splits, for a progress bar.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    # Nothing is downloaded. TFDS would look for checksums with `importlib_resources`, which it does not
    # install.
    url_infos = None

    @abc.abstractmethod
    def clips(self) -> dict[str, Iterator[schema.Clip]]:
        """The clips of each split, made as they are asked for; media may be paths."""

    def title(self, options: BuildOptions) -> str:
        """What a progress bar says is being prepared."""
        return f"preparing {self.info.full_name}{' as frames' if options.variant == 'frames' else ''}"

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        """For TFDS's own tools."""
        return {split: self._generate_examples(clips) for split, clips in self.clips().items()}

    def _generate_examples(self, clips: Iterator[schema.Clip]) -> Iterator[tuple[str, dict[str, Any]]]:
        for clip in clips:
            yield clip.id, schema.to_example(dataclasses.replace(clip, media=read(clip.media)))
