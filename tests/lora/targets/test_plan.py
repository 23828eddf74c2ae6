"""The planner over a checkpoint's header and over a model, and an adapter's file beside a plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small

from minilora import AdaLoraConfig, LoraConfig, PeftModel, TransformerConfig, get_peft_model
from minilora.errors import ConfigError, FormatError
from minilora.formats import read_adapter, read_checkpoint, write_adapter
from minilora.lora.files.adapter import AdapterFile
from minilora.lora.targets.base import describe_checkpoint, describe_model
from minilora.lora.targets.plan import plan_adapter
from minilora.tools.merging import merge


def test_describe_checkpoint_gives_the_plan_of_the_model(tmp_path):
    model = small.base()
    model.save_pretrained(tmp_path)
    config, checkpoint = read_checkpoint(tmp_path)
    with checkpoint:
        header = describe_checkpoint(checkpoint, config)
    for targets in ("all-linear", ["q_proj", "down_proj"], r".*\.1\..*_proj"):
        plans = [
            plan_adapter(base, LoraConfig(r=2, target_modules=targets, bias="all"))
            for base in (describe_model(model), header)
        ]
        assert set(plans[0].targets) == set(plans[1].targets)
        assert plans[0].shapes() == plans[1].shapes()
        assert not [path for path in plans[1].targets if "norm" in path]
    with pytest.raises(ConfigError, match="not a linear layer but of kind"):
        plan_adapter(header, LoraConfig(r=2, target_modules=["norm"]))


@pytest.mark.parametrize("value", [None, 0, "true"])
def test_describe_checkpoint_reads_tie_word_embeddings_as_the_model_does(value, tmp_path):
    small.base().save_pretrained(tmp_path)
    config, checkpoint = read_checkpoint(tmp_path)
    config["tie_word_embeddings"] = value
    message = "config: tie_word_embeddings must be true or false, got"
    with checkpoint, pytest.raises(ConfigError, match=message):
        describe_checkpoint(checkpoint, config)
    with pytest.raises(ConfigError, match=message):
        TransformerConfig.from_dict(config)


def test_plan_adapter_leaves_out_targets_only_for_a_file_of_tokens():
    base = describe_model(small.base())
    tokens = ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    alone = LoraConfig(r=2, trainable_token_indices=[1])
    assert not plan_adapter(base, alone, tokens).targets
    assert plan_adapter(base, alone).targets
    assert plan_adapter(base, alone, [*tokens, "q_proj.lora_A.weight"]).targets
    assert plan_adapter(base, LoraConfig(r=2), tokens).targets


def test_load_adapter_warns_about_what_is_hardly_meant(tmp_path):
    config = LoraConfig(r=9, target_modules=["k_proj"])
    with pytest.warns(UserWarning, match="above the full rank 8"):
        get_peft_model(small.base(), config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="above the full rank 8"):
        PeftModel.from_pretrained(small.base(), tmp_path)


@pytest.mark.parametrize("rows", [1, 3])
def test_adapter_file_refuses_a_lora_e_of_another_rank(rows, tmp_path):
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=["q_proj"])
    get_peft_model(small.base(), config).save_pretrained(tmp_path)
    fields, tensors = read_adapter(tmp_path)
    key = next(key for key in tensors if key.endswith("lora_E"))
    write_adapter(tmp_path, fields, {**tensors, key: np.zeros((rows, 1), np.float32)})
    with pytest.raises(FormatError, match="lora_E"):
        AdapterFile(tmp_path)


@pytest.mark.parametrize("threads", [0, -1, True, 1.5])
def test_merge_refuses_threads_below_one(threads, tmp_path):
    get_peft_model(small.base(), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    small.base().save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="threads"):
        merge(tmp_path / "base", [tmp_path / "adapter"], Path(tmp_path / "out"), threads=threads)


FOREIGN = ["q_proj", "v_proj", "query_key_value", "w1", "c_attn"]


def test_load_adapter_reads_target_modules_that_name_layers_of_other_models_too(tmp_path):
    """As PEFT does: programs write one list for many kinds of model. The tensors are checked."""
    small.base().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        small.base(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    fields, tensors = read_adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", {**fields, "target_modules": FOREIGN}, tensors)
    note = "target_modules: 'query_key_value', 'w1', 'c_attn' match nothing in this base"
    with pytest.warns(UserWarning, match=note):
        again = PeftModel.from_pretrained(small.base(), tmp_path / "adapter")
    assert np.array_equal(small.logits(again), small.logits(model))
    with pytest.warns(UserWarning, match=note):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    again.save_pretrained(tmp_path / "again")
    assert read_adapter(tmp_path / "again")[0]["target_modules"] == FOREIGN
    # A user's own list is a mistake, and so is a file whose tensors the names do not mean.
    with pytest.raises(ConfigError, match="'query_key_value', 'w1', 'c_attn' match nothing"):
        get_peft_model(small.base(), LoraConfig(target_modules=FOREIGN))
    for names in (["v_proj", "w1"], ["w1"]):
        write_adapter(tmp_path / "adapter", {**fields, "target_modules": names}, tensors)
        with pytest.raises(FormatError, match=r"does not fit this base: .*(unknown|match nothing)"):
            PeftModel.from_pretrained(small.base(), tmp_path / "adapter")


@pytest.mark.parametrize("count", [19, 20])
def test_plan_adapter_refuses_many_full_names_that_layers_to_transform_leaves_out(count):
    """PEFT replaces 20 names or more by endings, and then leaves out those of other layers."""
    base = describe_model(small.base(num_hidden_layers=4))
    linear = [path for path, layer in base.layers.items() if layer.kind == "linear"]
    names = [path for path in linear if ".layers." in path][:count]
    config = LoraConfig(target_modules=names, layers_to_transform=[0])
    if count < 20:
        assert set(plan_adapter(base, config).targets) == set(names)
    else:
        with pytest.raises(
            ConfigError, match=r"layers_to_transform \[0\] leaves out model.layers.1"
        ):
            plan_adapter(base, config)
    every = LoraConfig(target_modules=names, layers_to_transform=[0, 1, 2, 3])
    assert set(plan_adapter(base, every).targets) == set(names)
