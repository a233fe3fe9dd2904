"""One arm of the experiment on feature blending: a tiny model on `motion/glyphs`.

    python -m vlab_jax.main --config=experiments/blending/config.py:concat_separate --workdir=workdir_concat

Every still of the first stage shows a glyph, and its caption mentions it. The videos of the other stages show glyphs,
too, but only 5 % of their captions mention them. The test covers motion and the glyph. `README.md` describes the arms.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import pretrain
from experiments import recipe

BLEND_STEPS = 500
SEPARATE = {"model.image_encoder": "separate"}
# The image stream's CLIP stays frozen after the stills.
KEPT = {**SEPARATE, "stage.blend.groups": (pretrain.KEPT_IMAGE_ENCODER,)}
ENCODERS = {"separate": SEPARATE, "shared": {}, "kept": KEPT}
IMAGE_ALONE = {
    "model.decoder.blending": "image_only",
    "stage.adapt.streams": ("image",),
    "stage.blend.streams": ("image",),
}
CLIP_FROZEN = {"stage.blend.groups": (("^vision/", "frozen"),)}
# Training continues with stills, one clip in ten.
WITH_STILLS = {"stage.blend.train": ("motion/glyphs@0.9", "motion/glyphs_still@0.1")}
# The fields that differ from the first arm; `groups` go before those of `configs/pretrain.py`.
CHANGES: dict[str, dict[str, Any]] = {
    **{
        f"{blending}_{encoder}": {**changes, "model.decoder.blending": blending}
        for blending in ("concat", "parallel", "stacked")
        for encoder, changes in ENCODERS.items()
    },
    "none": recipe.VIDEO_ALONE,
    "none_kept": {**recipe.VIDEO_ALONE, **CLIP_FROZEN},
    "image_only": IMAGE_ALONE,
    "image_only_kept": {**IMAGE_ALONE, **CLIP_FROZEN},
    # The image stream's CLIP is trained at 1/25 of the adapters' rate, as in `configs/pretrain.py` for large models.
    "concat_slow": {**SEPARATE, "stage.blend.groups": (("^image_encoder/", 2e-4),)},
    # A larger share of the embedding for the image stream.
    "kept_blend_0.5": {**KEPT, "model.embedding_blend": 0.5},
    "kept_with_stills": {**KEPT, **WITH_STILLS},
    "none_with_stills": {**recipe.VIDEO_ALONE, **WITH_STILLS},
}
# Five seeds also for the arms with stills, since with them the video stream alone forgot the glyph with one seed and
# not with another; for `stacked_separate`, whose first seed kept the glyph although it was trained end to end; and for
# each kind of blending with a frozen copy of CLIP, since `configs/pretrain.py` uses one of them.
HEADLINE = (
    "concat_separate",
    "concat_kept",
    "stacked_separate",
    "stacked_kept",
    "parallel_kept",
    "none",
    "image_only_kept",
    "kept_with_stills",
    "none_with_stills",
)
ARMS = {arm: 5 if arm in HEADLINE else 2 for arm in CHANGES}
ROW = recipe.ROW
FIGURES = {
    "R@1": "text_to_video/R@1",
    "twins": "twin_accuracy",
    "detail": "detail_accuracy",
    "CIDEr": "CIDEr",
    "QA motion": "QA motion",
    "QA order": "QA order",
    "QA glyph": "QA glyph",
    "QA all": "QA all",
}
COMPARED = (
    ("concat_kept", "none"),
    ("concat_kept", "image_only_kept"),
    ("concat_kept", "concat_separate"),
    ("concat_separate", "none"),
    ("concat_separate", "image_only_kept"),
    ("stacked_separate", "none"),
    ("stacked_separate", "image_only_kept"),
    ("stacked_separate", "concat_separate"),
    ("stacked_kept", "none"),
    ("stacked_kept", "image_only_kept"),
    ("stacked_kept", "stacked_separate"),
    ("parallel_kept", "none"),
    ("parallel_kept", "image_only_kept"),
    # Which blending is best, and which other arms keep the glyph.
    ("stacked_shared", "none"),
    ("concat_shared", "none"),
    ("parallel_kept", "concat_kept"),
    ("stacked_kept", "concat_kept"),
    ("stacked_kept", "parallel_kept"),
    ("concat_slow", "concat_kept"),
    ("none_kept", "none"),
    ("concat_kept", "none_kept"),
    ("kept_blend_0.5", "concat_kept"),
    ("none_with_stills", "none"),
    ("kept_with_stills", "concat_kept"),
    ("kept_with_stills", "none_with_stills"),
)


def get_config(arm: str = "concat_separate") -> ConfigDict:
    """The config of an arm.

    Raises:
      InputError: there is no such arm.
    """
    recipe.check_arm("blending", arm, CHANGES)
    config = recipe.tiny(BLEND_STEPS)
    config.data.train, config.data.evaluate = ("motion/glyphs",), "motion/glyphs"
    config.stage.clip.update({"train": ("motion/glyphs_still",), "steps": 300})
    config.evaluation.multiple_choice = ("twin", "detail")
    changes = dict(CHANGES[arm])
    groups = changes.pop("stage.blend.groups", ())
    config.stage.blend.groups = (*groups, *config.stage.blend.groups)
    config.update_from_flattened_dict(changes)
    return config
