"""The demo: pretrain a language model, adapt it to another language with LoRA, and measure both.

English prose (Python's own language reference) teaches a small byte-level transformer; then its
weights are frozen and the adapter's weights, a few per cent as many, learn Python code. Held-out
text is of other topics and other files. The adapter is LoRA's unless another method is chosen; with
the method "full" all weights train instead, for comparison.
"""

from __future__ import annotations

import hashlib
import lzma
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..autograd import no_grad
from ..data.files import read_plain_text
from ..data.texts import prose, python_sources, split, split_text
from ..data.tokenizer import ByteTokenizer
from ..errors import ConfigError, MiniloraError, shorten
from ..formats import write_json
from ..formats.disk import JsonObject
from ..lora import AdaLoraConfig, LoraConfig, LoraLinear, PeftModel, get_peft_model
from ..models.config import TransformerConfig
from ..models.generation import generate
from ..models.transformer import CausalLM
from ..nn import LinearBase
from ..quant.linear import quantize
from ..training.loop import Result, Settings, bits_per_byte, evaluate, rank_history, train
from ..training.methods import (
    NAMES,
    adapter_config,
    format_weight_memory,
    measure_weight_memory,
    method_of,
)

if TYPE_CHECKING:
    from .report.gathering import Sources

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
# AdaLoRA's E starts at zero between A and B of length one, and grows with the learning rate: it
# needs larger steps.
ADALORA = {**ADAPTER, "lora_alpha": 256}
ADALORA_LR = 1e-2
HELD_OUT_BYTES = 20_000  # of the held-out text, measured while a run trains
PROMPT = "def read("
FORMULAS = {
    "lora": "dW = s B A",
    "adalora": "dW = s B E A",
    "dora": "W' - W",
    "full": "what training added",
}


