"""A method by its name: what is trained, and what the frozen base is held as.

method     lora      dW = s B A
           dora      W' = m (W + dW) / |W + dW|
           adalora   dW = s B diag(E) A, whose ranks are found in training
           full      no adapter: all weights of the base train
quantize   none; or what `quantize` makes of the base before the adapter comes: nf4 and LoRA are QLoRA; or stored, what
           its files hold in sixteen bits is held so, too
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..lora import AdaLoraConfig, LoraConfig
from ..quant.codes import KINDS
from ..quant.half import HalfWeight
from ..quant.linear import LayerReport, quantization_report

METHODS = ("lora", "dora", "adalora", "full")
CODES = ("none", *KINDS)  # of a base that is in memory
QUANTIZE = (*CODES, "stored")  # of one that is read
NAMES = {"lora": "LoRA", "dora": "DoRA", "adalora": "AdaLoRA", "full": "all weights"}
ADALORA_FIELDS = (
    "target_r",
    "init_r",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
)


def adapter_config(
    method: str, quantize: str, fields: Mapping[str, Any], steps: int
) -> LoraConfig | None:
    """The configuration that a method means for a run of `steps`; None for "full".

    fields   the adapter's, by PEFT's names, where they are not to be the defaults

    AdaLoRA takes r for target_r, and its schedule from the length of the run: see `adalora_defaults`.
    ConfigError names what does not go together.
    """
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r:.99}")
    if quantize not in QUANTIZE:
        raise ConfigError(f"quantize must be one of {', '.join(QUANTIZE)}, got {quantize!r:.99}")
    of_adalora = [name for name in ADALORA_FIELDS if name in fields]
    if method == "full":
        if fields:
            raise ConfigError(
                f"method full trains the base itself: there is no adapter to have {', '.join(fields)}"
            )
        if quantize != "none":
            raise ConfigError(
                f"quantize = {quantize} freezes the weights that method full would train"
            )
        return None
    if method == "adalora":
        return AdaLoraConfig(**adalora_defaults(fields, steps), total_step=steps)
    if of_adalora:
        raise ConfigError(
            f"{', '.join(of_adalora)}: AdaLoRA's; method {method} does not allocate ranks"
        )
    return LoraConfig(**{**fields, "use_dora": True} if method == "dora" else fields)


def adalora_defaults(fields: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """`fields` of an AdaLoraConfig with what is missing, in proportion to r and to the run.

    Half as many triplets again as are to stay; a tenth of the steps before the first is cut, a quarter after the last,
    a hundred allocations. The penalty's weight is a fifth of PEFT's, as in the authors' code.
    """
    if "r" in fields and "target_r" in fields:
        raise ConfigError(
            "r and target_r are the same to AdaLoRA, the rank of the average layer at the end: give one"
        )
    given = {name: value for name, value in fields.items() if name != "r"}
    r = given.get("target_r", fields.get("r", 8))
    schedule = {
        "tinit": steps // 10,
        "tfinal": steps // 4,
        "deltaT": max(1, steps // 100),
        "orth_reg_weight": 0.1,
    }
    return {
        "target_r": r,
        "init_r": max(1, -(-3 * r // 2)) if type(r) is int else r,
        **schedule,
        **given,
    }


def method_of(config: LoraConfig | None) -> str:
    """The name of the method that a configuration stands for."""
    if config is None:
        return "full"
    return "adalora" if isinstance(config, AdaLoraConfig) else "dora" if config.use_dora else "lora"


def measure_weight_memory(model: Any) -> dict[str, Any]:
    """What a base holds, counted: its layers of codes or sixteen bits, then all its weights, each beside float32."""
    report = quantization_report(model)
    halves = [
        (name, p, p.quantized) for name, p in model.named_parameters() if isinstance(p, HalfWeight)
    ]
    report += [
        LayerReport(name, h.kind, p.size, h.nbytes, 16.0, 0.0, p.lost) for name, p, h in halves
    ]
    coded, weights = (
        sum(layer.nbytes for layer in report),
        sum(layer.parameters for layer in report),
    )
    others = [p for p in model.parameters() if not p.fixed]
    everything, count = (
        coded + sum(p.size * p.dtype.itemsize for p in others),
        weights + sum(p.size for p in others),
    )
    return {
        "kind": ", ".join(sorted({layer.kind for layer in report})) or "none",
        "layers": len(report),
        "weights": weights,
        "bytes": coded,
        "percent": 100 * coded / (4 * weights) if weights else 0.0,
        "all_weights": count,
        "all_bytes": everything,
        "all_percent": 100 * everything / (4 * count),
    }


def format_weight_memory(held: Mapping[str, Any]) -> str:
    """`held_bytes` in a line."""
    layers = f"{held['weights']:,} weights of {held['layers']} layers in {held['bytes']:,} bytes of {held['kind']}"
    every = f"all {held['all_weights']:,} in {held['all_bytes']:,}, {held['all_percent']:.1f} %"
    return f"{layers}, {held['percent']:.1f} % of their size in float32; {every}"
