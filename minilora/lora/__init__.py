"""The LoRA family: one contract, and a room for each adapter.

Orientation, once and for all, is the paper's and PEFT's: W (O, I), A (r, I), B (O, r), and

    dW = s B A          y = x W^T + s (x A^T) B^T

A is the first factor that x meets and starts random; B is the second and starts at zero. Some lessons write dW = A B
for row vectors y = x W, with A (I, r) and B (r, O): that is the same product transposed, and their A is our A^T.

config    what an adapter is to be, in PEFT's words
lora      dW = s B A
dora      W' = m (W + dW) / |W + dW|
adalora   dW = s B diag(E) A, and which triplets of it are worth keeping
hydra     y = W x + s sum_i w_i(x) B_i A x, one A and several B's
embedding the same on an embedding, and on the head that has its weight
tokens    a few rows of an embedding, and nothing else of it
layer     where adapters live: a base, adapters by name
merging   dW put into a copy of the base's weight, and taken out again
combining several adapters added up to one
model     get_peft_model and PeftModel
multitask several tasks in one batch, each with adapters of its own
plan      what a configuration means for a model, found out before anything is touched
injection what a plan says, done
keys      the names of an adapter's tensors, here and in PEFT's files
targets   which names are meant, by PEFT's rules
patterns  regular expressions that cannot hang
"""

from .adalora import AdaLoraAdapter, AdaLoraConfig
from .allocator import RankAllocator, orthogonality
from .config import LoraConfig
from .dora import DoraAdapter
from .embedding import DoraEmbeddingAdapter, EmbeddingAdapter, LoraEmbedding
from .hydra import HydraAdapter, HydraConfig
from .layer import LoraLinear, SavedModule
from .lora import LoraAdapter
from .model import PeftModel, get_peft_model
from .multitask import MultiTask, get_multitask_model
from .plan import read_config
from .tokens import TrainableTokens

__all__ = [
    "AdaLoraAdapter",
    "AdaLoraConfig",
    "DoraAdapter",
    "DoraEmbeddingAdapter",
    "EmbeddingAdapter",
    "HydraAdapter",
    "HydraConfig",
    "LoraAdapter",
    "LoraConfig",
    "LoraEmbedding",
    "LoraLinear",
    "MultiTask",
    "PeftModel",
    "RankAllocator",
    "SavedModule",
    "TrainableTokens",
    "get_multitask_model",
    "get_peft_model",
    "orthogonality",
    "read_config",
]
