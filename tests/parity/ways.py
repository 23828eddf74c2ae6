"""The table of ways in which adapters are written: each row says how, and how reading it ends.

A way is what peft writes for some options, or what programs around peft do to its files. Not a test
itself: test_parity_ways.py runs every row through every command.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cases import V, small_base
from peers import load_model, peft, randomise, torch, trainable, transformers

from minilora.formats import load_file, save_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
Tensors = dict[str, np.ndarray]
Options = dict[str, Any]
Edit = Callable[[Path], object]  # a change of the adapter's folder


class Way(NamedTuple):
    """One way of writing an adapter.

    base       the kind of its base: "llama", "tied", "gpt2", "biased" (a Llama with biases), "half"
               (a Llama in bfloat16)
    options    of peft's LoraConfig, or AdaLoraConfig if there is an init_r
    edit       what is done to the files afterwards
    tokens     the vocabulary that the model is resized to before
    resized    is the base that is read resized, too?
    write      options of save_pretrained
    headless   is the adapter made for AutoModel, which has no head?
    mlx        can mlx-lm's files hold it?
    state      is the file all of `model.state_dict()`, base and names included?
    cycles     how often the adapter is merged and taken out again before it is saved
    unread     does peft not find the tensors after `edit`? It is asked before
    refused    words of the error, if it is refused
    notes      words of the note that says what was decided; "" for none
    """

    name: str
    base: str
    options: Options
    edit: Edit | None = None
    tokens: int = V
    resized: bool = False
    write: Options | None = None
    headless: bool = False
    mlx: bool = False
    state: bool = False
    cycles: int = 0
    unread: bool = False
    refused: str = ""
    notes: str = ""


WAYS: list[Way] = []


def way(name: str, base: str = "llama", options: Options | None = None, **more: Any) -> None:
    WAYS.append(
        Way(name, base, {"target_modules": ["q_proj", "v_proj"], **(options or {})}, **more)
    )


# ---- the bases -----------------------------------------------------------------------------------


def base_fields(kind: str) -> tuple[str, Options]:
    """(model type, fields of config.json) of a base of this kind."""
    model_type = "gpt2" if kind == "gpt2" else "llama"
    fields = small_base(model_type, tied=kind in ("tied", "gpt2"))
    if kind == "biased":
        fields["attention_bias"] = True
    return model_type, fields


# ---- files changed -------------------------------------------------------------------------------


def fields_set(**changes: Any) -> Edit:
    """Set fields of the configuration; a value may be a function of the old one."""

    def edit(folder: Path) -> None:
        fields = json.loads((folder / CONFIG).read_text())
        for name, value in changes.items():
            fields[name] = value(fields[name]) if callable(value) else value
        (folder / CONFIG).write_text(json.dumps(fields))

    return edit


def tensors_changed(change: Callable[[Tensors], Tensors | None]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = dict(load_file(folder / WEIGHTS))
        changed = change(tensors)
        save_file(folder / WEIGHTS, tensors if changed is None else changed)

    return edit


def tensors_added(paths: dict[str, tuple[int, ...]]) -> Edit:
    """Add the base's parameters, trained whole by other means than modules_to_save."""

    def change(tensors: Tensors) -> None:
        rng = np.random.default_rng(7)
        for path, shape in paths.items():
            values = 0.3 * rng.standard_normal(shape) + (len(shape) == 1)
            tensors[PREFIX + path] = values.astype(np.float32)

    return tensors_changed(change)


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def without(word: str) -> Edit:
    return tensors_changed(lambda t: {key: t[key] for key in t if word not in key})


def with_name(name: str) -> Edit:
    """The adapter's name in the keys, as `model.state_dict()` has it."""

    def change(tensors: Tensors) -> Tensors:
        named = {}
        for key, array in tensors.items():
            path, _, last = key.rpartition(".")
            if "lora_" in last:  # bare, as of embeddings; but DoRA's magnitudes are a module
                key += f".{name}" + (".weight" if "magnitude" in last else "")
            elif "lora_" in path.rpartition(".")[2]:
                key = f"{path}.{name}.{last}"
            named[key] = array
        return named

    return tensors_changed(change)


# ---- patterns ------------------------------------------------------------------------------------

