"""Variations of config.json: which are read, as transformers reads them, and which are refused."""

from __future__ import annotations

from typing import Any, NamedTuple

from minilora.models.dialects import DIALECTS, GPT2_ACTIVATIONS

Fields = dict[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"
CONTEXT = 128
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
BASES: dict[str, Fields] = {kind: dict(SIZES) for kind in DIALECTS}
BASES["mistral"]["sliding_window"] = None
BASES["qwen3"]["head_dim"] = 16
BASES["gpt2"] = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
ROTARY = ("llama", "mistral", "qwen2", "qwen3")
QWEN = ("qwen2", "qwen3")


class Variation(NamedTuple):
    """One config.json.

    fields    what it adds to BASES[kind]
    refused   None if it is read, or a word of our refusal: the name of the field
    without   fields of the base that it leaves out
    """

    kind: str
    fields: Fields
    refused: str | None = None
    without: tuple[str, ...] = ()

    @property
    def config(self) -> Fields:
        base = {name: v for name, v in BASES[self.kind].items() if name not in self.without}
        return {"model_type": self.kind, **base, **self.fields}

    def __str__(self) -> str:
        shown = ",".join(f"{name}={value}" for name, value in self.fields.items())
        return f"{self.kind}-{'refused' if self.refused else 'read'}-{shown}"[:110]


VARIATIONS: list[Variation] = []


def read(kind: str, *without: str, **fields: Any) -> None:
    VARIATIONS.append(Variation(kind, fields, None, without))


def refuse(kind: str, named: str, **fields: Any) -> None:
    VARIATIONS.append(Variation(kind, fields, named))


for kind in BASES:
    read(kind)

# ---- rotary settings: what is set, in every wording ---------------------------------------------

OLD = "original_max_position_embeddings"
STRETCH = {"factor": 4.0, OLD: 32}
LLAMA3 = {"rope_type": "llama3", **STRETCH, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", **STRETCH}
SETTINGS: list[Fields] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4},
    {"rope_type": "linear", "factor": 0.5},
    LLAMA3,
    {name: value for name, value in LLAMA3.items() if name != OLD},
    {**LLAMA3, OLD: 256},
    YARN,
    {name: value for name, value in YARN.items() if name != OLD},
    {**YARN, "factor": None},
    {**YARN, "factor": 1.0},
    {**YARN, "attention_factor": 1.5},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    {**YARN, "mscale": 0, "mscale_all_dim": 0.5},
    {**YARN, "beta_fast": 8, "beta_slow": 2.0},
    {**YARN, "beta_fast": 4, "beta_slow": 4, "truncate": True},
    {**YARN, "beta_fast": 4, "beta_slow": 4, "truncate": False},
    {**YARN, "beta_fast": 0, "beta_slow": None, "truncate": False},
    {**YARN, OLD: 4},  # no plane turns once within so few positions
    {**YARN, OLD: 100000},  # and here every plane turns often
    {"rope_type": "proportional"},
    {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.6},
    {"rope_type": "dynamic", "factor": 2.0},  # which changes nothing within the context
]
WORDINGS = 8


def word(setting: Fields, theta: float, number: int) -> Fields:
    """The fields of a config.json that say one thing in one of `WORDINGS` ways."""
    untyped = {name: value for name, value in setting.items() if name != "rope_type"}
    old = {"type": setting["rope_type"], **untyped}
    other = {"rope_type": "linear", "factor": 3.0, "rope_theta": 7.0}
    match number:
        case 0:
            return {"rope_parameters": {**setting, "rope_theta": theta}}
        case 1:
            return {"rope_parameters": {**old, "rope_theta": theta}}
        case 2:
            return {"rope_scaling": old, "rope_theta": theta}
        case 3:
            return {"rope_scaling": {**setting, "rope_theta": theta}, "rope_parameters": None}
        case 4:  # rope_scaling replaces rope_parameters whole
            return {"rope_scaling": old, "rope_parameters": other, "rope_theta": theta}
        case 5:  # what is inside the object wins
            return {"rope_parameters": {**setting, "rope_theta": theta}, "rope_theta": 7.0}
        case 6:  # rope_type wins over type
            inside = {**setting, "type": "linear", "rope_theta": theta}
            return {"rope_parameters": inside, "rope_scaling": {}}
        case _:  # the old context beside the object wins
            return {"rope_parameters": setting, "rope_theta": theta, OLD: 24}


for at, setting in enumerate(SETTINGS):
    for number in range(WORDINGS):
        read("llama", **word(setting, 500.0, number))
    for place, kind in enumerate(ROTARY[1:]):
        read(kind, **word(setting, 2000.0, (at + 3 * place) % WORDINGS))
for rope in ({}, None):
    read("llama", rope_parameters=rope, rope_scaling=rope)
