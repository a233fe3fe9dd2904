"""Fine-tuning on one task: what `configs/retrieval.py`, `captioning.py` and `question_answering.py` have in common."""

from ml_collections import ConfigDict

from configs import benchmarks
from configs.pretrained import start_from
from vlab_jax.config import stage_config, training_config
from vlab_jax.errors import InputError

NAMED = ("pretrained", "data", "manual_dir")
VARIANTS = ("end_to_end",)


def parse(
    argument: str, where: str, named: tuple[str, ...] = NAMED, variants: tuple[str, ...] = ()
) -> tuple[str, dict[str, str]]:
    """Splits a config's argument into a benchmark's name (empty: none) and its options; variants have empty values.

    Raises:
      InputError: a part of the argument is none of these.
    """
    benchmark, options = "", {}
    for part in filter(None, argument.split(",")):
        name, equals, value = part.partition("=")
        if (equals and name in named and value) or part in variants:
            options[name] = value
        elif not equals and not benchmark:
            benchmark = part
        else:
            known = ", ".join([*(f"{name}=…" for name in named), *variants])
            raise InputError(f"{where} takes the name of a benchmark and {known}, each once, not {part!r}")
    return benchmark, options


def fine_tuning(task: str, argument: str) -> ConfigDict:
    """A config that trains and evaluates one task.

    Args:
      task: `retrieval`, `captioning` or `question_answering`.
      argument: `pretrained=<weights>`; with it the name of a benchmark or `data=<data set>` (default: the export's own
        data); `manual_dir=<directory>` of the official files; `end_to_end`, which also trains the parts of CLIP that
        the export's training kept frozen.

    Raises:
      InputError: the argument lacks `pretrained=<weights>`, or has an unknown part.
    """
    where = f"configs/{task}.py"
    name, options = parse(argument, where, variants=VARIANTS)
    benchmark = benchmarks.find(task, name) if name else None
    if "pretrained" not in options:
        raise InputError(f"{where} needs pretrained=<weights>; a benchmark or data=<data set> may be added")
    config = training_config()
    kept = start_from(config, options["pretrained"])
    if benchmark is None:
        _moderate(config, task)
    else:
        benchmarks.follow(config, task, benchmark)
    if kept and "end_to_end" not in options:
        config.stage[task].groups = ((f"^({'|'.join(kept)})", "frozen"), *config.stage[task].groups)
    if "data" in options:
        config.data.train, config.data.evaluate = (options["data"],), options["data"]
    config.data.manual_dir = options.get("manual_dir", "")
    return config


def _moderate(config: ConfigDict, task: str) -> None:
    """Sets steps and learning rates for your own clips (reconstruction)."""
    objective = "contrastive" if task == "retrieval" else task
    config.stages = (task,)
    config.stage[task] = stage_config(
        steps=1000,
        batch_size=48,
        groups=benchmarks.groups(1e-4, 1e-5),
        unused="frozen",
        objectives=benchmarks.alone(objective),
    )
    if task == "retrieval":
        config.model.frame_pooling = "normalise_then_mean"  # as on the benchmarks, by CLIP4Clip
    config.evaluation.tasks = (task,)
    config.checkpoint.every = 200
