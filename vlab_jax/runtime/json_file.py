"""JSON files that are never half written."""

import json
import os
import pathlib
from typing import Any


def write_json(path: pathlib.Path, content: Any, **spelling: Any) -> None:
    """Writes a value in one move: a kill leaves the old file or the new one.

    Args:
      spelling: options of `json.dumps`; the indent is 2 by default.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, **{"indent": 2, **spelling}) + "\n", encoding="utf-8")
    os.replace(temporary, path)