for kind in ROTARY:
    read(kind, rope_theta=500, partial_rotary_factor=None)
    read(kind, rope_theta=500.0, partial_rotary_factor=1.0)
    refuse(kind, "partial_rotary_factor", partial_rotary_factor=0.5)
    refuse(kind, "rope_theta", rope_theta=None)
    refuse(kind, "rope_parameters", rope_parameters={FULL: YARN, SLIDING: YARN})
    refuse(kind, "rope_parameters", rope_parameters={FULL: {"rope_theta": 1e4}})
    for name in ("ntk", "longrope", "axial", None):
        refuse(kind, "rope_type", rope_parameters={"rope_type": name, "factor": 2.0})
for name in ("factor", "low_freq_factor", "high_freq_factor"):
    less = {key: value for key, value in LLAMA3.items() if key != name}
    refuse("llama", name, rope_scaling=less)
    for value in (None, "4", True, 0, -1.0):
        refuse("llama", name, rope_scaling={**LLAMA3, name: value})
for value in ("32", True, 0, None):
    refuse("llama", OLD, rope_scaling={**YARN, OLD: value})
    refuse("llama", OLD, rope_scaling=YARN, original_max_position_embeddings=value)

# ---- windows ------------------------------------------------------------------------------------

LISTS = [None, [FULL, SLIDING], [SLIDING, SLIDING], ["attention", FULL], [FULL], [FULL, "foo"]]
for kind in QWEN:
    for is_used in (True, False):
        for window in (None, 8):
            for first in (0, 1, 2, None):
                fields: Fields = {"use_sliding_window": is_used, "sliding_window": window}
                if first is not None:
                    fields["max_window_layers"] = first
                read(kind, **fields)
            for types in LISTS:
                fields = {"use_sliding_window": is_used, "sliding_window": window}
                slides = types is not None and SLIDING in types
                if types in LISTS[-2:] or (slides and not (is_used and window)):
                    named = "sliding_window" if slides else "layer_types"
                    refuse(kind, named, layer_types=types, **fields)
                else:
                    read(kind, layer_types=types, max_window_layers=0, **fields)
    read(kind, sliding_window=8)
    refuse(kind, "use_sliding_window", use_sliding_window=1, sliding_window=8)
    refuse(kind, "sliding_window", sliding_window="8")
for window in (1, 8, 500, None):
    read("mistral", sliding_window=window)
read("mistral", "sliding_window")
for types in LISTS[:-2]:  # transformers then uses another class, which needs both other fields
    read("mistral", layer_types=types, sliding_window=8, head_dim=16)
    read("mistral", "sliding_window", layer_types=types, head_dim=16)
refuse("mistral", "head_dim", layer_types=[FULL, FULL], sliding_window=8)
refuse("mistral", "sliding_window", layer_types=[FULL, FULL], sliding_window=None, head_dim=16)
refuse("mistral", "sliding_window", layer_types=[FULL, SLIDING], sliding_window=None, head_dim=16)
for kind in ("llama", "gpt2"):
    read(kind, layer_types=[FULL, FULL], sliding_window=CONTEXT)
    read(kind, layer_types=["attention", "attention"], sliding_window=None)
    read(kind, layer_types=None)
    for types in ([FULL], [FULL, "foo"], [FULL, SLIDING], FULL):
        refuse(kind, "layer_types", layer_types=types)
    refuse(kind, "sliding_window", sliding_window=8)  # only their cache would apply it

# ---- sizes --------------------------------------------------------------------------------------

for kind in ROTARY:
    read(kind, head_dim=8)
    read(kind, hidden_size=24, head_dim=8)
    read(kind, num_key_value_heads=1)
    refuse(kind, "head_dim", head_dim=0)
    refuse(kind, "head_dim", head_dim=5)
    refuse(kind, "num_key_value_heads", num_key_value_heads=3)
    if kind in ("llama", "mistral"):
        read(kind, head_dim=None)
    else:
        refuse(kind, "head_dim", head_dim=None)
    if kind == "mistral":
        refuse(kind, "num_key_value_heads", num_key_value_heads=None)
    else:
        read(kind, num_key_value_heads=None)
    read(kind, pad_token_id=-1)
    for value in (64, -65, "0", True):
        refuse(kind, "pad_token_id", pad_token_id=value)
read("llama", "num_key_value_heads")
for kind in ROTARY[1:]:
    read(kind, "num_key_value_heads", num_attention_heads=32, hidden_size=64, head_dim=2)
    read(kind, hidden_size=36, head_dim=8)
    read(kind, initializer_range=1.5)
read("qwen3", "head_dim")
refuse("llama", "hidden_size", hidden_size=36, head_dim=8, num_attention_heads=8)
refuse("llama", "initializer_range", initializer_range=1.5)
for kind in ("llama", "qwen3"):
    read(kind, attention_bias=True)
read("llama", mlp_bias=True)
for kind in ("mistral", "qwen2"):
    read(kind, attention_bias=True, mlp_bias=True)  # not among their fields