@dataclass(frozen=True)
class Plan:
    """The sizes of a demo; the defaults take two to three minutes on two cores."""

    model: TransformerConfig = MODEL
    pretrain: Settings = PRETRAIN
    adapt: Settings = ADAPT
    # None: all weights train.
    adapter: LoraConfig | None = field(default_factory=lambda: LoraConfig(**ADAPTER))
    quantize: str = "none"  # the form in which the base is stored while the adapter trains
    windows: int = 512  # held-out windows that the final figures are measured on
    sample: int = 240  # bytes of text to write

    @property
    def method(self) -> str:
        return method_of(self.adapter)

    def adapted_by(
        self, method: str, quantize: str = "none", fields: Mapping[str, Any] | None = None
    ) -> Plan:
        """The plan with another method; `fields` of its adapter replace the demo's defaults."""
        if quantize == "stored":
            raise ConfigError(
                "quantize = stored is for a base that is read from a file: the demo trains its own"
            )
        defaults = {"full": {}, "adalora": ADALORA}.get(method, ADAPTER)
        config = adapter_config(method, quantize, defaults | dict(fields or {}), self.adapt.steps)
        adapt = replace(self.adapt, lr=ADALORA_LR) if method == "adalora" else self.adapt
        return replace(self, adapter=config, adapt=adapt, quantize=quantize)

    def quick(self) -> Plan:
        """A version of 20 seconds, for tests: it shows that all steps run, not what LoRA can do."""
        model = replace(self.model, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
        sizes: dict[str, Any] = {"batch_size": 8, "context": 64, "eval_every": 20}
        pretrain = replace(self.pretrain, steps=120, **sizes)
        adapt = replace(self.adapt, steps=80, **sizes)
        return replace(self, model=model, pretrain=pretrain, adapt=adapt, windows=64, sample=80)


def demo(
    out: str | Path,
    plan: Plan,
    pretrain_data: str | None = None,
    adapt_data: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    pictures: bool = True,
    say: Callable[[str], None] = print,
) -> JsonObject:
    """Run all stages, write the results into `out`, an empty folder, and return the summary.

    The summary is what summary.json has.
    """
    out = Path(out)
    seconds: dict[str, float] = {}
    tokenizer = ByteTokenizer()
    texts = {
        "prose": split_text(read_plain_text(pretrain_data)) if pretrain_data else split(prose()),
        "code": split_text(read_plain_text(adapt_data)) if adapt_data else split(python_sources()),
    }
    training = {name: tokenizer.encode(text) for name, (text, _) in texts.items()}
    held_out = {name: tokenizer.encode(text) for name, (_, text) in texts.items()}

    def fit(some_model: Any, name: str, settings: Settings, folder: Path, title: str) -> Result:
        folder.mkdir()
        settings = replace(settings, seed=seed, threads=threads)
        part = held_out[name][:HELD_OUT_BYTES]
        result = train(some_model, training[name], settings, folder, held_out=part, title=title)
        some_model.save_pretrained(folder)
        return result

    def measure(some_model: Any) -> dict[str, float]:
        bits = {}
        context = plan.pretrain.context
        for name, ids in held_out.items():
            loss = evaluate(some_model, ids, context, limit=plan.windows, threads=threads)
            bits[name] = bits_per_byte(loss)
        return bits

    def write_sample(some_model: Any) -> str:
        prompt = tokenizer.encode(PROMPT)[None]
        ids = generate(some_model, prompt, plan.sample, temperature=0.7, top_k=40, seed=seed)
        return tokenizer.decode(ids[0])

    model = CausalLM(plan.model, seed=seed, device=device)
    count = sum(p.size for p in model.parameters())
    say(f"1. Pretrain {count:,} parameters on {len(training['prose']):,} bytes of prose")
    base_folder = out / "base"
    with _timed(seconds, "pretrain"):
        pretrained = fit(model, "prose", plan.pretrain, base_folder, "pretrain")
        tokenizer.save(base_folder)
    with _timed(seconds, "evaluate base"):
        figures = {"base": measure(model)}
        samples = {"base": write_sample(model)}

    summary: JsonObject = {"method": plan.method, "quantize": plan.quantize}
    if plan.quantize != "none":
        summary["held"] = measure_weight_memory(quantize(model, plan.quantize))
        say(f"   {format_weight_memory(summary['held'])}")
        figures["quantized base"] = measure(model)
    before = _fingerprint(model)
    originals: dict[str, np.ndarray] = {}
    adapted: Any = model
    folder = out / "adapted"
    weights = folder / "model.safetensors"
    if plan.adapter:
        adapted = get_peft_model(model, plan.adapter, seed=seed)
        folder = out / "adapter"
        weights = folder / "adapter_model.safetensors"
    else:
        originals = _linear_weights(model)
    trainable = sum(p.size for p in adapted.parameters() if p.requires_grad)
    total = sum(p.size for p in adapted.parameters())
    what = "Train all of them"
    if plan.adapter:
        ranks = _describe_ranks(plan.adapter)
        what = f"Freeze them, and train {trainable:,} of {NAMES[plan.method]} ({ranks})"
    say(f"2. {what} on {len(training['code']):,} bytes of code")
    with _timed(seconds, "adapt"):
        fine_tuned = fit(adapted, "code", plan.adapt, folder, "adapt")
        if not plan.adapter:
            tokenizer.save(folder)
    with _timed(seconds, "evaluate adapter"):
        figures[plan.method] = measure(adapted)
        samples[plan.method] = write_sample(adapted)
        figures["lzma"] = {
            name: 8 * len(lzma.compress(text)) / len(text) for name, (_, text) in texts.items()
        }

    ids = held_out["code"][None, : plan.pretrain.context]
    summary |= {
        "bits_per_byte": figures,
        "trainable": trainable,
        "total": total,
        "adapter_bytes": weights.stat().st_size,
        "base_bytes": (base_folder / "model.safetensors").stat().st_size,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "checks": _check(adapted, ids, before) if plan.adapter else {},
        "samples": samples,
        "seed": seed,
    }
    _report(summary, say)  # first, because what follows needs free space on the disk
    if pictures:
        summary["pictures"] = _draw(
            out, plan, lambda: _spectra(adapted, originals), pretrained, fine_tuned, say
        )
        _write_page(out, plan, adapted, held_out, seed, threads, say)
    write_json(out / "summary.json", summary)
    _list_files(out, say)
    return summary


def _describe_ranks(config: LoraConfig) -> str:
    if isinstance(config, AdaLoraConfig):
        return f"init_r = {config.init_r}, target_r = {config.target_r}"
    return f"r = {config.r}"


def _check(model: PeftModel, ids: np.ndarray, before: str) -> JsonObject:
    """What must hold after training: the base is unchanged, and merging equals adding."""
    base = model.get_base_model()
    with no_grad():
        adapted = model(ids).numpy()
        with model.disable_adapter():
            disabled = _fingerprint(base)
        model.merge_adapter()
        merged = model(ids).numpy()
        model.unmerge_adapter()
    error = np.abs(merged - adapted).max() / np.abs(adapted).max()
    return {
        "base_bit_identical": before == disabled == _fingerprint(base),
        "merge_identity_error": float(error),
    }


def _fingerprint(model: Any) -> str:
    """SHA-256 of the base's weights, by name, without the adapters in it."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if ".adapters." not in name:
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(p.numpy().tobytes())
    return digest.hexdigest()


def _linear_weights(model: Any) -> dict[str, np.ndarray]:
    """A copy of W of every linear layer but the head, by path."""
    head = model.get_output_embeddings()
    weights = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LinearBase) and layer is not head:
            weights[path] = layer.backend.to_numpy(layer.dense_weight()).copy()
    return weights


def _spectra(
    model: Any, originals: Mapping[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Singular values of W and of dW, by path.

    dW is what the adapter adds, or without an adapter the difference of W from `originals`.
    """
    spectra = {}
    if not isinstance(model, PeftModel):
        for path, W in _linear_weights(model).items():
            before = originals[path]
            spectra[path] = _singular_values(before), _singular_values(W - before)
        return spectra
    (adapter,) = model.active_adapters
    config = model.peft_config[adapter]
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLinear):
            base = layer.base_layer
            W = base.backend.to_numpy(base.dense_weight())
            dW = layer.delta_weight(adapter)
            rank = None if config.use_dora else config.rank(path)  # the values beyond are zero
            spectra[path] = _singular_values(W), _singular_values(dW)[:rank]
    return spectra


