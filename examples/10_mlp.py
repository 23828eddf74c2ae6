"""LoRA on a network of your own: three layers, a training loop, an adapter, a file.

You should see that the new adapter changes nothing, that a few hundred numbers teach the network a
second curve, that the first one comes back with the adapter off, and that the file loads again.
The same cells are in 10_mlp.ipynb.
"""

# %% [markdown]
# Install the package first, from a clone of the repository.

# %%
# %pip install -q ..

# %%
import tempfile

import numpy as np

import minilora
from minilora import AdamW, Linear, LoraConfig, Module, PeftModel, ReLU, Sequential, Tensor
from minilora.nn import mse_loss

minilora.manual_seed(0)

# %% [markdown]
# A network is a `Module`: its layers are its attributes, and `forward` says what it computes.


# %%
class Curve(Module):
    def __init__(self):
        self.body = Sequential(Linear(1, 64), ReLU(), Linear(64, 64), ReLU())
        self.head = Linear(64, 1)

    def forward(self, x):
        return self.head(self.body(x))


def fit(model, x, y, steps=400, lr=3e-3):
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss = mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


x = Tensor(np.linspace(-3, 3, 200, dtype=np.float32)[:, None])
sine, cosine = np.sin(x.numpy()), np.cos(x.numpy())
base = Curve()
print(f"the sine, all parameters: loss {fit(base, x, sine):.5f}")
state = base.state_dict()
before = base(x).numpy()

# %% [markdown]
# The base is frozen. `body.2` gets dW = s B A, with A (r, in) and B (out, r), which starts at zero;
# a copy of the head is trained. (Lessons that write y = x W have dW = A B: the same, transposed.)

# %%
config = LoraConfig(r=4, lora_alpha=8, target_modules=["body.2"], modules_to_save=["head"])
model = minilora.get_peft_model(base, config)
print(model)
model.print_trainable_parameters()
print("nothing has changed yet:", np.array_equal(model(x).numpy(), before))
print(f"the cosine, the adapter alone: loss {fit(model, x, cosine, lr=1e-2):.5f}")
with model.disable_adapter():
    print("without the adapter it is the sine:", np.array_equal(model(x).numpy(), before))

# %%
adapted = model(x).numpy()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = Curve()
    again.load_state_dict(state)
    again = PeftModel.from_pretrained(again, folder)
print("loaded, the same bits:", np.array_equal(again(x).numpy(), adapted))
merged = again.merge_and_unload()
print("merged, the same curve:", np.allclose(merged(x).numpy(), adapted, rtol=0, atol=1e-5))
