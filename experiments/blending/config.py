"""One arm of the experiment on feature blending: a tiny model on `motion/glyphs`.

    python -m vlab_jax.main --config=experiments/blending/config.py:concat_separate --workdir=workdir_concat

The first stage sees a glyph in every still, and the words tell it. The videos that the other stages see have
glyphs too, and 5 % of their words tell them. The test asks for what moves and for the glyph. `README.md` says what the
arms are for.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import recipe

BLEND_STEPS = 500
SEPARATE = {"model.image_encoder": "separate"}
# CLIP's own features stay as the stills taught them.
KEPT = {**SEPARATE, "stage.blend.groups": (("^image_encoder/", "frozen"),)}
# The fields in which each arm differs from the first; groups are put in front of those of `configs/pretrain.py`.
CHANGES: dict[str, dict[str, Any]] = {
    "concat_separate": SEPARATE,
    "concat_shared": {},
    "none": {"model.decoder.blending": "none", "stage.blend.streams": ("video",)},
    "image_only": {
        "model.decoder.blending": "image_only",
        "stage.adapt.streams": ("image",),
        "stage.blend.streams": ("image",),
    },
    "concat_kept": KEPT,
    "parallel_separate": {**SEPARATE, "model.decoder.blending": "parallel"},
    "parallel_shared": {"model.decoder.blending": "parallel"},
    "stacked_separate": {**SEPARATE, "model.decoder.blending": "stacked"},
    "stacked_shared": {"model.decoder.blending": "stacked"},
    # More of the embedding from the image stream.
    "kept_blend_0.3": {**KEPT, "model.embedding_blend": 0.3},
    "kept_blend_0.5": {**KEPT, "model.embedding_blend": 0.5},
    # Stills go on being seen, one clip in ten.
    "none_with_stills": {
        "model.decoder.blending": "none",
        "stage.blend.streams": ("video",),
        "stage.blend.train": ("motion/glyphs@0.9", "motion/glyphs_still@0.1"),
    },
    "kept_with_stills": {**KEPT, "stage.blend.train": ("motion/glyphs@0.9", "motion/glyphs_still@0.1")},
}
HEADLINE = ("concat_separate", "none", "image_only")
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
    ("concat_separate", "none"),
    ("concat_separate", "image_only"),
    ("concat_kept", "none"),
    ("concat_kept", "image_only"),
    ("concat_shared", "none"),
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
