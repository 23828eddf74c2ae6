"""minilora: LoRA from scratch in NumPy, to read, to run, and to check.

Public names, grouped by module. `minilora.functional`, `minilora.formats` and `minilora.verify` are
modules to import by name; the folder `minilora.training` holds the training loop.
"""

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
    get_multitask_model,
    get_peft_model,
)
from .models.config import TransformerConfig
from .models.generation import generate
from .models.transformer import CausalLM
from .nn import Dropout, Embedding, LayerNorm, Linear, Module, Parameter, RMSNorm
from .optim import SGD, AdamW
from .quant.linear import QuantizedLinear, dequantize, quantize

__version__ = "0.1.0"

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
    "Tensor",
    "TransformerConfig",
    "check_gradient",
    "dequantize",
    "generate",
    "get_backend",
    "get_multitask_model",
    "get_peft_model",
    "gradients",
    "no_grad",
    "quantize",
]
