"""The speed of a training step, compared with the same model in PyTorch on the same machine.

    python -m experiments.speed.train_step --size=b32 --batch=2 --frames=2
    python -m experiments.speed.train_step --size=l14 --dtype=bfloat16 --batch=64 --remat=dots      on a GPU
    python -m experiments.speed.train_step --size=tiny --stage=adapt --batch=2 --repeats=1          a trial

A step is the loss (contrastive learning, captioning, masked language modelling), its gradient, clipping and AdamW, with
float32 parameters; `blend` trains everything on both streams, `adapt` trains adapters and decoder on the video stream.
PyTorch gets the model of `torch_vlab.py` with our parameters and batch, SDPA, fused AdamW, and on a GPU `torch.compile`
and autocast to `--dtype`. First both must reach the same loss and gradient norm; then their runs alternate, and the
ratio of medians counts.
"""

import argparse
import functools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed import program
from experiments.timing import add_record, made_with, medians
from vlab_jax.runtime import sharding
from vlab_jax.runtime.profiling import peak_flops
from vlab_jax.training import objectives, optim
from vlab_jax.training.setup import read_stage

RESULTS = pathlib.Path(__file__).with_name("train_step.json")
CLOSE = {"float32": 1e-4, "bfloat16": 3e-2}


def ours(step: program.Program, parameters: Any, batch: Mapping[str, np.ndarray]) -> Callable[[], dict[str, float]]:
    """A function that takes one training step, and returns its loss and gradient norm."""
    state = step.stage.initial(jax.device_put(parameters, step.stage.shardings.parameters))
    placed = sharding.to_global(batch, step.mesh)

    def run() -> dict[str, float]:
        nonlocal state
        state, metrics = step.stage.step(state, placed)
        jax.block_until_ready(state)
        return {name: float(metrics[name]) for name in ("loss", "gradient_norm")}

    return run


def theirs(step: program.Program, stage: str, parameters: Any, batch: Mapping[str, np.ndarray]) -> "Theirs":
    """The same function in PyTorch."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tests"))
    from pytorch import pytorch  # the version of the parity tests

    return Theirs(pytorch(), step, stage, parameters, batch)


class Theirs:
    """The PyTorch model, its optimiser and its batch; a call takes a step."""

    def __init__(self, torch: Any, step: program.Program, stage: str, parameters: Any, batch: Mapping[str, np.ndarray]):
        from experiments.speed.torch_vlab import VlabLoss, load

        self.torch, fields = torch, step.config.stage[stage]
        objective = read_stage(step.config, stage).objective
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.half = None if step.config.dtype == "float32" else getattr(torch, step.config.dtype)
        description = {name: getattr(step.model, name) for name in step.model.__dataclass_fields__ if name != "parent"}
        model = VlabLoss(description, objective.streams, objective.image_frames, objective.label_smoothing)
        paths = load(model, parameters)
        self.model = model.to(self.device)
        self.optimizer = self._optimizer(paths, step.stage.groups, fields)
        self.clip_norm = fields.clip_norm or float("inf")
        key = jax.random.fold_in(jax.random.key(step.config.seed), 0)  # the random choice of our first step
        texts = (jnp.asarray(batch[name]) for name in ("tokens", "lengths"))
        masked = objectives.draw_masked_tokens(key, *texts, objective.masked_share)
        given = {**batch, "masked": np.asarray(masked)}
        self.batch = {name: torch.from_numpy(value.copy()).to(self.device) for name, value in given.items()}
        for name in ("tokens", "lengths"):
            self.batch[name] = self.batch[name].long()
        self.loss = torch.compile(self.model) if self.device == "cuda" else self.model

    def _optimizer(self, paths: Mapping[str, Any], groups: Any, fields: Any) -> Any:
        """AdamW with our groups: peak learning rates and weight decay; frozen parameters need no gradient."""
        chosen = []
        for path, parameters in paths.items():
            rate = next(group.learning_rate for group in groups if re.search(group.pattern, path))
            for parameter in parameters:
                parameter.requires_grad_(rate is not None)
            if rate is not None:
                decay = fields.weight_decay if optim.DECAYED.search(path) else 0.0
                chosen.append({"params": parameters, "lr": rate, "weight_decay": decay})
        return self.torch.optim.AdamW(chosen, betas=(fields.b1, fields.b2), eps=1e-6, fused=True)

    def __call__(self) -> dict[str, float]:
        torch = self.torch
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, self.half or torch.bfloat16, enabled=self.half is not None):
            loss = self.loss(self.batch)
        loss.backward()
        learned = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(learned, self.clip_norm)
        self.optimizer.step()
        return {"loss": loss.item(), "gradient_norm": norm.item()}  # reading the loss waits for the device

    def parameters(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def flops(self) -> float:
        """FLOPs of a forward and a backward pass, by PyTorch's own count, with plain attention."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.model(self.batch).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return float(counter.get_total_flops())


