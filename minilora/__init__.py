"""minilora: LoRA from scratch in NumPy, to read, to run, and to check.

The door: public names by the room they come from. `minilora.functional`, `minilora.formats`, `minilora.parallel` and
`minilora.train` are rooms to go into by name.
"""

from .architecture import TransformerConfig
from .autograd import Tensor, gradients, no_grad
from .backend import get_backend
from .errors import MiniloraError
from .generate import generate
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
from .nn import Dropout, Embedding, LayerNorm, Linear, Module, Parameter, RMSNorm
from .optim import SGD, AdamW
from .quant import QuantizedLinear, dequantize, quantize
from .tokenizer import ByteTokenizer
from .transformer import CausalLM

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
