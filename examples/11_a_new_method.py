"""A new method in one file: dW = diag(v) W, one number for each output of a layer.

A method is a map theta -> dW with its gradient, and a configuration with its fields. The class and
the line of the table below are all that it takes: the step's effective weight, merging, files,
counts and `inspect` know the method. You should see that the loss falls, that the merged model
computes the same as the adapter, and that the files give every bit back.
"""

import dataclasses
import tempfile

import numpy as np

from minilora import AdamW, CausalLM, PeftModel, TransformerConfig, get_peft_model, gradients
from minilora.functional import cross_entropy
from minilora.lora.maps import MAPS, Map, MapConfig


class RowScales(Map):
    """dW = diag(v) W, and dL/dv_o = sum over the inputs of (G * W)[o]."""

    TENSORS = ("toy_v",)
    reads_W = True

    def shapes(self):
        return {"toy_v": (self.O,)}

    def init(self, rng):
        return [np.zeros(self.O)]

    def delta(self, theta, W):
        (v,) = theta
        return v[:, None] * W

    def pull(self, theta, W, G):
        return [(G * W).sum(axis=1)]


@dataclasses.dataclass
class RowConfig(MapConfig):
    peft_type = "TOY"
    method = "toy"
    title = "row scales"
    map = RowScales


MAPS["TOY"] = RowConfig  # the line of the table

shape = TransformerConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
base = CausalLM(shape, seed=0)
ids = np.random.default_rng(0).integers(0, base.config.vocab_size, (4, 17))
model = get_peft_model(base, RowConfig(target_modules="all-linear"))
model.print_trainable_parameters()
params = [p for p in model.parameters() if p.requires_grad]
optimizer = AdamW(params, lr=1e-2)


def loss():
    return cross_entropy(model(ids[:, :-1]), ids[:, 1:])


before = float(loss().data)
for _ in range(20):
    optimizer.step(gradients(loss(), params))
after = float(loss().data)
print(f"loss {before:.3f} -> {after:.3f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(CausalLM(shape, seed=0), folder)
same_bits = np.array_equal(again(ids).data, model.eval()(ids).data)
adapted = model(ids).data
merged = model.merge_and_unload()(ids).data
print(f"read again: {'the same bits' if same_bits else 'other bits'}")
print(f"merged: logits within {abs(merged - adapted).max():.1e}")
