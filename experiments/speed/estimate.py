"""An estimate, not a measurement: the time of a step on many chips, from FLOPs, bytes and data sheets.

    python -m experiments.speed.estimate --size=l14 --chips=256 --batch=4096 --mfu=0.5

Computation: the step's model FLOPs (`models/flops.py`), shared by all chips, at `--mfu` of their peak. Communication:
for P float32 parameters, 4P bytes of gradient are reduced, and with `fsdp` 4P bytes of parameters are gathered, in the
forward and in the backward pass; a ring over n devices sends (n-1)/n of an array for each gathering or scattering.
`scaling.py` finds these volumes in compiled programs. GPUs: `fsdp` over the 8 GPUs of a machine by NVLink, `data` over
machines by InfiniBand, where each GPU reduces its eighth of the gradient. TPUs: `fsdp` over all chips of the torus.
Left out: input, latency, stragglers, the contrastive loss's embeddings (some megabytes), inefficiencies of the
compiler. The step takes between the longer of the two times (perfect overlap) and their sum.
"""

import argparse
from typing import NamedTuple

import jax

from configs.sizes import SIZES
from experiments.speed import program
from vlab_jax.runtime.profiling import PEAK_FLOPS

MACHINE = 8  # GPUs joined by NVLink


class Chip(NamedTuple):
    """Bytes a second that a chip sends: `near` within its machine or torus, `far` to other machines (0: none).

    Data sheets give twice as much, since they count both directions.
    """

    near: float
    far: float


# Data sheets: NVLink 4 has 900 GB/s a GPU, and a machine has an NDR adapter of 400 Gbit/s (each way) for each GPU; the
# links of a chip have 4,800 Gbit/s in TPU v5p (JAX calls it TPU v5) and 2,400 in v4.
CHIPS = {"H100": Chip(450e9, 50e9), "H200": Chip(450e9, 50e9), "TPU v5": Chip(300e9, 0.0), "TPU v4": Chip(150e9, 0.0)}


class Cost(NamedTuple):
    """The FLOPs and parameters of a step."""

    flops: float
    parameters: int


def cost(size: str, batch: int, frames: int) -> Cost:
    """The cost of the `blend` step of a size; nothing is computed."""
    made = program.prepared(program.configured(size, "blend", batch, frames=frames), "blend", program.one_device())
    return Cost(made.stage.cost.flops, sum(leaf.size for leaf in jax.tree.leaves(made.stage.shapes.parameters)))


def seconds(step: Cost, kind: str, chips: int, mfu: float) -> tuple[float, float]:
    """Seconds of computation, and of communication."""
    chip, peak = CHIPS[kind], dict(PEAK_FLOPS)[kind]
    near = min(chips, MACHINE) if chip.far else chips
    bytes_once = 4.0 * step.parameters
    sent = 3 * bytes_once * (near - 1) / near / chip.near  # two gathers and one reduce-scatter
    machines = chips // near
    if machines > 1:
        sent += 2 * (bytes_once / near) * (machines - 1) / machines / chip.far
    return step.flops / (chips * peak * mfu), sent


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="l14", choices=sorted(SIZES), help="a size in configs/sizes.py")
    parser.add_argument("--chips", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4096, help="clips on all chips together")
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip; the image stream takes half of them")
    parser.add_argument("--mfu", type=float, default=0.5, help="utilisation of the peak by computation alone")
    given = parser.parse_args()
    step = cost(given.size, given.batch, given.frames)
    print(f"{step.parameters / 1e6:.0f} M parameters, {step.flops / given.batch / 1e12:.2f} TFLOP a clip\n")
    print("| chip | computation, ms | communication, ms | step, ms | clips a second | of ideal |")
    print("|---|---|---|---|---|---|")
    for kind in CHIPS:
        computed, sent = seconds(step, kind, given.chips, given.mfu)
        low, high = max(computed, sent), computed + sent
        times = f"{1e3 * low:.0f} to {1e3 * high:.0f}"
        rates = f"{given.batch / high:,.0f} to {given.batch / low:,.0f}"
        ideal = f"{100 * computed / high:.0f} to {100 * computed / low:.0f} %"
        print(f"| {kind} | {1e3 * computed:.0f} | {1e3 * sent:.0f} | {times} | {rates} | {ideal} |")


if __name__ == "__main__":
    main()
