"""JSON files that are never half written."""

import json
import os
import pathlib
from typing import Any

from vlab_jax.runtime.writing import writing


def write_json(path: pathlib.Path, content: Any, **spelling: Any) -> None:
    """Writes a value in one move: a kill leaves the old file or the new one.

    Args:
      spelling: options of `json.dumps`; the indent is 2 by default.

    Raises:
      CannotWrite: the disk is full or read-only; the old file is as it was.
    """
    text = json.dumps(content, **{"indent": 2, **spelling}) + "\n"
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
