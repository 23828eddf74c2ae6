"""Reports with made-up numbers of the right kind, for the tests of the page.

clean      LoRA of a small Llama-shaped model, with every part
adalora    AdaLoRA: pruned triplets, a map of whole ranks, no second text
gpt2       DoRA of a GPT-2, from files alone: no training, no text
hostile    texts that would break out of HTML, JSON, a script, or Plotly's markup, in every field
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.lab.report.content import (
    ColouredText,
    Curve,
    Fact,
    Guess,
    Intruders,
    LayerMap,
    ModuleCount,
    RankCurve,
    Report,
    Scaling,
    Spectrum,
    TokenChange,
    Training,
)

UNIT = "bits per byte"
CODE = '''def merge(base, adapter):
    """W + s B A, rounded once."""
    for name, layer in adapter.items():
        weight = base[name]
        if weight.shape != layer.shape:
            raise ValueError(f"{name}: another shape")
        base[name] = weight + layer.scaling * layer.B @ layer.A
    return base
'''
HOSTILE = (
    "</script><script>window.pwned = 1</script><!--<script>",
    "<img src=x onerror='window.pwned = 1'>",
    '"><svg onload=window.pwned=1>',
    "{{ 7 * 7 }} {% raw %} ${window.pwned=1} %{x}",
    "<b>bold</b> <a href='javascript:window.pwned=1'>link</a> &amp; &lt;i&gt;",
    "a\0b\x1b[31m\x7f",
    "right\u202eto\u2066left\u200f",
    "line\u2028ends\u2029here\r\nand here",
    "half \ud83d of a pair \udc80",
    "long" * 500,
    "'];window.pwned=1;//",
    "javascript:window.pwned=1",
    "__proto__",
    "warm",
    "",
)


def clean() -> Report:
    generator = np.random.default_rng(0)
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    blocks = [str(block) for block in range(6)]
    shape = len(kinds), len(blocks)
    sizes = generator.uniform(0.004, 0.09, shape)
    effects = generator.normal(0.01, 0.012, shape)
    layers = [f"model.layers.{b}.self_attn.{k}" for b in blocks for k in kinds]
    return Report(
        title="runs/code-r8: LoRA of base-micro",
        summary=[
            Fact("Method", "LoRA"),
            Fact("r", "8"),
            Fact("lora_alpha", "32"),
            Fact("Layers", "42"),
            Fact("Trained parameters", "68,544 of 1,191,168 (5.75%)"),
            Fact("Base", "bases/micro"),
            Fact("Steps", "160"),
            Fact(f"Held-out {UNIT}", "3.0871 before, 2.7190 after, -0.3681"),
            Fact(f"Second text's {UNIT}", "2.0490 before, 2.4512 after, +0.4022"),
            Fact(f"{UNIT} of code.txt", "3.0912 before, 2.7223 after, -0.3689 +- 0.0121"),
        ],
        architecture=_decoder(kinds, blocks),
        provenance=[
            Fact("command", "minilora finetune --base bases/micro --data code.txt --out runs/code"),
            Fact("lr", "0.004"),
            Fact("seed", "0"),
            Fact("SHA-256 of base/model.safetensors", "9f86d081884c7d65" * 4),
            Fact("minilora", "0.1"),
            Fact("Python", "3.11.7"),
            Fact("NumPy", "2.4.6"),
        ],
        training=_training(generator, 160),
        maps=[
            LayerMap("Size of dW", "|dW| / |W|, Frobenius norms.", kinds, blocks, sizes.tolist()),
            LayerMap(
                "Effective rank of dW",
                "How many directions dW really uses. 1: one; r: r equally strong ones.",
                kinds,
                blocks,
                generator.uniform(2.1, 7.9, shape).tolist(),
            ),
            LayerMap(
                "Loss without the layer",
                f"By how many {UNIT} the loss rises if this layer's dW is left out.",
                kinds,
                blocks,
                effects.tolist(),
            ),
        ],
        spectra=[_spectrum(generator, layer, 8) for layer in layers],
        rank_curve=_rank_curve(8),
        text=ColouredText("code.txt", _tokens(generator, CODE)),
        intruders=_intruders(True),
    )


def adalora() -> Report:
    report = clean()
    generator = np.random.default_rng(1)
    ranks = generator.integers(0, 7, (7, 6)).astype(float)
    assert report.training is not None
    spectra = []
    for spectrum, rank in zip(report.spectra, ranks.T.ravel(), strict=True):
        update = [value if i < rank else 0.0 for i, value in enumerate(spectrum.update[:6])]
        spectra.append(dataclasses.replace(spectrum, update=update))
    ranks_map = dataclasses.replace(
        report.maps[0],
        title="Ranks that are left",
        explanation="Triplets of 6 that training kept; the budget is 4 for each layer.",
        values=ranks.tolist(),
    )
    training = Training(UNIT, report.training.curves[:2])
    return dataclasses.replace(
        report,
        title="runs/adalora",
        summary=[Fact("Method", "AdaLoRA"), Fact("r", "6 at first, 4 in the end, on average")],
        training=training,
        maps=[*report.maps, ranks_map],
        spectra=spectra,
        rank_curve=_rank_curve(6),
        intruders=_intruders(False),
        omitted={"forgetting": "no second text: give one by --also FILE"},
    )


def gpt2() -> Report:
    generator = np.random.default_rng(2)
    kinds = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "wte"]
    blocks = [*(str(block) for block in range(12)), "outside"]
    sizes: list[list[float | None]] = []
    for kind in kinds:
        inside = [None if kind == "wte" else value for value in generator.uniform(1e-4, 8e-3, 12)]
        sizes.append([*inside, 0.0021 if kind == "wte" else None])
    paths = [f"transformer.h.{b}.{kind}" for b in blocks[:-1] for kind in kinds[:-1]]
    note = "DoRA, r = 16"
    inner = [
        ModuleCount("attn.c_attn", "Conv1D", 1_773_312, 49_152, note),
        ModuleCount("attn.c_proj", "Conv1D", 591_360, 25_344, note),
        ModuleCount("mlp", "MLP", 4_724_736, 0, ""),
    ]
    blocks_node = ModuleCount("h.0 ... 11", "Block", 85_054_464, 893_952, "12 alike", inner)
    wte = ModuleCount("wte", "Embedding", 38_597_376, 816_208, note)
    return Report(
        title="DoRA of gpt2",
        summary=[Fact("Method", "DoRA"), Fact("r", "16"), Fact("Base", "gpt2")],
        architecture=ModuleCount(
            "gpt2", "GPT2LMHeadModel", 124_439_808, 1_710_160, "", [wte, blocks_node]
        ),
        provenance=[Fact("minilora", "0.1")],
        maps=[LayerMap("Size of dW", "|dW| / |W|.", kinds, blocks, sizes)],
        spectra=[_spectrum(generator, path, 16) for path in paths],
        intruders=Intruders(480, [0.3, 0.4, 0.5, 0.6, 0.7], [0, 2, 9, 31, 74], 0.5),
        omitted={
            "training": "an adapter alone does not say how it was trained",
            "rank_curve": "no text: give one by --data FILE",
            "text": "no text: give one by --data FILE",
        },
    )


def hostile() -> Report:
    """The clean report with a hostile text in the place of every text."""
    count = 0

    def draw() -> str:
        nonlocal count
        count += 1
        return HOSTILE[count % len(HOSTILE)]

    report: Report = replace_texts(clean(), lambda text: draw())
    omitted = {text or "nothing": text for text in HOSTILE}
    return dataclasses.replace(report, omitted=omitted)


def replace_texts(value: Any, make: Callable[[str], str]) -> Any:
    """A copy of a report, or of a part, with `make(text)` in the place of every text."""
    if isinstance(value, str):
        return make(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        parts = {name: replace_texts(getattr(value, name), make) for name in names}
        return dataclasses.replace(value, **parts)
    if isinstance(value, tuple):
        return type(value)(*(replace_texts(item, make) for item in value))
    if isinstance(value, list):
        return [replace_texts(item, make) for item in value]
    if isinstance(value, dict):
        return {replace_texts(k, make): replace_texts(v, make) for k, v in value.items()}
    return value


def _decoder(kinds: list[str], blocks: list[str]) -> ModuleCount:
    linear = [ModuleCount(kind, "Linear", 9_216, 1_536, "LoRA, r = 8") for kind in kinds]
    attention = ModuleCount("self_attn", "Attention", 36_864, 6_144, "", linear[:4])
    mlp = ModuleCount("mlp", "GatedMLP", 27_648, 4_608, "", linear[4:])
    norm = ModuleCount("input_layernorm", "RMSNorm", 96, 0)
    many = len(blocks)
    block = ModuleCount(
        f"layers.0 ... {many - 1}",
        "Block",
        64_608 * many,
        10_752 * many,
        f"{many} alike, 64,608 each",
        [norm, attention, mlp],
    )
    embedding = ModuleCount("embed_tokens", "Embedding", 24_576, 0)
    total = 64_608 * many + 24_576
    inside = [ModuleCount("model", "Decoder", total, 10_752 * many, "", [embedding, block])]
    return ModuleCount("base-micro", "CausalLM", total, 10_752 * many, "", inside)


def _training(generator: np.random.Generator, steps: int) -> Training:
    noise = generator.normal(0, 0.09, steps)
    losses = [2.7 + 0.4 * math.exp(-i / 40) + noise[i] for i in range(steps)]
    at = list(range(0, steps + 1, 20))
    held_out: list[float | None] = [2.72 + 0.367 * math.exp(-step / 45) for step in at]
    second: list[float | None] = [2.05 + 0.4 * (1 - math.exp(-step / 60)) for step in at]
    curves = [
        Curve("training", list(range(1, steps + 1)), [float(loss) for loss in losses]),
        Curve("held-out text", at, held_out),
        Curve("second text", at, second),
    ]
    return Training(UNIT, curves)


def _spectrum(generator: np.random.Generator, layer: str, rank: int) -> Spectrum:
    top = generator.uniform(0.4, 1.6)
    update = [top * math.exp(-0.35 * i) for i in range(rank)]
    weight = [7.5 * math.exp(-0.04 * i) for i in range(48)]
    return Spectrum(layer, update, weight)


def _rank_curve(rank: int) -> RankCurve:
    ranks = list(range(rank + 1))
    losses = [2.72 + 0.37 * math.exp(-0.7 * r) for r in ranks]
    errors: list[float | None] = [0.004 * (1 - r / rank) for r in ranks]
    energies = [1 - math.exp(-0.5 * r) if r < rank else 1.0 for r in ranks]
    return RankCurve(UNIT, "code.txt", ranks, losses, errors, energies)


def _tokens(generator: np.random.Generator, text: str) -> list[TokenChange]:
    pieces = []
    start = 0
    while start < len(text):
        stop = start + int(generator.integers(1, 6))
        pieces.append(text[start:stop])
        start = stop
    tokens = [TokenChange(pieces[0], None, None)]
    for piece in pieces[1:]:
        base = float(generator.exponential(2.5))
        change = float(generator.normal(-0.35, 0.7))
        tokens.append(
            TokenChange(
                piece,
                base,
                max(0.01, base + change),
                [Guess(" the", 0.31), Guess(piece, math.exp(-base)), Guess("\n", 0.04)],
                [Guess(piece, math.exp(-max(0.01, base + change))), Guess("self", 0.11)],
            )
        )
    return tokens


def _intruders(has_second: bool) -> Intruders:
    factors = [0.0, 0.25, 0.5, 0.75, 0.9, 1.0]
    scalings = []
    for name, new, old in (
        ("the intruders", 0.12, 0.20),
        ("as many other directions", 0.05, 0.06),
        ("all of dW", 0.37, 0.40),
    ):
        losses = [2.72 + new * (1 - factor) ** 2 for factor in factors]
        second: list[float | None] = [2.45 - old * (1 - factor) for factor in factors]
        scalings.append(Scaling(name, factors, losses, second if has_second else []))
    return Intruders(420, [0.3, 0.4, 0.5, 0.6], [4, 18, 47, 96], 0.5, UNIT, scalings)
