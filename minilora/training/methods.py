"""Methods by name: what is trained, and in what form the frozen base is stored.

method     lora      dW = s B A
           dora      W' = m (W + dW) / |W + dW|
           adalora   dW = s B diag(E) A, whose ranks are chosen in training
           full      no adapter: all weights of the base train
           loha, ... the maps theta -> dW of minilora/lora/maps, by their own names
quantize   none; or what `quantize` makes of the base before the adapter is added: nf4 and LoRA are
           QLoRA; or stored: weights that the base's files have in sixteen bits stay in sixteen bits
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..lora import AdaLoraConfig, LoraConfig
from ..lora.maps import MAPS, MapConfig
from ..quant.codes import KINDS
from ..quant.half import HalfWeight
from ..quant.linear import LayerReport, quantization_report

FACTORED = ("lora", "dora", "adalora", "full")  # and without an adapter
MAPS_BY_METHOD = {config.method: config for config in MAPS.values()}
METHODS = (*FACTORED, *MAPS_BY_METHOD)
CODES = ("none", *KINDS)  # for a base that is in memory
QUANTIZE = (*CODES, "stored")  # for a base that is read from files
NAMES = {"lora": "LoRA", "dora": "DoRA", "adalora": "AdaLoRA", "full": "all weights"}
NAMES |= {method: config.title for method, config in MAPS_BY_METHOD.items()}
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

    fields   the adapter's fields, by PEFT's names, that are to differ from the defaults

    AdaLoRA takes r for target_r, and its schedule from the length of the run: see
    `adalora_defaults`. ConfigError names what does not go together.
    """
    for option, value, valid in (("method", method, METHODS), ("quantize", quantize, QUANTIZE)):
        if value not in valid:
            raise ConfigError(f"{option} must be one of {', '.join(valid)}, got {value!r:.99}")
    if method == "full":
        if fields:
            names = ", ".join(fields)
            raise ConfigError(f"method full trains the base, not an adapter: leave out {names}")
        if quantize != "none":
            raise ConfigError(
                f"quantize = {quantize} freezes the weights that method full would train"
            )
        return None
    if method in MAPS_BY_METHOD:
        kind = MAPS_BY_METHOD[method]
        kind.require_known(fields)
        return kind(**fields)
    _refuse_fields_of_maps(method, fields)
    if method == "adalora":
        return AdaLoraConfig(**adalora_defaults(fields, steps), total_step=steps)
    names = ", ".join(name for name in ADALORA_FIELDS if name in fields)
    if names:
        raise ConfigError(f"{names}: fields of AdaLoRA; method {method} does not allocate ranks")
    config = dict(fields)
    if method == "dora":
        config["use_dora"] = True
    return LoraConfig(**config)


def _refuse_fields_of_maps(method: str, fields: Mapping[str, Any]) -> None:
    """ConfigError for fields that only maps have."""
    known = {field.name for field in dataclasses.fields(AdaLoraConfig)}
    for name in fields:
        if name not in known:
            others = [m for m, c in MAPS_BY_METHOD.items() if name in c.field_names()]
            raise ConfigError(
                f"{name}: method {method} has no such field; methods with it: "
                f"{', '.join(others) or 'none'}: leave it out"
            )


def adalora_defaults(fields: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """`fields` of an AdaLoraConfig, completed in proportion to r and to the run's length.

    At first half as many triplets again as in the end; the first cut after a tenth of the steps,
    the last a quarter of them before the end, and a hundred allocations. The penalty's weight is a
    fifth of PEFT's, as in the authors' code.
    """
    if "r" in fields and "target_r" in fields:
        raise ConfigError(
            "r and target_r mean the same to AdaLoRA, the average rank of a layer at the end: "
            "give one of them"
        )
    given = dict(fields)
    r = given.pop("r", 8)
    r = given.get("target_r", r)
    init_r = max(1, -(-3 * r // 2)) if type(r) is int else r
    defaults = {
        "target_r": r,
        "init_r": init_r,
        "tinit": steps // 10,
        "tfinal": steps // 4,
        "deltaT": max(1, steps // 100),
        "orth_reg_weight": 0.1,
    }
    return defaults | given


def method_of(config: LoraConfig | None) -> str:
    """The name of the method of a configuration."""
    if config is None:
        return "full"
    if isinstance(config, AdaLoraConfig):
        return "adalora"
    if isinstance(config, MapConfig):
        return config.method
    return "dora" if config.use_dora else "lora"


def measure_weight_memory(model: Any, is_adapted: bool = False) -> dict[str, Any]:
    """Count the bytes of a base's weights: of those in codes or sixteen bits, and of all.

    is_adapted   has it an adapter, whose parameters train and do not count?

    Each count comes with its percentage of the same weights' size in float32.
    """
    report = quantization_report(model)
    for name, p in model.named_parameters():
        if isinstance(p, HalfWeight):
            half = p.quantized
            report.append(LayerReport(name, half.kind, p.size, half.nbytes, 16.0, 0.0, p.lost))
    weights = sum(layer.parameters for layer in report)
    size = sum(layer.nbytes for layer in report)
    others = [p for p in model.parameters() if not (p.fixed or (is_adapted and p.requires_grad))]
    all_weights = weights + sum(p.size for p in others)
    all_size = size + sum(p.size * p.dtype.itemsize for p in others)
    return {
        "kind": ", ".join(sorted({layer.kind for layer in report})) or "none",
        "layers": len(report),
        "weights": weights,
        "bytes": size,
        "percent": 100 * size / (4 * weights) if weights else 0.0,
        "all_weights": all_weights,
        "all_bytes": all_size,
        "all_percent": 100 * all_size / (4 * all_weights),
    }


def format_weight_memory(report: Mapping[str, Any]) -> str:
    """The report of `measure_weight_memory` in one line."""
    layers = f"{report['weights']:,} weights of {report['layers']} layers"
    coded = f"{layers} in {report['bytes']:,} bytes of {report['kind']}"
    every = f"all {report['all_weights']:,} in {report['all_bytes']:,}"
    percent = f"{report['percent']:.1f} % of their size in float32"
    return f"{coded}, {percent}; {every}, {report['all_percent']:.1f} %"
