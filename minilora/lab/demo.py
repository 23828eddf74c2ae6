"""The main job, whole: a language model from nothing, bent to another language by LoRA, and measured.

English prose (Python's own language reference) teaches a small byte-level transformer; then its weights are frozen
and a few per cent as many new ones, the adapter's, learn Python code. Held-out text is of other topics and other
files. The adapter is LoRA's unless another method is asked for, or all weights train instead, to compare with.
"""

from __future__ import annotations

import hashlib
import lzma
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..autograd import no_grad
from ..data.texts import prose, python_sources, read_text, split, split_text
from ..data.tokenizer import ByteTokenizer
from ..errors import ConfigError
from ..formats import write_json
from ..lora import AdaLoraConfig, LoraConfig, LoraLinear, PeftModel, get_peft_model
from ..models.config import TransformerConfig
from ..models.generation import generate
from ..models.transformer import CausalLM
from ..nn import LinearBase
from ..quant.linear import quantize
from ..training.loop import Settings, bits_per_byte, evaluate, rank_history, train
from ..training.methods import (
    NAMES,
    adapter_config,
    format_weight_memory,
    measure_weight_memory,
    method_of,
)

MODEL = TransformerConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)
PRETRAIN = Settings(
    steps=600, batch_size=16, context=128, lr=3e-3, weight_decay=0.1, eval_every=100
)
ADAPT = Settings(steps=350, batch_size=16, context=128, lr=5e-3, eval_every=50)
ADAPTER: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
# AdaLoRA's E starts at zero between A and B of length one, and grows by the learning rate: it wants larger steps.
ADALORA, ADALORA_LR = {**ADAPTER, "lora_alpha": 256}, 1e-2
PROMPT = "def read("
FORMULAS = {
    "lora": "dW = s B A",
    "adalora": "dW = s B E A",
    "dora": "W' - W",
    "full": "what training added",
}


