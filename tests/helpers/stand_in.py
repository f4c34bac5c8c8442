"""A stub package named paroquant."""

from __future__ import annotations

from pathlib import Path

STAND_IN = "def load(model_path, lazy=False, force_text=False):\n    return 'theirs'\n"


def stand_in(directory: Path, path="inference/backends/mlx/load.py", text=STAND_IN) -> Path:
    """Write a package named paroquant with this loader."""
    file = directory / "paroquant" / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    for parent in [file.parent, *file.relative_to(directory).parents]:
        if (directory / parent) != directory:
            (directory / parent / "__init__.py").touch()
    return directory
