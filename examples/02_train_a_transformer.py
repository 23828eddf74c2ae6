"""A transformer trained from random weights, with the whole loop: batch, loss, gradients, step.

You should see the loss fall from ln 256 = 5.5 (every byte is equally likely) to about 2.7 in 150
steps, and the samples turn from noise into something with the rhythm of English.
"""

import math

import numpy as np
from tqdm import tqdm

from minilora import AdamW, ByteTokenizer, CausalLM, TransformerConfig, generate, gradients
from minilora.data import Windows
from minilora.data.texts import prose, split
from minilora.functional import cross_entropy
from minilora.optim import clip_by_global_norm, warmup_cosine

STEPS = 150
tokenizer = ByteTokenizer()
text, _ = split(prose())
windows = Windows(tokenizer.encode(text), context=64, batch_size=16)
config = TransformerConfig(
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    tie_word_embeddings=True,
)
model = CausalLM(config, seed=0)
params = dict(model.named_parameters())
optimizer = AdamW(params.items(), lr=5e-3, weight_decay=0.1)
count = sum(p.size for p in params.values())
name = "model.layers.0.self_attn.q_proj.weight"
print(f"{count:,} parameters, such as {name} {params[name].shape}")


def sample() -> str:
    prompt = tokenizer.encode("The ")[None]
    ids = generate(model, prompt, 60, temperature=0.7, seed=1)
    return repr(tokenizer.decode(ids[0]))


print("before:", sample())
losses = []
for step in tqdm(range(STEPS), disable=None):
    batch = windows.batch(step)
    loss = cross_entropy(model(batch.ids), batch.targets)
    grads, norm = clip_by_global_norm(gradients(loss, optimizer.params), 1.0)
    optimizer.step(grads, scale=warmup_cosine(step, STEPS, warmup=20, floor=0.1))
    losses.append(loss.item())
    if step % 30 == 0:
        print(f"step {step:3}   loss {losses[-1]:.3f}   gradient norm {norm:.2f}")
mean = np.mean(losses[-10:])
print(f"step {STEPS - 1:3}   loss {mean:.3f} nats per byte, {mean / math.log(2):.2f} bits")
print("after: ", sample())
