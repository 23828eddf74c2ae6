"""How each type of model words its config.json: what is read, and what must change nothing.

Every field that transformers 5.23 knows is in one of three places: `Dialect.fields` (this package
implements it), a rule (it is valid only with values that have no effect), or IGNORED (no value has
an effect). Other fields are unknown: they have no effect in transformers either, and cause a
warning unless they are null, false or empty. tests/parity/test_parity_config.py holds this against
transformers' classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import (
    Predicate,
    Rule,
    is_flag,
    is_integer,
    is_plain_number,
    one_of,
    optional,
    rules_for,
)

FULL = "full_attention"
SLIDING = "sliding_attention"
LAYER_TYPES = (FULL, SLIDING)
OLD_LAYER_TYPES = {"attention": FULL}  # names that transformers replaces
GATED = ("silu", "swish")  # the activations of a gated feed-forward layer
GPT2_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "silu", "swish", "relu")


class Dialect(NamedTuple):
    """How the config.json of one type of model expresses a TransformerConfig.

    architecture   the model's class in transformers
    fields         the fields of TransformerConfig that the type has; the others keep their defaults
    absent         what transformers assumes for a missing field, where that is not the default here
    activations    the values that hidden_act may have
    names          the names of fields in config.json, where they differ
    aliases        second names in config.json, by the first ones
    file_rules     what a file may say, where transformers is stricter than TransformerConfig
    other_rules    the values without effect of fields that this package does not implement
    """

    architecture: str
    fields: tuple[str, ...]
    absent: Mapping[str, Any]
    activations: tuple[str, ...] = GATED
    names: Mapping[str, str] = {}
    aliases: Mapping[str, str] = {}
    file_rules: tuple[Rule, ...] = ()
    other_rules: tuple[Rule, ...] = ()


# ---- fields without effect ----------------------------------------------------------------------

# Fields without effect whatever their values: notes about a file, and settings of transformers,
NOTES = """
    _commit_hash _name_or_path architectures auto_map base_model_ep_plan base_model_fsdp_plan
    base_model_pp_plan base_model_tp_plan chunk_size_feed_forward gradient_checkpointing
    name_or_path output_attentions output_hidden_states quantization_config tie_last_hidden_states
    transformers_version
"""
# notes of other programs, which are common in files,
FOREIGN_NOTES = """
    is_llama_config max_sequence_length transformers.js_config unsloth_fixed unsloth_version
"""
# of other heads than the language model's, and those that only older versions read,
OLD = """
    _attn_implementation_autoset _num_labels cross_attention_hidden_size decoder_start_token_id
    finetuning_task is_decoder label2id n_ctx n_special original_max_position_embeddings output_past
    predict_special_tokens prefix pretraining_tp problem_type pruned_heads sep_token_id
    task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torchscript use_bfloat16
"""
# and of `generate`: transformers reads them from generation_config.json alone.
GENERATION = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups
    num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p
"""
IGNORED = frozenset((NOTES + FOREIGN_NOTES + OLD + GENERATION).split())
DTYPES = (
    *("float32", "float", "float64", "double", "float16", "half", "bfloat16"),
    *("float8_e4m3fn", "float8_e5m2"),
)
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
EXPERTS = ("eager", "batched_mm", "grouped_mm")


def _is_labels(value: Any) -> bool:
    """An object whose keys are integers in decimal."""
    return isinstance(value, Mapping) and all(str(key).isdecimal() for key in value)


def _is_ids(value: Any) -> bool:
    """An id, or a list of ids."""
    return all(type(item) is int for item in (value if isinstance(value, list) else [value]))


def choice(*values: Any) -> tuple[Predicate, str]:
    """A rule's predicate and text: null, or one of `values`."""
    return optional(one_of(*values)), f"one of {', '.join(map(str, values))}, or null"


def only(value: Any) -> tuple[Predicate, str]:
    """A rule's predicate and text: this value, because others change the model."""
    shown = {None: "null", True: "true", False: "false"}[value]
    return one_of(value), f"{shown}: other values change the model in ways that are not supported"


def left_out(_: Any) -> bool:
    return False


def is_probability(value: Any) -> bool:
    return is_plain_number(least=0)(value) and value <= 1


DROPOUT = is_probability, "a number from 0 to 1"  # transformers applies it in training only
IDS = optional(_is_ids), "an id, a list of ids, or null"
FOREIGN = (  # each would make transformers read another file, another class, or parts of this one
    *("text_config", "decoder", "generator", "text_encoder", "transformers_weights"),
    *("per_layer_config", "fusion_config", "kv_sharing_modes", "attention_chunk_size"),
    *("distributed_config", "mlp_layer_types", "_heterogeneity_spec"),
)
BROKEN = (  # properties and methods of transformers' class, which fails for each
    *("use_return_dict", "is_heterogeneous", "sub_configs", "per_layer_attributes"),
    "attribute_map",
)
SHARED_RULES = (
    Rule("use_cache", is_flag, "true or false"),
    Rule("return_dict", optional(one_of(True)), "true or null: transformers cannot use false"),
    Rule("bos_token_id", optional(is_integer()), "an id, or null"),
    Rule("eos_token_id", *IDS),
    Rule("id2label", optional(_is_labels), "an object with integers as keys, or null"),
    Rule("num_labels", is_integer(0, 2**31), "an integer of at least 0"),
    *rules_for(("dtype", "torch_dtype"), *choice(*DTYPES)),
    *rules_for(("_attn_implementation", "attn_implementation"), *choice(*ATTENTIONS)),
    *rules_for(("_experts_implementation", "experts_implementation"), *choice(*EXPERTS)),
    *rules_for(FOREIGN, *only(None)),
    *rules_for(BROKEN, left_out, "left out: transformers cannot set it"),
    Rule("configuration_files", lambda value: value == [], "[]: only config.json is read"),
    Rule("is_causal", *only(True)),
    Rule("is_encoder_decoder", *only(False)),
)

