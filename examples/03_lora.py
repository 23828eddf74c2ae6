"""LoRA on one model: freeze it, add two thin matrices a layer, train only those, merge, and go back.

You should see that the adapter starts as nothing (B = 0), that only A and B train, that the merged model equals base +
adapter to rounding, that unmerging restores the base bit for bit, and that dW has no more than r singular values.
"""

import numpy as np

from minilora import (
    AdamW,
    ByteTokenizer,
    CausalLM,
    LoraConfig,
    TransformerConfig,
    get_peft_model,
    no_grad,
)
from minilora.data import Windows
from minilora.training.parallel import ShardedStep

tokenizer = ByteTokenizer()
model = CausalLM(
    TransformerConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
)
ids = tokenizer.encode("def adapt(model): return model")[None]
with no_grad():
    base_logits = model(ids).numpy()
q = model.model.layers[0].self_attn.q_proj.weight.numpy().copy()

config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = get_peft_model(model, config)
model.print_trainable_parameters()
with no_grad():
    print("start is the base, bit for bit:", np.array_equal(model(ids).numpy(), base_logits))

# A text with a pattern that can be learned in a moment.
windows = Windows(tokenizer.encode("low rank adaptation! " * 200), context=32, batch_size=8)
optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=2e-2)
with ShardedStep(model) as sharded:
    for step in range(60):
        loss, grads = sharded.gradients(windows.batch(step), optimizer.params, step=step)
        optimizer.step(grads)
        if step % 20 == 0 or step == 59:
            print(f"step {step:2}   loss {loss:.3f}")

with no_grad():
    adapted = model(ids).numpy()
    model.merge_adapter()
    merged = model(ids).numpy()
    print(
        f"merged - adapted: {np.abs(merged - adapted).max() / np.abs(adapted).max():.1e} of the largest logit"
    )
    model.unmerge_adapter()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    print("unmerged base, bit for bit:", np.array_equal(layer.base_layer.weight.numpy(), q))
    with model.disable_adapter():
        print("disabled is the base, bit for bit:", np.array_equal(model(ids).numpy(), base_logits))
    values = np.linalg.svd(layer.delta_weight("default"), compute_uv=False)
    print("singular values of dW:", np.array2string(values[:6], precision=4, suppress_small=True))
