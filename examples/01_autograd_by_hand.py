"""What a gradient is, three ways: by hand, by minilora's autograd, and by measuring.

You should see that hand and autograd agree to the last digits; then an operation of our own with its gradient written
beside it, measured by a finite difference, and what the checker says when that gradient is wrong by a hair.
"""

import numpy as np

from minilora import Tensor, gradients
from minilora.autograd import Node, record
from minilora.gradcheck import directional_error

# ---- 1. one LoRA layer, y = W x + B A x, and the loss sum(y^2) -------------------------------------------------------
rng = np.random.default_rng(0)
x, W = rng.standard_normal(4), rng.standard_normal((3, 4))
A, B = rng.standard_normal((2, 4)), rng.standard_normal((3, 2))

y = W @ x + B @ (A @ x)
dy = 2 * y  # the gradient of sum(y^2)
by_hand = {
    "dA": np.outer(B.T @ dy, x),
    "dB": np.outer(dy, A @ x),
}  # s B^T G X and s G (A X)^T of the paper, with s = 1

tA, tB = Tensor(A, requires_grad=True), Tensor(B, requires_grad=True)
ty = Tensor(W) @ Tensor(x) + tB @ (tA @ Tensor(x))
loss = (ty * ty).sum()

# ---- 2. the graph that was recorded: parents and a function, but no values -------------------------------------------
print("The graph of the loss, youngest first:")
seen, todo = set(), [loss.node]
while todo:
    todo.sort(key=lambda node: node.order)
    node = todo.pop()
    if node not in seen:
        seen.add(node)
        parents = [p for p in node.parents if p is not None]
        names = [
            "a leaf" if isinstance(p, Tensor) else p.vjp.__qualname__.split(".")[0] for p in parents
        ]
        print(f"  {node.vjp.__qualname__.split('.')[0]:8} <- {', '.join(names)}")
        todo += [p for p in parents if isinstance(p, Node)]

for (name, hand), auto in zip(by_hand.items(), gradients(loss, [tA, tB]), strict=True):
    print(f"{name}: autograd differs from the formula by {np.abs(hand - auto).max():.1e}")


# ---- 3. an operation of our own --------------------------------------------------------------------------------------
def softplus(x: Tensor, wrong: float = 0.0) -> Tensor:
    """log(1 + e^x), whose derivative is 1 / (1 + e^-x)."""
    X = x.data
    return record(np.log1p(np.exp(X)), (x,), lambda dy: (dy / (1 + np.exp(-X)) * (1 + wrong),))


print("\nsoftplus beside a finite difference of fourth order, relative error:")
print(f"  the right gradient              {directional_error(softplus, x):.0e}")
print(f"  one part in a million too large {directional_error(lambda t: softplus(t, 1e-6), x):.0e}")
