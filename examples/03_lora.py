"""LoRA on one model: freeze it, add two thin matrices per layer, train only those, merge, unmerge.

You should see that the new adapter changes nothing (B = 0), that only A and B train, that the
merged model equals base + adapter to rounding, that unmerging restores the base bit for bit, and
that dW has no more than r singular values.
"""

import numpy as np

from minilora import AdamW, ByteTokenizer, CausalLM, LoraConfig, TransformerConfig, no_grad
from minilora.data import Windows
from minilora.lora import get_peft_model
from minilora.training.parallel import ShardedStep

tokenizer = ByteTokenizer()
config = TransformerConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
model = CausalLM(config)
ids = tokenizer.encode("def adapt(model): return model")[None]
with no_grad():
    base_logits = model(ids).numpy()
q_proj = model.model.layers[0].self_attn.q_proj.weight.numpy().copy()

config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = get_peft_model(model, config)
model.print_trainable_parameters()
with no_grad():
    same = np.array_equal(model(ids).numpy(), base_logits)
print("the new adapter gives the base's logits, bit for bit:", same)

# A text with a pattern that is learned quickly.
windows = Windows(tokenizer.encode("low rank adaptation! " * 200), context=32, batch_size=8)
trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
optimizer = AdamW(trainable, lr=2e-2)
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
    error = np.abs(merged - adapted).max() / np.abs(adapted).max()
    print(f"merged - adapted: {error:.1e} of the largest logit")
    model.unmerge_adapter()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    same = np.array_equal(layer.base_layer.weight.numpy(), q_proj)
    print("the unmerged weight is the base's, bit for bit:", same)
    with model.disable_adapter():
        same = np.array_equal(model(ids).numpy(), base_logits)
    print("the disabled adapter gives the base's logits, bit for bit:", same)
    values = np.linalg.svd(layer.delta_weight("default"), compute_uv=False)
    print("singular values of dW:", np.array2string(values[:6], precision=4, suppress_small=True))
