"""Public names, grouped by module: `import minilora` has them all."""

from __future__ import annotations

from .autograd import Tensor, gradients, no_grad
from .backend import get_backend
from .data.tokenizer import ByteTokenizer
from .errors import MiniloraError
from .gradcheck import check_gradient
from .lora import (
    AdaLoraConfig,
    HydraConfig,
    LoraConfig,
    LoraLinear,
    MultiTask,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_multitask_model,
    get_peft_model,
)
from .models.config import TransformerConfig
from .models.generation import generate
from .models.transformer import CausalLM
from .nn import (
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Parameter,
    ReLU,
    RMSNorm,
    Sequential,
    manual_seed,
)
from .optim import SGD, AdamW
from .quant.linear import QuantizedLinear, dequantize, quantize

__all__ = [
    "SGD",
    "AdaLoraConfig",
    "AdamW",
    "ByteTokenizer",
    "CausalLM",
    "Dropout",
    "Embedding",
    "HydraConfig",
    "LayerNorm",
    "Linear",
    "LoraConfig",
    "LoraLinear",
    "MiniloraError",
    "Module",
    "MultiTask",
    "Parameter",
    "PeftModel",
    "QuantizedLinear",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "Tensor",
    "TransformerConfig",
    "check_gradient",
    "dequantize",
    "generate",
    "get_backend",
    "get_layer_status",
    "get_model_status",
    "get_multitask_model",
    "get_peft_model",
    "gradients",
    "manual_seed",
    "no_grad",
    "quantize",
]


def public_names() -> dict[str, object]:
    """The public names with what they stand for."""
    return {name: globals()[name] for name in __all__}