for kind in BASES:
    read(kind, tie_word_embeddings=True)
    read(kind, initializer_range=0.5)
    eps = "layer_norm_epsilon" if kind == "gpt2" else "rms_norm_eps"
    read(kind, **{eps: 0.01})
    for value in (1, "1e-5", None, True):
        refuse(kind, eps, **{eps: value})
        refuse(kind, "initializer_range", initializer_range=value)
    width = DIALECTS[kind].names.get("hidden_size", "hidden_size")
    for value in ("32", 32.0, True, None, 0, -32):
        refuse(kind, width, **{width: value})
for kind in ROTARY:
    read(kind, hidden_act="swish")
    for value in ("gelu", "foo", None):
        refuse(kind, "hidden_act", hidden_act=value)

# ---- GPT-2 --------------------------------------------------------------------------------------

for activation in GPT2_ACTIVATIONS:
    read("gpt2", activation_function=activation)
for value in (None, 10):
    read("gpt2", n_inner=value)
ALIASES = DIALECTS["gpt2"].aliases
for name, alias in ALIASES.items():
    value = BASES["gpt2"][name]
    read("gpt2", name, **{alias: value})
    read("gpt2", **{alias: value})
    refuse("gpt2", name, **{alias: value // 2})
    refuse("gpt2", alias, **{alias: str(value)})
read("gpt2", *ALIASES, **{alias: BASES["gpt2"][name] for name, alias in ALIASES.items()})
for name in ("intermediate_size", "head_dim", "num_key_value_heads", "rms_norm_eps"):
    read("gpt2", **{name: 3})
read("gpt2", hidden_act="relu", rope_theta=7.0, rope_parameters=YARN)
read("gpt2", pad_token_id=99)
read("gpt2", resid_pdrop=0.0, embd_pdrop=1, attn_pdrop=0.5, summary_first_dropout=0.1)
read("gpt2", summary_type="mean", summary_use_proj=False, summary_activation="tanh")
read("gpt2", summary_proj_to_labels=False, n_ctx=7, output_past=True)
for name, value in (
    ("n_inner", 0),
    ("activation_function", "gelu_fast"),
    ("resid_pdrop", 2.0),
    ("attn_pdrop", None),
    ("summary_type", None),
    ("summary_use_proj", 1),
    ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True),
    ("reorder_and_upcast_attn", None),
    ("add_cross_attention", True),
):
    refuse("gpt2", name, **{name: value})

# ---- other fields -------------------------------------------------------------------------------

HARMLESS: Fields = {
    "architectures": ["FooForSequenceClassification"],
    "attn_implementation": "eager",
    "attention_dropout": 0.5,
    "bos_token_id": 500,
    "chunk_size_feed_forward": 3,
    "dtype": "bfloat16",
    "torch_dtype": "float16",
    "eos_token_id": [1, 500],
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "is_decoder": True,
    "max_length": 3,
    "do_sample": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "pretraining_tp": 2,
    "pruned_heads": {"0": [1]},
    "quantization_config": None,
    "per_layer_config": None,
    "text_config": None,
    "task_specific_params": {"a": {"max_length": 3}},
    "temperature": "high",
    "use_cache": False,
    "gradient_checkpointing": True,
    "a_field_of_nobody": {"a": [1]},
}
for kind in BASES:
    read(kind, **HARMLESS)
for name, value in HARMLESS.items():
    read("llama", **{name: value})
REFUSED: list[tuple[str, Any]] = [
    ("use_cache", None),
    ("use_cache", 1),
    ("return_dict", False),
    ("eos_token_id", "2"),
    ("eos_token_id", [2.0]),
    ("bos_token_id", True),
    ("dtype", "auto"),
    ("torch_dtype", "auto"),
    ("attn_implementation", "foo"),
    ("_attn_implementation", "foo"),
    ("id2label", {"a": "b"}),
    ("id2label", []),
    ("num_labels", None),
    ("is_causal", False),
    ("is_encoder_decoder", True),
    ("per_layer_config", {"0": {"intermediate_size": 32}}),
    ("attention_chunk_size", 8),
    ("text_config", {}),
    ("decoder", {}),
    ("configuration_files", ["config.4.0.0.json"]),
    ("configuration_files", None),
    ("attribute_map", {"hidden_size": "foo"}),
    ("use_return_dict", True),
    ("transformers_weights", "other.safetensors"),
    ("tie_word_embeddings", None),
    ("tie_word_embeddings", 1),
    ("max_position_embeddings", "128"),
]
for name, value in REFUSED:
    refuse("llama", name, **{name: value})
for kind in ROTARY:
    for value in ("0.1", True, None)[: 2 if kind == "llama" else 3]:
        refuse(kind, "attention_dropout", attention_dropout=value)
refuse("llama", "pretraining_tp", pretraining_tp="1")
