"""Which files a checkpoint is in. Without torch: what is checked before a start needs it too."""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import ConfigError

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """Those that the index names, or where there is none all in the folder. Raises ConfigError if there are none."""
    index = folder / INDEX
    if index.exists():
        try:
            return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} is malformed: {error!r}") from None
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ConfigError(
            f"the model folder {str(folder)!r} (MOECULE_MODEL) holds no .safetensors file: with "
            "MOECULE_WEIGHTS=random weights are drawn, from its config.json alone"
        )
    return paths
