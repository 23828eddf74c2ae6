"""Frozen weights in 4, 8 and 16 bits."""

from .codes import ABSMAX_BLOCK, BLOCK_SIZES, KINDS, LEVELS, Quantized, encode
from .linear import (
    LayerReport,
    QuantizedLinear,
    QuantizedWeight,
    dequantize,
    quantization_report,
    quantize,
    quantized_linear,
)

__all__ = [
    "ABSMAX_BLOCK",
    "BLOCK_SIZES",
    "KINDS",
    "LEVELS",
    "LayerReport",
    "Quantized",
    "QuantizedLinear",
    "QuantizedWeight",
    "dequantize",
    "encode",
    "quantization_report",
    "quantize",
    "quantized_linear",
]
