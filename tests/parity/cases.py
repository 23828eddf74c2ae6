"""The rows of the parity table: which bases, which adapters on them, and how many of each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st
from peers import NAMES, load_model, randomise, torch, transformers

from minilora.models.dialects import MODEL_TYPES

V = 13
Options = dict[str, Any]

# ---- bases ----

DEFAULT = {"rope_type": "default", "rope_theta": 1e3}
LINEAR = DEFAULT | {"rope_type": "linear", "factor": 4.0}
LLAMA3 = LINEAR | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
ACTIVATIONS = ["gelu_new", "gelu", "relu", "silu", "gelu_pytorch_tanh"]
WINDOWS = [1, 3, 4, 20]


@st.composite
def bases(draw: st.DrawFn, kinds: tuple[str, ...] = MODEL_TYPES) -> tuple[str, Options]:
    """A model type, and the fields of its config.json."""
    kind = draw(st.sampled_from(kinds))
    kv = draw(st.integers(1, 3))
    heads = kv * draw(st.integers(1, 2))
    layers = draw(st.integers(1, 3))
    eps = draw(st.sampled_from([1e-6, 1e-5]))
    fields: Options = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2}
    fields["tie_word_embeddings"] = draw(st.booleans())
    if kind == "gpt2":
        width = heads * draw(st.sampled_from([2, 3, 4]))  # odd is valid without rotary embedding
        fields |= {"n_embd": width, "n_head": heads, "n_layer": layers, "n_positions": 64}
        fields["n_inner"] = draw(st.sampled_from([None, 5, width]))
        fields["activation_function"] = draw(st.sampled_from(ACTIVATIONS))
        fields["layer_norm_epsilon"] = eps
        return kind, fields
    head_dim = draw(st.sampled_from([2, 4, 8]))
    fields["hidden_size"] = heads * head_dim
    if kind != "qwen2":
        fields["head_dim"] = head_dim
        fields["hidden_size"] = heads * draw(st.sampled_from([head_dim, 5]))
    fields["intermediate_size"] = draw(st.integers(1, 20))
    fields["num_hidden_layers"] = layers
    fields["num_attention_heads"] = heads
    fields["num_key_value_heads"] = draw(st.sampled_from([kv, heads]))
    fields["max_position_embeddings"] = 64
    fields["rms_norm_eps"] = eps
    fields["rope_parameters"] = dict(draw(st.sampled_from([DEFAULT, LINEAR, LLAMA3])))
    if kind in ("llama", "qwen3"):
        fields["attention_bias"] = draw(st.booleans())
    if kind == "llama":
        fields["mlp_bias"] = draw(st.booleans())
    if kind == "mistral":
        fields["sliding_window"] = draw(st.sampled_from([None, *WINDOWS]))
    if kind.startswith("qwen"):
        fields["use_sliding_window"] = draw(st.booleans())
        fields["sliding_window"] = draw(st.sampled_from(WINDOWS))
        fields["max_window_layers"] = draw(st.integers(0, 3))
        fields["layer_types"] = None
        if fields["use_sliding_window"] and draw(st.booleans()):
            types = st.sampled_from(["full_attention", "sliding_attention"])
            fields["layer_types"] = [draw(types) for _ in range(layers)]
    return kind, fields


def small_base(kind: str, tied: bool) -> Options:
    """The fields of a config.json with two layers."""
    fields: Options = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2}
    fields["tie_word_embeddings"] = tied
    if kind == "gpt2":
        return fields | {"n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 64}
    fields |= {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    if kind == "mistral":
        fields["sliding_window"] = 4
    if kind != "qwen2":
        fields["head_dim"] = 4
    return fields


def save_base(folder: Path, kind: str, fields: Options, dtype: str = "float32") -> Any:
    """Transformers' model in float32, as it loads from `folder`, saved there in `dtype`."""
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model.parameters())
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return load_model(folder, "float32")


# ---- adapters ----

GPT2 = ["c_attn", "c_fc", "mlp.c_proj", "attn.c_proj", "c_proj"]
BIASES = ["none", "all", "lora_only"]


def some(names: list[str], low: int = 1, high: int = 4) -> st.SearchStrategy[list[str]]:
    """Lists of `low` to `high` different names."""
    return st.lists(st.sampled_from(names), min_size=low, max_size=high, unique=True)


@st.composite
def lora_options(draw: st.DrawFn, names: list[str], max_r: int = 4) -> Options:
    """Fields of any LoRA, with patterns for some of these names.

    The first pattern that matches applies. peft's files sort them, so the order must be sorted to
    survive a save.
    """
    keys = sorted(draw(st.sets(st.sampled_from(names))))
    options: Options = {"task_type": "CAUSAL_LM"}
    options["r"] = draw(st.integers(1, max_r))
    options["lora_alpha"] = draw(st.integers(1, 16))
    options["use_rslora"] = draw(st.booleans())
    options["use_dora"] = draw(st.booleans())
    options["init_lora_weights"] = draw(st.sampled_from([True, False, "gaussian"]))
    options["bias"] = draw(st.sampled_from(BIASES))
    options["rank_pattern"] = {key: draw(st.integers(1, 4)) for key in keys}
    options["alpha_pattern"] = {key: draw(st.integers(1, 16)) for key in keys}
    return options


