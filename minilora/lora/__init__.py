"""The LoRA family: adapters of several kinds, and models that have them.

Orientation is the paper's and PEFT's everywhere: W (O, I), A (r, I), B (O, r), and

    dW = s B A          y = x W^T + s (x A^T) B^T

A is the first factor that x meets and starts random; B is the second and starts at zero. Some
lessons write dW = A B for row vectors y = x W, with A (I, r) and B (r, O): that is the same product
transposed, and their A is our A^T.

Adapters
    config      LoraConfig: the description of an adapter, in PEFT's words
    lora        dW = s B A
    dora        W' = m (W + dW) / |W + dW|
    adalora     dW = s B diag(E) A
    allocator   the triplets of AdaLoRA that are worth keeping
    hydra       y = W x + s sum_i w_i(x) B_i A x, with one A and several B's
    embedding   the same for an embedding, and for the head that shares its weight
    tokens      some trainable rows of an embedding
    factors     the algebra of (A, B, s) without dW
    optimizers  LoRA+, LoRA-FA and the Riemannian step
    singular    leading singular triplets of a large matrix
    starts      where training starts: pissa, olora, orthogonal, loftq, eva, lora_ga
    maps        LoRA's relatives

Models
    layer       wrappers: a module of the base with adapters, by name
    merging     adapters summed into a copy of a weight, and taken out again
    tying       an embedding and a head that share one weight
    targets     the layers that a configuration means in a model or a checkpoint
    injecting   an adapter put into a model
    adapted     a model with adapters: add, switch, count
    model       get_peft_model, and PeftModel, which merges, saves and loads them
    status      what the layers of such a model are set to
    combining   several adapters added up to one
    pruning     sums of pruned dW
    ranks       ranks by energy, error or budget
    multitask   several tasks in one batch, each with its adapters

Files
    names       PEFT's spellings of methods and tensors
    files       an adapter's file: read, fitted to a base, written
    vocabulary  a model resized to the vocabulary of an adapter
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
from .names import read_config
from .status import LayerStatus, ModelStatus, get_layer_status, get_model_status
from .tokens import TrainableTokens

__all__ = [
    "AdaLoraAdapter",
    "AdaLoraConfig",
    "DoraAdapter",
    "DoraEmbeddingAdapter",
    "EmbeddingAdapter",
    "HydraAdapter",
    "HydraConfig",
    "LayerStatus",
    "LoraAdapter",
    "LoraConfig",
    "LoraEmbedding",
    "LoraLinear",
    "ModelStatus",
    "MultiTask",
    "PeftModel",
    "RankAllocator",
    "SavedModule",
    "TrainableTokens",
    "get_layer_status",
    "get_model_status",
    "get_multitask_model",
    "get_peft_model",
    "orthogonality",
    "read_config",
]