# ---- fields with an effect ----------------------------------------------------------------------

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
COMMON = (
    *REQUIRED,
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)
SHARED = (*COMMON, "num_key_value_heads", "head_dim", "rope_parameters")
MISTRAL_FIELDS = (*SHARED, "sliding_window", "layer_types")
WINDOWED = (*MISTRAL_FIELDS, "max_window_layers")
LLAMA_FIELDS = (*SHARED, "attention_bias", "mlp_bias")
QWEN3_FIELDS = (*WINDOWED, "attention_bias")
MISTRAL_ABSENT = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
QWEN_ABSENT = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GPT2_ABSENT = {
    "max_position_embeddings": 1024,
    "hidden_act": "gelu_new",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "intermediate_size": None,
}
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}
GPT2_ALIASES = {
    GPT2_NAMES[name]: name
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
}

# transformers takes no integer for a float, and null only where its class says so.
is_float = is_plain_number(above=0, below=1e300)
FLOAT = (lambda value: type(value) is float and is_float(value)), "a positive number with a point"
SIZE = is_integer(1, 2**31 - 1), "a positive integer"
UNIT = (lambda value: FLOAT[0](value) and value <= 1), f"{FLOAT[1]}, at most 1"
FLOAT_RULES = rules_for(("rms_norm_eps", "initializer_range"), *FLOAT)
GPT2_FILE = tuple(rules_for(("layer_norm_epsilon", "initializer_range"), *FLOAT))
LLAMA_FILE = (*FLOAT_RULES, Rule("initializer_range", *UNIT))
MISTRAL_FILE = (*FLOAT_RULES, Rule("num_key_value_heads", *SIZE))
WINDOW_RULES = (
    Rule("sliding_window", optional(SIZE[0]), f"{SIZE[1]}, or null"),
    Rule("use_sliding_window", is_flag, "true or false"),
)
QWEN_FILE = (*FLOAT_RULES, *WINDOW_RULES, Rule("head_dim", *SIZE))

ATTENTION_DROPOUT = Rule("attention_dropout", *DROPOUT)
LLAMA_OTHERS = (
    *SHARED_RULES,
    Rule("attention_dropout", optional(is_probability), f"{DROPOUT[1]}, or null"),
    Rule("pretraining_tp", optional(is_integer()), "an integer, or null"),  # only splits products
)
GPT2_OTHERS = (
    *SHARED_RULES,
    Rule("pad_token_id", optional(is_integer()), "an id, or null"),
    Rule("scale_attn_weights", *only(True)),
    *rules_for(("scale_attn_by_inverse_layer_idx", "add_cross_attention"), *only(False)),
    Rule("reorder_and_upcast_attn", is_flag, "true or false"),  # rounds otherwise in 16 bits alone
    *rules_for(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), *DROPOUT),
    *rules_for(("summary_use_proj", "summary_proj_to_labels"), is_flag, "true or false"),
    Rule("summary_type", lambda value: isinstance(value, str), "a string"),
    Rule("summary_activation", lambda v: v is None or isinstance(v, str), "a string, or null"),
)
OTHERS = (*SHARED_RULES, ATTENTION_DROPOUT)

DIALECTS = {
    "llama": Dialect(
        "LlamaForCausalLM",
        LLAMA_FIELDS,
        {"max_position_embeddings": 2048},
        file_rules=LLAMA_FILE,
        other_rules=LLAMA_OTHERS,
    ),
    "mistral": Dialect(
        "MistralForCausalLM",
        MISTRAL_FIELDS,
        MISTRAL_ABSENT,
        file_rules=MISTRAL_FILE,
        other_rules=OTHERS,
    ),
    "qwen2": Dialect(
        "Qwen2ForCausalLM", WINDOWED, QWEN_ABSENT, file_rules=QWEN_FILE, other_rules=OTHERS
    ),
    "qwen3": Dialect(
        "Qwen3ForCausalLM",
        QWEN3_FIELDS,
        {**QWEN_ABSENT, "head_dim": 128},
        file_rules=QWEN_FILE,
        other_rules=OTHERS,
    ),
    "gpt2": Dialect(
        "GPT2LMHeadModel",
        COMMON,
        GPT2_ABSENT,
        GPT2_ACTIVATIONS,
        GPT2_NAMES,
        GPT2_ALIASES,
        GPT2_FILE,
        GPT2_OTHERS,
    ),
}
MODEL_TYPES = tuple(DIALECTS)


def knadded_fields(model_type: str) -> set[str]:
    """Every field of config.json that is read, must not have an effect, or cannot have one."""
    dialect = DIALECTS[model_type]
    known = {"model_type", "pad_token_id", "sliding_window", "layer_types", *IGNORED}
    known |= {dialect.names.get(name, name) for name in dialect.fields}
    known |= {*dialect.aliases.values()}
    known |= {rule.field for rule in (*dialect.file_rules, *dialect.other_rules)}
    if "rope_parameters" in dialect.fields:
        known |= {"rope_scaling", "rope_theta", "partial_rotary_factor"}
    return known