@st.composite
def llama_options(draw: st.DrawFn, use_dora: bool) -> Options:
    """LoRA or DoRA on some linear layers of the three-layer Llama."""
    names = draw(some(NAMES))
    options = draw(lora_options([*names, "q_proj", f"layers.1.*{names[0]}"], 6 if use_dora else 4))
    options["use_dora"] = use_dora
    saved = [None, ["lm_head"], ["norm"], ["embed_tokens", "lm_head"]]
    options["modules_to_save"] = draw(st.sampled_from(saved))
    pattern = rf".*\.[12]\..*\.({'|'.join(names)})"
    options["target_modules"] = draw(st.sampled_from([names, pattern, "all-linear"]))
    if options["target_modules"] is names:
        options["layers_to_transform"] = draw(st.sampled_from([None, 1, [1, 2]]))
    return options


@st.composite
def adalora_options(draw: st.DrawFn) -> Options:
    """AdaLoRA on some linear layers of the three-layer Llama."""
    options: Options = {"task_type": "CAUSAL_LM", "total_step": 3, "tfinal": 1}
    options["init_r"] = draw(st.integers(2, 5))
    options["target_r"] = draw(st.integers(1, options["init_r"]))
    options["lora_alpha"] = draw(st.integers(1, 16))
    options["target_modules"] = draw(some(NAMES))
    options["init_lora_weights"] = draw(st.booleans())
    options["bias"] = draw(st.sampled_from(BIASES))
    options["modules_to_save"] = draw(st.sampled_from([None, ["lm_head"]]))
    return options


@st.composite
def layer_options(draw: st.DrawFn, kind: str, tied: bool) -> Options:
    """LoRA or DoRA on some linear layers of any model."""
    gpt2 = kind == "gpt2"
    names = draw(some(GPT2 if gpt2 else NAMES))
    options = draw(lora_options(names))
    whole = ["ln_f", "wpe", "mlp", "attn.c_proj"] if gpt2 else ["model.norm", "input_layernorm"]
    if kind == "qwen3":
        whole.append("q_norm")
    if not tied:
        whole.append("lm_head")
    whole = [name for name in whole if name not in names]
    saved = draw(st.sampled_from([None, *whole]))
    if saved in ("mlp", "attn.c_proj"):
        names = ["c_attn"]
    # With bias="all" peft saves a copied module's bias twice more, under names of no module.
    if gpt2 and saved in ("ln_f", "mlp", "attn.c_proj") and options["bias"] == "all":
        options["bias"] = "none"
    options["modules_to_save"] = saved and [saved]
    options["target_modules"] = draw(st.sampled_from([names, "all-linear", None]))
    return options


@st.composite
def end_options(draw: st.DrawFn, kind: str, tied: bool) -> Options:
    """LoRA or DoRA on embeddings and head, copies of them, and trained tokens."""
    gpt2 = kind == "gpt2"
    embedding, layers = ("wte", GPT2) if gpt2 else ("embed_tokens", NAMES)
    ends = [embedding, "lm_head"]
    if gpt2:
        ends.append("wpe")
    targets = draw(some(ends, 0, 3))
    free = [name for name in ends if name not in targets]
    saved = draw(st.sampled_from([None, *free, "ln_f" if gpt2 else "model.norm"]))
    targets += draw(some(layers, 0, 3))
    targets = targets or layers[:1]
    options = draw(lora_options(targets))
    options["modules_to_save"] = saved and [saved]
    pattern = rf"(.*\.)?({'|'.join(targets)})"
    options["target_modules"] = draw(st.sampled_from([targets, pattern]))
    taken = {*targets, saved}
    if embedding not in taken and not (tied and "lm_head" in taken) and draw(st.booleans()):
        options["trainable_token_indices"] = draw(tokens(embedding, "lm_head" not in taken))
    return options


@st.composite
def tokens(draw: st.DrawFn, embedding: str, head_too: bool) -> Any:
    """The field trainable_token_indices: a list, or lists by name."""
    lists = st.lists(st.integers(0, V - 1), min_size=1, max_size=4, unique=True)
    indices = draw(lists)
    form = draw(st.sampled_from(["list", "name", "both"]))
    if form == "list":
        return indices
    by_name = {embedding: indices}
    if form == "both" and head_too:
        by_name["lm_head"] = draw(st.sampled_from([indices, draw(lists)]))
    return by_name