LEAVES = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
PARTS = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"
TWO_WAYS = (
    rf"(?:.*?(?:language|text).*?(?:{PARTS}).*?(?:{LEAVES}).*?)|"
    rf"(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{PARTS})\.(?:(?:{LEAVES})))"
)
EVERY = [f"model.layers.{i}.self_attn.{leaf}_proj" for i in range(60) for leaf in "qv"]
FULL_NAMES = "^(" + "|".join(name.replace(".", r"\.") for name in EVERY) + ")$"
GROUPS = r"(.*)\.(" + "|".join(f"(({leaf}))" for leaf in LEAVES.split("|") * 8) + ")"

for label, pattern in {
    "lazy": r".*?\.(q_proj|v_proj)",
    "lazy counts": r"model\.layers\.\d+?\.self_attn\.[qv]_{1}?proj",
    "no head ahead": r"^(?!.*lm_head).*\.(q_proj|v_proj)$",
    "attention ahead": r"(?=.*self_attn).*_proj",
    "look-aheads inside each other": r"(?!(?=.*mlp).*down)(?!.*(?:k|o)_).*_proj",
    "a look-ahead at each letter": r"(?:(?!mlp).)*_proj",
    "edges of words": r".*\b[qv]_proj\b",
    "no edge of a word": r".*\B_proj",
    "named groups": r"(?P<block>.*)\.(?P<leaf>q_proj|up_proj)",
    "two ways": TWO_WAYS,
    "full names, 4,000 characters": FULL_NAMES,
    "114 groups": GROUPS,
    r"\A and \Z": r"\A.*(q|v)_proj\Z",
}.items():
    way(f"pattern: {label}", options={"target_modules": pattern}, mlx=True)

NOT_RUN = {
    "look-behind": r".*(?<=self_attn\.)q_proj",
    "no look-behind": r".*(?<!self_attn\.)(up|q)_proj",
    "a back-reference": r".*\.(?P<x>[qkv])_proj(?!(?P=x))",
    "flags": r"(?i).*\.Q_PROJ",
    "an atomic group": r"(?>model\.layers\.\d+)\.self_attn\.q_proj",
    "a possessive repetition": r"model\.layers\.\d++\.self_attn\.q_proj",
}
for label, pattern in NOT_RUN.items():
    note = "layers are those that have tensors in the file"
    way(f"keys decide: {label}", options={"target_modules": pattern}, mlx=True, notes=note)

ALL = "all-linear"
way("excluded ahead", options={"target_modules": ALL, "exclude_modules": r"(?!.*self_attn).*"})
way("excluded lazily", options={"target_modules": ALL, "exclude_modules": r".*?\.mlp\..*?"})
way(
    "excluded behind",
    options={"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*(?<=mlp\.)up_proj"},
    notes="layers are those that have tensors",
)
RANKS = {
    "rank_pattern": {r"layers\.(?!0).*q_proj": 3},
    "alpha_pattern": {r"layers\.0\.(?=self).*": 5},
}
way("ranks and alphas ahead", options=RANKS)
way("ranks by lazy names", options={"rank_pattern": {r"(?P<a>.*?)\.1\..*?v_proj": 1}})
way(
    "ranks behind",
    options={"rank_pattern": {r".*(?<=attn\.)q_proj": 3}},
    notes="ranks are those of the file",
)
way(
    "alphas behind",
    options={"alpha_pattern": {r".*(?<=attn\.)q_proj": 3}},
    refused="no tensor says which layers it means",
)
way(
    "a lazy layers_pattern",
    options={"layers_to_transform": [1], "layers_pattern": ["lay.*?"]},
    notes="layers are those that have tensors",
)

# ---- names that match nothing, and names in keys -------------------------------------------------

OTHERS = ["query_key_value", "c_attn", "w1"]
way(
    "targets of other models",
    edit=fields_set(target_modules=lambda names: [*names, *OTHERS]),
    mlx=True,
    notes="'query_key_value', 'c_attn', 'w1' match nothing in this base",
)
way(
    "saved modules of other models",
    options={"modules_to_save": ["lm_head", "score", "classifier"]},
    notes="'score', 'classifier' match nothing in this base",
)
way("a name in keys", edit=with_name("default"), mlx=True)
way("another name in keys", edit=with_name("lora_A"), mlx=True, unread=True)
way("a name in DoRA's keys", options={"use_dora": True}, edit=with_name("default"), mlx=True)
way(
    "a name in an embedding's keys",
    options={"target_modules": ["embed_tokens", "q_proj"]},
    edit=both(without("base_layer"), with_name("default")),
)
way(
    "a name in AdaLoRA's keys",
    options={"init_r": 3, "target_r": 2, "total_step": 9},
    edit=with_name("default"),
)

# ---- whole modules -------------------------------------------------------------------------------

