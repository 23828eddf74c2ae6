"""minilora: LoRA from scratch in NumPy, to read, to run, and to check.

Public names, grouped by module. `minilora.functional`, `minilora.formats` and `minilora.verify` are
modules to import by name; the folder `minilora.training` holds the training loop.

A module is imported when the first of its names is used. So the command line can handle Ctrl-C
before NumPy is imported, which takes most of the start.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in `typing`, whose import would take longer than all of this
if TYPE_CHECKING:
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

MODULES = {
    "autograd": "Tensor gradients no_grad",
    "backend": "get_backend",
    "data.tokenizer": "ByteTokenizer",
    "errors": "MiniloraError",
    "gradcheck": "check_gradient",
    "lora": "AdaLoraConfig HydraConfig LoraConfig LoraLinear MultiTask PeftModel "
    "get_multitask_model get_peft_model",
    "models.config": "TransformerConfig",
    "models.generation": "generate",
    "models.transformer": "CausalLM",
    "nn": "Dropout Embedding LayerNorm Linear Module Parameter RMSNorm",
    "optim": "AdamW SGD",
    "quant.linear": "QuantizedLinear dequantize quantize",
}

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

_places = {name: module for module, names in MODULES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """A public name, or a module of the package, imported now."""
    module = _places.get(name, name)
    path = f"{__name__}.{module}"
    if not name.startswith("_"):
        try:
            __import__(path)
        except ModuleNotFoundError as error:
            if error.name != path:  # something else is missing
                raise
        else:
            found = sys.modules[path]
            value = getattr(found, name) if name in _places else found
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
