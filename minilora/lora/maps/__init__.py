"""LoRA's relatives: methods that add dW, a function of the trained theta, to a frozen weight.

    loha        dW = s (A1 B1) ∘ (A2 B2)
    lokr        dW = s C ⊗ E
    hira        dW = W ∘ (B A)
    vera        dW = diag(b) B diag(d) A, with A and B frozen and shared
    ia3         W' = diag(l) W, or W diag(l)
    oft         W' = W R^T, R orthogonal by blocks
    fourierft   dW = alpha Re ifft2(F), F with n coefficients
    miss        dW = D^T E, E frozen
    scattered   one vector for the whole model: intrinsic dimension, Uni-LoRA

contract.py defines what a method is, adapter.py trains, merges and saves all of them, and
streams.py has torch's random numbers. A new method is one file like loha.py, and one line of MAPS.
"""

from __future__ import annotations

from .contract import Map, MapConfig
from .fourierft import FourierFTConfig
from .hira import HiraConfig
from .ia3 import IA3Config
from .loha import LoHaConfig
from .lokr import LoKrConfig
from .miss import MissConfig
from .oft import OFTConfig
from .scattered import IntrinsicConfig, UniLoraConfig
from .vera import VeraConfig

# Every method by its peft_type.
MAPS: dict[str, type[MapConfig]] = {
    config.peft_type: config
    for config in (
        LoHaConfig,
        LoKrConfig,
        HiraConfig,
        VeraConfig,
        OFTConfig,
        IA3Config,
        FourierFTConfig,
        MissConfig,
        UniLoraConfig,
        IntrinsicConfig,
    )
}

__all__ = [
    "MAPS",
    "FourierFTConfig",
    "HiraConfig",
    "IA3Config",
    "IntrinsicConfig",
    "LoHaConfig",
    "LoKrConfig",
    "Map",
    "MapConfig",
    "MissConfig",
    "OFTConfig",
    "UniLoraConfig",
    "VeraConfig",
]