LLAMA = st.just("llama")  # the three-layer Llama of conftest.py
FIXED = st.tuples(st.sampled_from(MODEL_TYPES), st.booleans())
SEEDS = st.integers(0, 99)
# The number of examples, the base and the options, and the seed of the adapter's values. Those of
# "lora" and "ends" are fixed: with others, float32's rounding can come to more than 1e-5.
FAMILIES: dict[str, tuple[int, Any, Any]] = {}
FAMILIES["lora"] = 15, st.tuples(LLAMA, llama_options(False)), st.just(0)
FAMILIES["dora"] = 15, st.tuples(LLAMA, llama_options(True)), SEEDS
FAMILIES["adalora"] = 15, st.tuples(LLAMA, adalora_options()), SEEDS
ENDS = FIXED.flatmap(lambda base: st.tuples(st.just(base), end_options(*base)))
FAMILIES["ends"] = 40, ENDS, st.just(2)


def name_layers(value: Any, kind: str) -> Any:
    """The value with a model type's names in place of END (its embedding) and LAYER."""
    end, layer = ("wte", "c_attn") if kind == "gpt2" else ("embed_tokens", "q_proj")
    if isinstance(value, str):
        return value.replace("END", end).replace("LAYER", layer)
    if isinstance(value, list):
        return [name_layers(member, kind) for member in value]
    return copy.deepcopy(value)


# ---- adapters that keep a tied head and its embedding equal ----


class Tied(NamedTuple):
    """Options of an adapter, and which tensors at the ends its file must contain."""

    options: Options
    ends: str
    gpt2_ends: str


TIED: dict[str, Tied] = {}


def tied(name: str, ends: str, targets: Any, gpt2_ends: str = "", **options: Any) -> None:
    options |= {"target_modules": targets, "r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM"}
    options["ensure_weight_tying"] = True
    TIED[name] = Tied(options, ends, gpt2_ends or ends)


tied("embedding", "base factors", ["END", "LAYER"], "factors")
tied("head", "factors", ["lm_head"])
tied("both", "base factors", ["END", "lm_head", "LAYER"], "factors", use_rslora=True)
tied("pattern", "base factors", ".*(lm_head|END)")
tied("copies", "copies", ["LAYER"], modules_to_save=["END", "lm_head"])
tied("copy of the head", "copies", ["LAYER"], modules_to_save=["lm_head"])
tied("tokens", "rows", ["LAYER"], trainable_token_indices=[1, 5])

# ---- training ----


class Training(NamedTuple):
    """Twenty steps of an adapter; `prepared` forms the weights of a step before its layers run."""

    name: str
    base: Any
    options: Options
    dtype: str = "float64"
    prepared: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.base}-{self.dtype}-{self.prepared}"


TRAININGS: list[Training] = []


def train(name: str, targets: Any, tied: bool = True, **options: Any) -> None:
    """Add a row for each of the next two model types."""
    options |= {"target_modules": targets, "r": 2, "lora_alpha": 3, "init_lora_weights": False}
    for _ in range(2):
        kind = MODEL_TYPES[len(TRAININGS) % len(MODEL_TYPES)]
        TRAININGS.append(Training(name, (kind, tied), options))


train("lora", "all-linear", bias="all")
train("dora", ["LAYER", "END"], use_dora=True)
train("rslora", ["LAYER", "lm_head"], tied=False, use_rslora=True, bias="lora_only")
train("embedding", ["END", "LAYER"])
train("tokens", ["LAYER"], trainable_token_indices=[0, 3, 7])
train("copies", ["LAYER"], modules_to_save=["END", "lm_head"])
train("copy of the head", ["LAYER"], modules_to_save=["lm_head"], ensure_weight_tying=True)
TRAININGS += [row._replace(dtype="float32") for row in TRAININGS[::3]]
DORA = {"r": 3, "lora_alpha": 7, "use_dora": True, "target_modules": NAMES}
TRAININGS.append(Training("dora everywhere", "llama", DORA))
TRAININGS.append(Training("dora everywhere", "llama", DORA, prepared=True))

# ---- target_modules and the fields beside it ----

TARGETS: list[Options] = []


def target(modules: Any, **options: Any) -> None:
    TARGETS.append({"r": 2, "target_modules": modules, **options})


target(["q_proj"])
target(["q_proj", "up_proj"])
target(["self_attn.q_proj"])
target(["1.self_attn.q_proj", "model.layers.2.mlp.up_proj"])
target(["lm_head", "q_proj"])
target("lm_head")
target(r".*\.(q|v)_proj")
target(r"model\.layers\.[02]\.mlp\..*_proj")
target(r".*\.layers\.\d\.self_attn\.[^qk]_proj")
target(r"(?:.*up|.*q)_proj|lm_head")
target("all-linear")
target("All-Linear")
target("all-linear", exclude_modules=["q_proj", "1.mlp.up_proj"])
target("all-linear", exclude_modules=r".*\.1\..*")
target("all-linear", modules_to_save=["lm_head"])
target("all-linear", modules_to_save=["mlp"])
target(None)
target(["q_proj"], layers_to_transform=1)
target(["q_proj", "up_proj"], layers_to_transform=[0, 2])
target(["q_proj"], layers_to_transform=[0, 2], layers_pattern="layers")
target(["q_proj"], layers_to_transform=[1], layers_pattern=["h", "layers"])