def compared(given: argparse.Namespace) -> dict[str, Any]:
    """Checks that both models' steps compute the same, and times them."""
    step = program.from_arguments(given, program.one_device())
    return measured(step, given.stage, given.repeats, given.alone)


def measured(step: program.Program, stage: str, repeats: int, alone: bool = False) -> dict[str, Any]:
    """See `compared`; `alone` leaves PyTorch out.

    Raises:
      ValueError: the two differ in loss, gradient norm or number of parameters.
    """
    parameters, batch = program.random_parameters(step), program.random_batch(step)
    runs: dict[str, Callable[[], dict[str, float]]] = {"ours": ours(step, parameters, batch)}
    recorded: dict[str, Any] = {**step.run_shapes(), "dtype": step.config.dtype}
    if not alone:
        other = theirs(step, stage, parameters, batch)
        recorded["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(step.stage.shapes.parameters))
        if recorded["parameters"] != other.parameters():
            raise ValueError(f"{recorded['parameters']} parameters here, {other.parameters()} in PyTorch")
        recorded["PyTorch's FLOPs over ours"] = other.flops() / step.stage.cost.flops
        runs["PyTorch"] = other
    firsts = {name: run() for name, run in runs.items()}  # compiles; not counted
    if not alone:
        recorded["differences"] = same(firsts, CLOSE[step.config.dtype])
    seconds = medians(runs, repeats, log=functools.partial(print, file=sys.stderr, flush=True))
    recorded |= {"first step": firsts, "seconds": seconds, "model FLOPs": step.stage.cost.flops}
    if not alone:
        recorded["ours over PyTorch, throughput"] = seconds["PyTorch"] / seconds["ours"]
    peak = peak_flops(list(step.mesh.devices.flat))
    rates = {name: step.stage.cost.flops / each for name, each in seconds.items()}
    recorded["TFLOP/s"] = {name: rate / 1e12 for name, rate in rates.items()}
    if peak is not None:
        recorded["MFU"] = {name: rate / peak for name, rate in rates.items()}
    return recorded


def same(firsts: Mapping[str, Mapping[str, float]], close: float) -> dict[str, float]:
    """The relative differences of loss and gradient norm.

    Raises:
      ValueError: one of them is larger than `close`.
    """
    one, other = firsts["ours"], firsts["PyTorch"]
    found = {name: abs(one[name] - other[name]) / abs(other[name]) for name in one}
    if max(found.values()) > close:
        raise ValueError(f"the two models differ: {firsts}")
    return found


def main() -> None:
    """Measures one size and adds it to `train_step.json`."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both libraries share the GPU's memory
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.add_arguments(parser, size="b32", batch=2, frames=2)
    parser.add_argument("--repeats", type=int, default=5, help="counted steps")
    parser.add_argument("--alone", action="store_true", help="without PyTorch")
    given = parser.parse_args()
    record = {**vars(given), **compared(given), "cpus": len(os.sched_getaffinity(0)), **made_with()}
    name = (
        f"{given.size}, {given.stage}, {given.batch} clips of {given.frames} frames, {given.dtype}, {record['device']}"
    )
    add_record(RESULTS, name, record)


if __name__ == "__main__":
    main()
