"""PyTorch, the reference of the parity tests, which skip without it."""

import importlib.util
import sys
from types import ModuleType

import pytest

# Operators that torchvision's Python files refer to when they are imported.
OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def pytorch() -> ModuleType:
    """The module `torch`, ready for `transformers`, `timm` and `open_clip` to be imported.

    They import torchvision, whose published builds are for CUDA. With a PyTorch without CUDA its operators are missing,
    and it cannot be imported; nothing here uses them, so their declarations suffice.
    """
    torch = pytest.importorskip("torch", reason="PyTorch is the reference of the parity tests")
    if importlib.util.find_spec("torchvision") and "torchvision" not in sys.modules and not torch.version.cuda:
        for name, signature in OPERATORS.items():
            torch.library.define(f"torchvision::{name}", signature)
        importlib.import_module("torchvision")
    return torch