def _singular_values(W: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.svd(W, compute_uv=False))


def _draw(
    out: Path,
    plan: Plan,
    spectra: Callable[[], Any],
    pretrained: Result,
    fine_tuned: Result,
    say: Callable[[str], None],
) -> list[str]:
    from . import plots  # matplotlib is optional, and slow to import

    reason = plots.why_unavailable()
    if reason:
        say(f"(no pictures: {reason})")
        return []
    title = "Code, all parameters"
    if plan.adapter:
        form = "" if plan.quantize == "none" else f" in {plan.quantize}"
        title = f"{NAMES[plan.method]} on code, base frozen{form}"
    stages = {"Pretraining on prose, all parameters": _in_bits(pretrained)}
    stages[title] = _in_bits(fine_tuned)
    plots.loss_curves(out / "loss.png", stages)
    plots.delta_spectrum(out / "delta_spectrum.png", spectra(), FORMULAS[plan.method])
    if plan.method != "adalora":
        return ["loss.png", "delta_spectrum.png"]
    plots.rank_allocation(out / "rank_allocation.png", *rank_history(out / "adapter"))
    return ["loss.png", "delta_spectrum.png", "rank_allocation.png"]


def _write_page(
    out: Path,
    plan: Plan,
    model: Any,
    held_out: Mapping[str, np.ndarray],
    seed: int,
    threads: int | None,
    say: Callable[[str], None],
) -> None:
    """Write report.html, a page about the run on code; one line says why if that fails.

    The model moves to the CPU.
    """
    from .report import writing
    from .report.gathering import gather

    try:
        writing.require_available()
        report = gather(_sources_of_page(out, plan, model.to("cpu"), held_out, seed), threads)
        writing.write_page(report, out / "report.html")
    except Exception as error:  # a full disk: the run is saved, whatever it is
        text = (
            str(error) if isinstance(error, MiniloraError) else f"{type(error).__name__}: {error}"
        )
        say(f"(no page: {shorten(text)})")