@dataclass(frozen=True)
class Plan:
    """The sizes of a demo; the defaults take some two to three minutes on two cores."""

    model: TransformerConfig = MODEL
    pretrain: Settings = PRETRAIN
    adapt: Settings = ADAPT
    adapter: LoraConfig | None = field(
        default_factory=lambda: LoraConfig(**ADAPTER)
    )  # None: all weights train
    quantize: str = "none"  # what the base is held as while the adapter trains
    windows: int = 512  # held-out windows that the final figures are measured on
    sample: int = 240  # bytes of text to write

    @property
    def method(self) -> str:
        return method_of(self.adapter)

    def adapted_by(
        self, method: str, quantize: str = "none", fields: Mapping[str, Any] | None = None
    ) -> Plan:
        """The plan with another method; `fields` of its adapter in place of those that the demo has for it."""
        if quantize == "stored":
            raise ConfigError(
                "quantize = stored is for a base that is read from a file: the demo trains its own"
            )
        defaults = {"full": {}, "adalora": ADALORA}.get(method, ADAPTER)
        config = adapter_config(method, quantize, {**defaults, **(fields or {})}, self.adapt.steps)
        adapt = replace(self.adapt, lr=ADALORA_LR) if method == "adalora" else self.adapt
        return replace(self, adapter=config, adapt=adapt, quantize=quantize)

    def quick(self) -> Plan:
        """A version of 20 seconds, for tests: it shows that everything runs, not what the method can do."""
        model = replace(self.model, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
        settings: dict[str, Any] = {"batch_size": 8, "context": 64, "eval_every": 20}
        return replace(
            self,
            model=model,
            pretrain=replace(self.pretrain, steps=120, **settings),
            adapt=replace(self.adapt, steps=80, **settings),
            windows=64,
            sample=80,
        )


def demo(
    out: Path,
    plan: Plan,
    pretrain_data: str | None = None,
    adapt_data: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    pictures: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run every stage, write everything into `out`, an empty folder, and return what summary.json holds."""
    seconds: dict[str, float] = {}
    plan = replace(
        plan,
        pretrain=replace(plan.pretrain, seed=seed, threads=threads),
        adapt=replace(plan.adapt, seed=seed, threads=threads),
    )
    tokenizer = ByteTokenizer()
    texts = {
        "prose": split_text(read_text(pretrain_data)) if pretrain_data else split(prose()),
        "code": split_text(read_text(adapt_data)) if adapt_data else split(python_sources()),
    }
    ids = {name: tuple(tokenizer.encode(text) for text in parts) for name, parts in texts.items()}

    model = CausalLM(plan.model, seed=seed, device=device)
    size = sum(p.size for p in model.parameters())
    say(f"1. Pretrain {size:,} parameters on {len(ids['prose'][0]):,} bytes of prose")
    with _timed(seconds, "pretrain"):
        folder = _made(out / "base")
        first = train(
            model,
            ids["prose"][0],
            plan.pretrain,
            folder,
            held_out=ids["prose"][1][:20_000],
            title="pretrain",
        )
        model.save_pretrained(folder)
        tokenizer.save(folder)

    def measure(some_model: Any) -> dict[str, float]:
        context = plan.pretrain.context
        held_out = {name: parts[1] for name, parts in ids.items()}
        losses = {
            k: evaluate(some_model, v, context, limit=plan.windows, threads=threads)
            for k, v in held_out.items()
        }
        return {name: bits_per_byte(loss) for name, loss in losses.items()}

    def write_sample(some_model: Any) -> str:
        prompt = tokenizer.encode(PROMPT)[None]
        return tokenizer.decode(
            generate(some_model, prompt, plan.sample, temperature=0.7, top_k=40, seed=seed)[0]
        )

    with _timed(seconds, "evaluate base"):
        figures = {"base": measure(model)}
        samples = {"base": write_sample(model)}

    summary: dict[str, Any] = {"method": plan.method, "quantize": plan.quantize}
    if plan.quantize != "none":
        summary["held"] = measure_weight_memory(quantize(model, plan.quantize))
        say(f"   {format_weight_memory(summary['held'])}")
        figures["quantized base"] = measure(model)
    before = _fingerprint(model)
    originals = _linear_weights(model) if plan.adapter is None else {}
    adapted: Any = model if plan.adapter is None else get_peft_model(model, plan.adapter, seed=seed)
    trainable = sum(p.size for p in adapted.parameters() if p.requires_grad)
    total = sum(p.size for p in adapted.parameters())
    frozen = (
        f"Freeze them, and train {trainable:,} of {NAMES[plan.method]} ({_ranks(plan.adapter)})"
    )
    say(
        f"2. {frozen if plan.adapter else 'Train all of them'} on {len(ids['code'][0]):,} bytes of code"
    )
    with _timed(seconds, "adapt"):
        folder = _made(out / ("adapted" if plan.adapter is None else "adapter"))
        second = train(
            adapted,
            ids["code"][0],
            plan.adapt,
            folder,
            held_out=ids["code"][1][:20_000],
            title="adapt",
        )
        adapted.save_pretrained(folder)
        if plan.adapter is None:
            tokenizer.save(folder)
    with _timed(seconds, "evaluate adapter"):
        figures[plan.method] = measure(adapted)
        samples[plan.method] = write_sample(adapted)
        figures["lzma"] = {
            name: 8 * len(lzma.compress(text)) / len(text) for name, (_, text) in texts.items()
        }

    weights = "model.safetensors" if plan.adapter is None else "adapter_model.safetensors"
    summary |= {
        "bits_per_byte": figures,
        "trainable": trainable,
        "total": total,
        "adapter_bytes": (folder / weights).stat().st_size,
        "base_bytes": (out / "base" / "model.safetensors").stat().st_size,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "checks": _checks(adapted, ids["code"][1][None, : plan.pretrain.context], before)
        if plan.adapter
        else {},
        "samples": samples,
        "seed": seed,
    }
    _report(summary, say)  # first of all: what follows needs room on the disk
    if pictures:
        summary["pictures"] = _draw(
            out, plan, lambda: _spectra(adapted, originals), first, second, say
        )
    write_json(out / "summary.json", summary)
    _list_files(out, say)
    return summary


def _ranks(config: LoraConfig | None) -> str:
    if isinstance(config, AdaLoraConfig):
        return f"init_r = {config.init_r}, target_r = {config.target_r}"
    return f"r = {config.r}" if config else ""


def _checks(model: PeftModel, ids: np.ndarray, before: str) -> dict[str, Any]:
    """What must hold after training: the base untouched, and merging the same as adding."""
    with no_grad():
        adapted = model(ids).numpy()
        with model.disable_adapter():
            disabled = _fingerprint(model.get_base_model())
        model.merge_adapter()
        merged = model(ids).numpy()
        model.unmerge_adapter()
    return {
        "base_bit_identical": before == disabled == _fingerprint(model.get_base_model()),
        "merge_identity_error": float(np.abs(merged - adapted).max() / np.abs(adapted).max()),
    }


def _fingerprint(model: Any) -> str:
    """SHA-256 of the base's weights, by name, whatever adapters are in it."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if ".adapters." not in name:
            digest.update(
                name.replace(".base_layer", "").encode() + np.ascontiguousarray(p.numpy()).tobytes()
            )
    return digest.hexdigest()


def _linear_weights(model: Any) -> dict[str, np.ndarray]:
    """A copy of W of every linear layer but the head, by path."""
    head = model.get_output_embeddings()
    layers = {p: m for p, m in model.named_modules() if isinstance(m, LinearBase) and m is not head}
    return {
        path: layer.backend.to_numpy(layer.dense_weight()).copy() for path, layer in layers.items()
    }


def _spectra(
    model: Any, originals: Mapping[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Singular values of W and of dW, by path: what the adapter adds, or else how far W is from `originals`."""

    def values(W: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.svd(W, compute_uv=False))

    if not isinstance(model, PeftModel):
        return {
            path: (values(originals[path]), values(W - originals[path]))
            for path, W in _linear_weights(model).items()
        }
    config, found = model.peft_config[model.active_adapter], {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLinear):
            W = layer.base_layer.backend.to_numpy(layer.base_layer.dense_weight())
            rank = None if config.use_dora else config.rank(path)  # the values beyond are zero
            found[path] = values(W), values(layer.delta_weight(model.active_adapter))[:rank]
    return found


def _draw(
    out: Path,
    plan: Plan,
    spectra: Callable[[], Any],
    first: Any,
    second: Any,
    say: Callable[[str], None],
) -> list[str]:
    from . import plots  # matplotlib is optional, and slow to import

    if not plots.available():
        say("(no pictures: pip install -e .[plot])")
        return []

    def in_bits(run: Any) -> tuple[list[float], list[tuple[int, float]]]:
        return [bits_per_byte(v) for v in run.losses], [
            (step, bits_per_byte(v)) for step, v in run.evaluations
        ]

    held = "base frozen" if plan.quantize == "none" else f"base frozen in {plan.quantize}"
    title = (
        "Code, all parameters" if plan.adapter is None else f"{NAMES[plan.method]} on code, {held}"
    )
    plots.loss_curves(
        out / "loss.png",
        {"Pretraining on prose, all parameters": in_bits(first), title: in_bits(second)},
    )
    plots.delta_spectrum(out / "delta_spectrum.png", spectra(), FORMULAS[plan.method])
    if plan.method != "adalora":
        return ["loss.png", "delta_spectrum.png"]
    plots.rank_allocation(out / "rank_allocation.png", *rank_history(out / "adapter"))
    return ["loss.png", "delta_spectrum.png", "rank_allocation.png"]


def _report(summary: dict[str, Any], say: Callable[[str], None]) -> None:
    bits, checks, samples, method = (
        summary[k] for k in ("bits_per_byte", "checks", "samples", "method")
    )
    coded = "" if summary["quantize"] == "none" else f"{summary['quantize']} "
    adapted = "all weights trained" if method == "full" else f"{coded}base + {NAMES[method]}"
    labels = {
        "base": "base",
        "quantized base": f"{coded}base",
        method: adapted,
        "lzma": "lzma, for scale",
    }
    say("\nHeld-out text, bits per byte (lower is better)\n")
    say(f"  {'':24}{'prose':>8}{'code':>8}")
    for key, row in bits.items():
        say(f"  {labels[key]:24}{row['prose']:8.3f}{row['code']:8.3f}")
    trainable, total = summary["trainable"], summary["total"]
    say(f"\n  trainable parameters    {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)")
    what = "adapted model" if method == "full" else "adapter"
    say(
        f"  {f'{what} on disk':22}  {summary['adapter_bytes']:,} bytes, the base {summary['base_bytes']:,}"
    )
    if checks:
        say(
            f"  merged = base + adapter to {checks['merge_identity_error']:.1e} of the largest logit"
        )
        say(
            f"  base weights unchanged  {'yes, every bit' if checks['base_bit_identical'] else 'NO'}"
        )
    for key, label in {"base": "Before", method: "After"}.items():
        say(f"\n{label}, from {PROMPT!r}:\n")
        text = "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in samples[key]
        )
        say("\n".join("    " + line for line in text.splitlines()))


def _list_files(out: Path, say: Callable[[str], None]) -> None:
    say("\nWritten")
    for name, what in {
        "base": "the base, for transformers",
        "adapter": "the adapter, for peft",
        "adapted": "the base after training on code, for transformers",
        "summary.json": "these figures",
        "loss.png": "both runs",
        "delta_spectrum.png": "what training on code changed",
        "rank_allocation.png": "which layers kept their ranks",
    }.items():
        if (out / name).exists():
            say(f"  {out / name!s:40} {what}")


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begun


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