NORMS = {"model.norm.weight": (8,), "model.layers.0.input_layernorm.weight": (8,)}
HEAD = {"lm_head.weight": (V, 8)}
ENDS = {"model.embed_tokens.weight": (V, 8), **HEAD}
NOTE = "whole in the file"
way("whole norms", edit=tensors_added(NORMS), notes=NOTE)
way("a whole head", edit=tensors_added(HEAD), notes=NOTE)
way("whole ends and norms", edit=tensors_added({**NORMS, **ENDS}), notes=NOTE)
way(
    "whole norms beside a saved head",
    options={"modules_to_save": ["lm_head"]},
    edit=tensors_added(NORMS),
    notes=NOTE,
)
GPT2 = {"target_modules": ["c_attn"]}
way(
    "a whole norm in part",
    "gpt2",
    GPT2,
    edit=tensors_added({"transformer.ln_f.weight": (8,)}),
    notes=NOTE,
)
way(
    "a whole linear layer",
    "gpt2",
    GPT2,
    edit=tensors_added({"transformer.h.0.mlp.c_fc.weight": (8, 32)}),
    notes=NOTE,
)
way("a whole state dict", state=True)
way("a whole state dict with a saved head", options={"modules_to_save": ["lm_head"]}, state=True)
way("a whole state dict of DoRA", "gpt2", {**GPT2, "use_dora": True}, state=True)
way("save_embedding_layers", write={"save_embedding_layers": True})
way("save_embedding_layers, tied", "tied", write={"save_embedding_layers": True})
way("save_embedding_layers, gpt2", "gpt2", GPT2, write={"save_embedding_layers": True})
way(
    "save_embedding_layers and saved",
    options={"modules_to_save": ["embed_tokens", "lm_head"]},
    write={"save_embedding_layers": True},
)
way("a whole head, tied", "tied", edit=tensors_added(HEAD), notes=NOTE)
way(
    "a whole embedding, tied",
    "tied",
    edit=tensors_added({"model.embed_tokens.weight": (V, 8)}),
    notes=NOTE,
)
way(
    "a whole embedding beside a saved head, tied",
    "tied",
    {"modules_to_save": ["lm_head"]},
    edit=tensors_added({"model.embed_tokens.weight": (V, 8)}),
    notes=NOTE,
)
way(
    "a whole head beside a saved embedding, tied",
    "tied",
    {"modules_to_save": ["embed_tokens"]},
    edit=tensors_added(HEAD),
    notes=NOTE,
)
way("whole ends that differ, tied", "tied", edit=tensors_added(ENDS), refused="differs from")

# ---- the base's weight beside an adapted embedding or head ---------------------------------------

TARGETS = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}


