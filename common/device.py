"""Where an actor computes. Imports torch, which a gateway and a scheduler never do."""

from __future__ import annotations

import torch

from common.errors import ConfigError
from common.settings import Settings


def on_gpu(settings: Settings) -> bool:
    """Raises ConfigError if a GPU is asked for that is not there."""
    if settings.device == "cpu":
        return False
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise ConfigError("MOECULE_DEVICE is 'cuda', but torch finds no GPU here")
    return there