def _sources_of_page(
    out: Path, plan: Plan, model: Any, held_out: Mapping[str, np.ndarray], seed: int
) -> Sources:
    from .report.gathering import Sources
    from .report.measuring import MOST_WINDOWS, MeasuredText
    from .report.subject import Subject

    context = plan.pretrain.context
    limit = min(plan.windows, MOST_WINDOWS)
    texts = {
        name: MeasuredText(f"held-out {name}", ids[:HELD_OUT_BYTES], 1.0, context, limit)
        for name, ids in held_out.items()
    }
    run = out / ("adapter" if plan.adapter else "adapted")
    base = None if plan.adapter else CausalLM.from_pretrained(out / "base")
    return Sources(
        title=f"{NAMES[plan.method]} on code",
        subject=Subject(model, base),
        base="base",
        tokenizer=ByteTokenizer(),
        text=texts["code"],
        also=texts["prose"],
        run=run,
        settings={"quantize": plan.quantize, **vars(plan.adapt), "seed": seed},
        files={"base": out / "base", "adapter": run},
    )


def _in_bits(run: Result) -> tuple[list[float], list[tuple[int, float]]]:
    """A run's losses and its evaluations, (step, loss), in bits per byte."""
    evaluations = [(step, bits_per_byte(loss)) for step, loss in run.evaluations]
    return [bits_per_byte(loss) for loss in run.losses], evaluations


def _report(summary: JsonObject, say: Callable[[str], None]) -> None:
    method = summary["method"]
    coded = "" if summary["quantize"] == "none" else f"{summary['quantize']} "
    labels = {"base": "base", "quantized base": f"{coded}base", "lzma": "lzma, for scale"}
    labels[method] = f"{coded}base + {NAMES[method]}"
    what = "adapter on disk"
    if method == "full":
        labels[method] = "all weights trained"
        what = "adapted model on disk"
    say("\nHeld-out text, bits per byte (lower is better)\n")
    say(f"  {'':24}{'prose':>8}{'code':>8}")
    for key, row in summary["bits_per_byte"].items():
        say(f"  {labels[key]:24}{row['prose']:8.3f}{row['code']:8.3f}")
    trainable = summary["trainable"]
    total = summary["total"]
    say(f"\n  trainable parameters    {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)")
    size = summary["adapter_bytes"]
    say(f"  {what:22}  {size:,} bytes, the base {summary['base_bytes']:,}")
    checks = summary["checks"]
    if checks:
        error = checks["merge_identity_error"]
        unchanged = "yes, every bit" if checks["base_bit_identical"] else "NO"
        say(f"  merged = base + adapter to {error:.1e} of the largest logit")
        say(f"  base weights unchanged  {unchanged}")
    for key, label in {"base": "Before", method: "After"}.items():
        say(f"\n{label}, from {PROMPT!r}:\n")
        say(_printable(summary["samples"][key]))


def _printable(sample: str) -> str:
    """The sample, indented, with a replacement for each character that does not print."""
    text = ""
    for c in sample:
        text += c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}"
    return "\n".join(f"    {line}" for line in text.splitlines())


def _list_files(out: Path, say: Callable[[str], None]) -> None:
    contents = {
        "base": "the base, for transformers",
        "adapter": "the adapter, for peft",
        "adapted": "the base after training on code, for transformers",
        "summary.json": "these figures",
        "loss.png": "both runs",
        "delta_spectrum.png": "what training on code changed",
        "rank_allocation.png": "which layers kept their ranks",
        "report.html": "a page about what training changed",
    }
    say("\nWritten")
    for name, content in contents.items():
        path = out / name
        if path.exists():
            say(f"  {path!s:40} {content}")


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begun
