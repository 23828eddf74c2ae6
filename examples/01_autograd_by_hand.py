"""A gradient in three ways: by hand, by minilora's autograd, and measured by finite differences.

You should see that hand and autograd agree to the last digits; then a new operation with its own
gradient, measured by a finite difference, and what the checker says of a slightly wrong gradient.
"""

import numpy as np

from minilora import Tensor, gradients
from minilora.autograd import Node, record
from minilora.gradcheck import directional_error

# ---- 1. one LoRA layer, y = W x + B A x, and the loss sum(y^2) -----------------------------------
rng = np.random.default_rng(0)
x = rng.standard_normal(4)
W = rng.standard_normal((3, 4))
A = rng.standard_normal((2, 4))
B = rng.standard_normal((3, 2))

y = W @ x + B @ (A @ x)
dy = 2 * y  # the gradient of sum(y^2)
by_hand = {"dA": np.outer(B.T @ dy, x), "dB": np.outer(dy, A @ x)}

tA = Tensor(A, requires_grad=True)
tB = Tensor(B, requires_grad=True)
ty = Tensor(W) @ Tensor(x) + tB @ (tA @ Tensor(x))
loss = (ty * ty).sum()


# ---- 2. the recorded graph: nodes with parents and a gradient function, but without values -------
def name_of(node: Node | Tensor) -> str:
    return "a leaf" if isinstance(node, Tensor) else node.vjp.__qualname__.split(".")[0]


print("The graph of the loss, last operation first:")
seen = set()
todo = [loss.node]
while todo:
    todo.sort(key=lambda node: node.order)
    node = todo.pop()
    if node in seen:
        continue
    seen.add(node)
    parents = [parent for parent in node.parents if parent is not None]
    print(f"  {name_of(node):8} <- {', '.join(map(name_of, parents))}")
    todo += [parent for parent in parents if isinstance(parent, Node)]

for (name, expected), computed in zip(by_hand.items(), gradients(loss, [tA, tB]), strict=True):
    difference = np.abs(expected - computed).max()
    print(f"{name}: autograd differs from the formula by {difference:.1e}")


# ---- 3. a new operation --------------------------------------------------------------------------
def softplus(x: Tensor, wrong: float = 0.0) -> Tensor:
    """log(1 + e^x), whose derivative is 1 / (1 + e^-x)."""
    X = x.data
    return record(np.log1p(np.exp(X)), (x,), lambda dy: (dy / (1 + np.exp(-X)) * (1 + wrong),))


print("\nsoftplus and a finite difference of fourth order, relative error:")
right = directional_error(softplus, x)
wrong = directional_error(lambda t: softplus(t, 1e-6), x)
print(f"  the right gradient              {right:.0e}")
print(f"  one part in a million too large {wrong:.0e}")