def base_weights(change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """Change the weights of the base, whose copies peft puts beside the factors of both ends."""
    return tensors_changed(
        lambda tensors: {
            key: change(array) if "base_layer" in key else array for key, array in tensors.items()
        }
    )


def in_bfloat16(array: np.ndarray) -> np.ndarray:
    return torch.tensor(array).bfloat16().float().numpy()


way("both ends", options=TARGETS)
way("both ends, in bfloat16", options=TARGETS, edit=base_weights(in_bfloat16), unread=True)
way(
    "both ends, in float16",
    options=TARGETS,
    edit=base_weights(lambda array: array.astype(np.float16)),
    unread=True,
)
way("both ends, merged and unmerged", options=TARGETS, cycles=3)
way("both ends, merged and unmerged in bfloat16", "half", TARGETS, cycles=1)
way(
    "a tied embedding, merged and unmerged",
    "tied",
    {"target_modules": ["q_proj", "embed_tokens"]},
    cycles=2,
)
way(
    "both ends of another base",
    options=TARGETS,
    edit=base_weights(lambda array: array + 2.0**-6 * abs(array)),
    refused="embed_tokens.base_layer.weight differs from the base's",
)
way(
    "both ends of another base in bfloat16",
    options=TARGETS,
    edit=base_weights(lambda array: in_bfloat16(array * 1.02)),
    refused="embed_tokens.base_layer.weight differs from the base's",
)

# ---- resized vocabularies ------------------------------------------------------------------------

SAVED = {"modules_to_save": ["embed_tokens", "lm_head"]}
RESIZINGS: dict[str, tuple[str, Options]] = {
    "plain": ("llama", {}),
    "plain, tied": ("tied", {}),
    "gpt2": ("gpt2", GPT2),
    "saved": ("llama", SAVED),
    "a saved head, tied": ("tied", {"modules_to_save": ["lm_head"]}),
    "both saved, tied": ("tied", SAVED),
    "LoRA on both ends": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "LoRA on a tied embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on gpt2's embedding": ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    "tokens": ("llama", {"trainable_token_indices": [2, V + 1]}),
    "tokens, tied": ("tied", {"trainable_token_indices": [2, V + 1]}),
}
for label, (kind, options) in RESIZINGS.items():
    way(f"resized, over the resized base: {label}", kind, options, tokens=V + 3, resized=True)
    way(f"resized, over the original: {label}", kind, options, tokens=V + 3, notes="resized")
way("shrunk, over the original", tokens=V - 2, notes="resized")
way(
    "resized, with rows for the embedding alone",
    options={"target_modules": ["q_proj", "embed_tokens"]},
    tokens=V + 3,
    refused="no rows of lm_head for the others",
)

# ---- how training began, for which task, with which biases ---------------------------------------

way("orthogonal", options={"init_lora_weights": "orthogonal"}, mlx=True)
way("mica", options={"init_lora_weights": "mica"}, mlx=True)
EVA = peft.tuners.lora.config.EvaConfig(rho=2.0)
way("eva", options={"init_lora_weights": "eva", "eva_config": EVA}, mlx=True)
# Starts that changed the base, without their first values; test_parity_starts.py has the others.
BASE = "neither A0, B0 nor that base is given"
way("pissa_niter_4", options={"init_lora_weights": "pissa_niter_4"}, refused=BASE)
for start in ("corda", "lora_ga"):
    way(start, edit=fields_set(init_lora_weights=start), refused=BASE)
for task in ("FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "TOKEN_CLS"):
    way(task, edit=fields_set(task_type=task), mlx=True)
DECODER = "those of a model without a head"
way("AutoModel", headless=True, mlx=True, notes=DECODER)
way(
    "AutoModel, with patterns",
    options={
        "target_modules": r"layers\.\d+\..*(q|v)_proj",
        "rank_pattern": {r"layers\.1\..*": 3},
    },
    headless=True,
    notes=DECODER,
)
way("AutoModel, gpt2", "gpt2", GPT2, headless=True, mlx=True, notes=DECODER)
way(
    "AutoModel with norms and embedding",
    options={"modules_to_save": ["norm", "embed_tokens"]},
    headless=True,
    notes=DECODER,
)
for label, (kind, options) in {
    "DoRA": ("llama", {"use_dora": True}),
    "biases": ("gpt2", {**GPT2, "bias": "all"}),
    "tokens": ("llama", {"trainable_token_indices": [1, 4]}),
    "an embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "a saved mlp": ("llama", {"modules_to_save": ["mlp"]}),
}.items():
    way(f"AutoModel with {label}", kind, options, headless=True, notes=DECODER)
way("lora_only", "biased", {"bias": "lora_only"})
way(
    "lora_only without biases",
    "biased",
    {"bias": "lora_only"},
    edit=without(".bias"),
    refused="trained biases are missing",
)


# ---- writing a row's adapter ---------------------------------------------------------------------


def resize_tokens(model: Any, tokens: int) -> None:
    """Resize a model's vocabulary; new rows are random."""
    if tokens != V:
        model.resize_token_embeddings(tokens, mean_resizing=False)
        rng = np.random.default_rng(11)
        for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            rows = 0.3 * rng.standard_normal((max(0, tokens - V), 8))
            layer.weight.data[V:] = torch.tensor(rows, dtype=layer.weight.dtype)


def write_way(row: Way, base: Path, adapter: Path) -> Any:
    """Write the adapter of a row; returns peft's model as it was saved."""
    model = load_model(base, "bfloat16" if row.base == "half" else "float32")
    if row.headless:
        model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    resize_tokens(model, row.tokens)
    kind = peft.AdaLoraConfig if "init_r" in row.options else peft.LoraConfig
    task = "FEATURE_EXTRACTION" if row.headless else "CAUSAL_LM"
    config = kind(**{"r": 2, "lora_alpha": 3, "task_type": task, **row.options})
    theirs = peft.get_peft_model(model, config).eval()
    randomise(trainable(theirs).values(), seed=3)
    if row.unread or row.cycles or row.state:
        theirs.save_pretrained(adapter / "before")
    for _ in range(row.cycles):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    theirs.save_pretrained(adapter, **(row.write or {}))
    if row.state:
        tensors = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
        save_file(adapter / WEIGHTS, tensors)
    if row.edit is not None:
        row.edit(adapter)
    return theirs
