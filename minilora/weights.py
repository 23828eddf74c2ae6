"""How a base model's files hold its weights: which of them lie transposed, and what lies there besides.

The files know no model, and a model is built of linear layers, W (O, I): what is between them is a few tables.
"""

from __future__ import annotations

import numpy as np

# Layers whose weight W (O, I) the files of a type of model hold as (in, out), by the last part of their paths.
FAN_IN_FAN_OUT = {"gpt2": ("c_attn", "c_proj", "c_fc")}
# What old files hold besides weights, by the ends of its keys: tables of the rotation, masks of attention.
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def transposed(model_type: str, key: str) -> bool:
    """Do the files of this type of model hold a weight's transpose under `key`?"""
    path, _, tensor = key.rpartition(".")
    return tensor == "weight" and path.rpartition(".")[2] in FAN_IN_FAN_OUT.get(model_type, ())


def turned(model_type: str, key: str, array: np.ndarray) -> np.ndarray:
    """From a parameter to what the files hold under `key`, or back: its transpose, or as good as always itself."""
    return np.ascontiguousarray(array.T) if transposed(model_type, key) else array
