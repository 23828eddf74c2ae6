"""# LoRA, section by section

[![Open in Colab][badge]][notebook]

[badge]: https://colab.research.google.com/assets/colab-badge.svg
[notebook]: https://colab.research.google.com/github/OWNER/REPO/blob/main/examples/lesson.ipynb

A course on low-rank adaptation, with small experiments that run here in seconds. Each section has
its formulas, code that computes every number of its text, and an assertion at its end: if all
cells run, all of it is true on your machine. You should see no error, a picture in almost every
section, and what the laboratory says about the claims, if its results exist.

The course follows the ten sections of a Russian lesson; its headings are in brackets.
"""

# %% [markdown]
# The first cell installs minilora if this Python does not have it: from the clone that the
# notebook is in, otherwise from the repository.

# %%
import importlib.util

if importlib.util.find_spec("minilora") is None:
    import subprocess
    import sys
    from pathlib import Path

    clone = Path("..").resolve()
    package = f"{clone}[plot]"
    if not (clone / "minilora").is_dir():
        package = "minilora[plot] @ git+https://github.com/OWNER/REPO"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
    importlib.invalidate_caches()

# %% [markdown]
# The next cell imports what all sections use, and has two helpers: `picture` draws, and
# `print_verdicts` reads what the laboratory measured. Skip it at first.

# %%
import atexit
import math
import tempfile
from pathlib import Path

import numpy as np

import minilora
from minilora import Linear, LoraConfig, Sequential, Tensor, get_peft_model, gradients
from minilora.lab import costs, plots
from minilora.lab.experiments import EXPERIMENTS
from minilora.lab.gallery import read_copies
from minilora.lab.panels import bar, bars, heat, lines, series
from minilora.lab.running import describe_results
from minilora.lab.store import Store

FOLDER = tempfile.TemporaryDirectory()
atexit.register(FOLDER.cleanup)
LABS = ("runs/lab", "../runs/lab")  # where `minilora lab` may have been
PUBLISHED = ("examples/lab", "lab")  # results that came with the repository


def show(draw, *arguments):
    """A picture by a function of minilora.lab.plots: the value of a cell. Needs matplotlib."""
    if not plots.available():
        return plots.why_unavailable()
    number = len(list(Path(FOLDER.name).iterdir()))
    return draw(Path(FOLDER.name, f"{number}.png"), *arguments)


def picture(title, *panels):
    return show(plots.panels, title, panels)


def read_results(name):
    """An experiment's results: measured here, or published, or None."""
    measured = [Store(folder).read_results(name) for folder in LABS]
    published = [read_copies(Path(folder))[0].get(name) for folder in PUBLISHED]
    return next(filter(None, measured + published), None)


def print_verdicts(*names):
    """What the laboratory says about these claims, or how to measure them."""
    for name in names:
        print(f"\nClaim: {EXPERIMENTS[name].CLAIM}.")
        results = read_results(name)
        if results is None:
            print(f"Not measured here yet: run `minilora lab {name}`.")
        else:
            print("\n".join(describe_results(results)))


# %% [markdown]
# ## 1. Why (Зачем)
#
# Adam trains a number with three more beside it: its gradient and two moments. In float32 these
# are 16 bytes, for every weight of the model, before the first activation is stored. A model of
# $N$ weights, of which $n$ are trained and the others are stored in $b$ bytes, needs
#
# $$\text{memory} = b\,N + 16\,n .$$
#
# Full training has $n = N$ and nothing frozen. LoRA freezes the $N$ weights and trains $n \ll N$
# new ones, so that almost all of the 16 bytes disappear. QLoRA then stores the frozen weights in
# four bits, because nobody will ever change them.

# %%
N = costs.LINEAR + costs.OTHERS  # Llama-2-7B
n = costs.count_trained(8, ("q_proj", "v_proj"))  # LoRA with r = 8 on queries and values
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # codes, a scale for 64 of them, a scale for 256 scales
memory = {
    "full training": 16 * N / 1e9,
    "LoRA over float16": (2 * N + 16 * n) / 1e9,
    "LoRA over NF4": (NF4_BITS / 8 * costs.LINEAR + 2 * costs.OTHERS + 16 * n) / 1e9,
}
print(f"{N:,} weights; LoRA trains {n:,} numbers, {100 * n / N:.3f} %")
for name, gigabytes in memory.items():
    print(f"{name:18} {gigabytes:6.1f} GB, without activations")
assert costs.STATE == 16
assert (N, n) == (6_738_415_616, 4_194_304)
assert [round(gigabytes, 1) for gigabytes in memory.values()] == [107.8, 13.5, 3.9]

# %%
labels = [f"{name}\n{gigabytes:.1f} GB" for name, gigabytes in memory.items()]
picture(
    "What training takes before the first activation",
    bars("Llama-2-7B", "GB", labels, [bar("", list(memory.values()))]),
)

# %% [markdown]
# ## 2. The idea (Идея)
#
# Training moves a weight $W_0$ to $W_0 + \Delta W$. The bet of LoRA is that $\Delta W$ is *simple*
# even where $W_0$ is not: that a few directions carry almost all of it. How many directions a
# matrix needs is told by its singular values $\sigma_1 \ge \sigma_2 \ge \dots$: the best matrix of
# rank $k$ leaves
#
# $$\min_{\operatorname{rank} M \le k} \|\Delta W - M\|_F^2 = \sum_{i>k} \sigma_i^2$$
#
# (Eckart and Young 1936). Below are two matrices of one size. The first has two directions and
# some noise, and two directions nearly exhaust it. The second is random, and no small rank does.

# %%
rng = np.random.default_rng(0)
simple = rng.standard_normal((64, 2)) @ rng.standard_normal((2, 64))
simple += 0.1 * rng.standard_normal((64, 64))
random = rng.standard_normal((64, 64))


def share_left(M):
    """What the best rank k leaves of |M|^2, for k = 0, 1, ..."""
    energy = np.linalg.svd(M, compute_uv=False) ** 2
    return 1 - np.cumsum([0, *energy]) / energy.sum()


U, S, Vt = np.linalg.svd(simple)
best = (U[:, :2] * S[:2]) @ Vt[:2]
left = np.linalg.norm(simple - best) ** 2 / np.linalg.norm(simple) ** 2
print(f"rank 2 leaves {left:.1%} of the simple one, {share_left(random)[2]:.0%} of the random one")
assert np.isclose(left, share_left(simple)[2])  # the theorem
assert share_left(simple)[2] < 0.01
assert share_left(random)[2] > 0.8

# %%
ranks = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
picture(
    "Rank 2 is nearly all of one matrix and almost nothing of the other",
    lines(
        "What the best rank leaves",
        "rank k",
        "share of the squared norm",
        [
            series("two directions and noise", ranks, share_left(simple)[ranks].tolist()),
            series("random", ranks, share_left(random)[ranks].tolist(), control=True),
        ],
    ),
)

# %% [markdown]
# ## 3. The formula: dW = B A (Математика: ΔW = BA)
#
# A matrix of rank $r$ is a product of two thin ones. LoRA trains these instead of $\Delta W$:
#
# $$y = W_0 x + \Delta W x, \qquad \Delta W = s\,B A, \qquad
#   A \in \mathbb{R}^{r \times k},\; B \in \mathbb{R}^{d \times r},\; r \ll \min(d, k).$$
#
# **Names, once.** The lesson writes $y = x W$ and $\Delta W = A B$: its $A$ comes first because
# $x$ meets it first. Paper, PEFT and minilora write $y = W x$ and $\Delta W = B A$. It is the same
# pair of factors, transposed. Everything below is $BA$, except the worked example of section 4.
#
# The adapter never forms $\Delta W$ to use it: $x$ goes to $r$ numbers $A x$, and these go to $d$.
# With $G = \partial L / \partial W$ the chain rule gives
#
# $$\frac{\partial L}{\partial B} = s\,G A^\top, \qquad
# \frac{\partial L}{\partial A} = s\,B^\top G .$$

# %%
minilora.manual_seed(0)
config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(Sequential(Linear(6, 4, bias=False)), config)
layer = model.get_base_model()[0]
adapter = layer.adapters["default"]
W, A, B = (p.numpy() for p in (layer.base_layer.weight, adapter.lora_A, adapter.lora_B))
s = config.lora_alpha / config.r

x = rng.standard_normal((10, 6)).astype(np.float32)  # ten inputs, one per row
y = model(Tensor(x))
dB, dA = gradients((y * y).sum(), [adapter.lora_B, adapter.lora_A])
G = (2 * y.numpy()).T @ x  # dL/dW of the loss |y|^2, (4, 6)
print(f"W {W.shape}, A {A.shape}, B {B.shape}: dW has rank {np.linalg.matrix_rank(s * B @ A)}")

same = {"rtol": 1e-4, "atol": 1e-4}
assert np.allclose(y.numpy(), x @ W.T + s * (x @ A.T) @ B.T, **same)  # two thin products
assert np.allclose(y.numpy(), x @ (W + s * B @ A).T, **same)  # one product, merged
assert np.linalg.matrix_rank(layer.delta_weight("default")) == 2
assert np.allclose(dB, s * G @ A.T, **same)
assert np.allclose(dA, s * B.T @ G, **same)

# %% [markdown]
# ## 4. A worked example by hand (Пример на числах)
#
# In the letters of the lesson: $W$ has the numbers 1 to 12 in four rows, $r = 1$ and $s = 1$,
#
# $$W = \begin{pmatrix}1&2&3\\4&5&6\\7&8&9\\10&11&12\end{pmatrix}, \quad
# A = \begin{pmatrix}1\\0\\-1\\2\end{pmatrix}, \quad B = \begin{pmatrix}2&-1&3\end{pmatrix}, \quad
# W + AB = \begin{pmatrix}3&1&6\\4&5&6\\5&9&6\\14&9&18\end{pmatrix}.$$
#
# Row $i$ of $AB$ is $B$ times $A_i$: once, not at all, with the other sign, twice. So the second
# row stays. For $x = (1, 1, 1, 1)$ the frozen path gives $(22, 26, 30)$; the adapter turns $x$
# into the one number $xA = 2$ and adds $2B = (4, -2, 6)$.

# %%
W = np.arange(1.0, 13.0, dtype=np.float32).reshape(4, 3)
A = np.array([[1], [0], [-1], [2]], np.float32)
B = np.array([[2, -1, 3]], np.float32)

linear = Sequential(Linear(4, 3, bias=False))
linear[0].weight.data = W.T.copy()  # minilora has y = W x: everything is transposed
model = get_peft_model(linear, LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
adapter = model.get_base_model()[0].adapters["default"]
adapter.lora_A.data, adapter.lora_B.data = A.T.copy(), B.T.copy()
ones = Tensor(np.ones((1, 4), np.float32))
adapted = model(ones).numpy()
merged = model.merge_and_unload()[0].weight.numpy().T
print(merged)
assert merged.tolist() == [[3, 1, 6], [4, 5, 6], [5, 9, 6], [14, 9, 18]]
assert (ones.numpy() @ W).tolist() == [[22, 26, 30]]
assert (A.size + B.size, (merged != W).sum()) == (7, 9)
assert adapted.tolist() == (ones.numpy() @ merged).tolist() == [[26, 24, 36]]

# %%
rows, columns = ["1", "2", "3", "4"], ["1", "2", "3"]
picture(
    "Seven numbers change nine of twelve",
    heat("A", rows, [""], A.tolist(), digits=0),
    heat("B", [""], columns, B.tolist(), digits=0),
    heat("AB, of rank 1", rows, columns, (A @ B).tolist(), digits=0),
    heat("W + AB", rows, columns, merged.tolist(), digits=0),
)

# %% [markdown]
# ## 5. Counting parameters (Сколько параметров)
#
# $B$ has $d\,r$ numbers and $A$ has $r\,k$:
#
# $$n = r\,(d + k) \quad\text{in place of}\quad d\,k .$$
#
# For $d = 768$, $k = 1024$ and $r = 64$ that is 114,688 of 786,432, or 14.6 %. The saving is a
# matter of the rank: at $r = 8$ it is 1.8 %, and from $r = dk/(d+k) \approx 439$ on the two
# factors are *larger* than the matrix. The saving grows with the matrix, too: $r(d+k)/dk = 2r/d$
# for a square one.

# %%
d, k, r = 768, 1024, 64
config = LoraConfig(r=r, target_modules=["0"])
model = get_peft_model(Sequential(Linear(k, d, bias=False)), config)
trained, total = model.get_nb_trainable_parameters()
model.print_trainable_parameters()  # like PEFT, in percent of frozen and trained numbers together
print(f"{trained:,} of {d * k:,}: {100 * trained / (d * k):.1f} %")
assert (trained, total - trained) == (r * (d + k), d * k) == (114_688, 786_432)
assert round(100 * trained / (d * k), 1) == 14.6
assert round(100 * 8 * (d + k) / (d * k), 1) == 1.8
assert 438 * (d + k) < d * k < 439 * (d + k)

# %%
ranks = [1, 4, 16, 64, 256, 768]
shares = [100 * r * (d + k) / (d * k) for r in ranks]
picture(
    "The share of trained numbers is proportional to the rank",
    lines(
        "A matrix of 768 x 1024",
        "rank r",
        "percent of the matrix",
        [series("r (d + k) / d k", ranks, shares)],
        log="xy",
        levels={"the whole matrix": 100, "the example, 14.6 %": shares[3]},
    ),
)

# %% [markdown]
# ## 6. Initialisation and scaling (Инициализация и масштаб)
#
# **Where to begin.** LoRA starts with $B = 0$ and a random $A$, so the first output is the base's,
# bit for bit. By section 3 the gradient of $A$ is then zero and that of $B$ is not: $B$ moves
# first. If both began at zero, both gradients would be zero for ever. If both were random, the
# model would be damaged before the first step. One step of SGD with rate $\eta$ from $B = 0$ moves
# the weight by
#
# $$\Delta W = -\eta\, s^2\, G A_0^\top A_0 ,$$
#
# the step of full training, seen through the $r$ random directions in $A_0$.

# %%
from minilora import SGD

size = 64
inputs, targets = (Tensor(rng.standard_normal((32, size)).astype(np.float32)) for _ in range(2))


def adapted_layer(seed=0, **fields):
    """The same Linear(64, 64), with a new adapter."""
    minilora.manual_seed(0)
    base = Sequential(Linear(size, size, bias=False))
    return get_peft_model(base, LoraConfig(target_modules=["0"], **fields), seed=seed)


def loss_and_gradients(model):
    """(loss, adapter, dL/dA, dL/dB, dL/dW)"""
    layer = model.get_base_model()[0]
    adapter = layer.adapters["default"]
    difference = model(inputs) - targets
    loss = (difference * difference).mean()
    dA, dB = gradients(loss, [adapter.lora_A, adapter.lora_B])
    G = (2 / difference.size * difference.numpy()).T @ inputs.numpy()
    return loss.item(), adapter, dA, dB, G


model = adapted_layer(r=8, lora_alpha=16)
with model.disable_adapter():
    before = model(inputs).numpy()
assert np.array_equal(model(inputs).numpy(), before)  # B = 0: the base's bits

base_loss, adapter, dA, dB, G = loss_and_gradients(model)
print(f"B = 0:        |dA| {np.linalg.norm(dA):.3f}   |dB| {np.linalg.norm(dB):.3f}")
assert np.linalg.norm(dA) == 0 < np.linalg.norm(dB)

s, eta, A0 = 2.0, 0.1, adapter.lora_A.numpy().copy()
assert np.abs(A0).max() <= 1 / math.sqrt(size)  # uniform within 1 / sqrt(k)
SGD([adapter.lora_A, adapter.lora_B], lr=eta).step([dA, dB])
dW = model.get_base_model()[0].delta_weight("default")
assert np.allclose(dW, -eta * s**2 * G @ A0.T @ A0, rtol=1e-3, atol=1e-7)

for factor in (adapter.lora_A, adapter.lora_B):
    factor.data = np.zeros_like(factor.numpy())
_, _, dA, dB, _ = loss_and_gradients(model)
print(f"both zero:    |dA| {np.linalg.norm(dA):.3f}   |dB| {np.linalg.norm(dB):.3f}")
assert np.linalg.norm(dA) == np.linalg.norm(dB) == 0  # nothing will ever move

model = adapted_layer(r=8, lora_alpha=16, init_lora_weights=False)
loss, *_ = loss_and_gradients(model)
print(f"both random:  the first loss is {loss:.2f}, that of the base {base_loss:.2f}")
assert loss > base_loss

# %% [markdown]
# **How large.** The scaling $s$ lets one learning rate serve several ranks. LoRA takes
# $s = \alpha/r$, and rsLoRA takes $s = \alpha/\sqrt r$. The entries of $A_0$ are uniform within
# $\pm 1/\sqrt k$ and have the variance $1/3k$, so on average over the starts
#
# $$\mathbb{E}\left\lVert\frac{\partial L}{\partial B}\right\rVert^2
# = s^2\, \mathbb{E}\,\|G A_0^\top\|^2 = s^2\, \frac{r}{3k}\, \|G\|^2 .$$
#
# With $\alpha/r$ the first gradient shrinks like $1/\sqrt r$: at $r = 64$ it is an eighth of that
# at $r = 1$. With $\alpha/\sqrt r$ it is the same at all ranks.

# %%
ranks, seeds = [1, 4, 16, 64], range(100)
sizes = {}
for name, use_rslora in (("alpha / r", False), ("alpha / sqrt(r), rsLoRA", True)):
    sizes[name] = []
    for r in ranks:
        models = (adapted_layer(seed, r=r, lora_alpha=16, use_rslora=use_rslora) for seed in seeds)
        squares = [np.linalg.norm(loss_and_gradients(model)[3]) ** 2 for model in models]
        sizes[name].append(math.sqrt(np.mean(squares)))
        scaling = 16 / math.sqrt(r) if use_rslora else 16 / r
        formula = scaling * math.sqrt(r / (3 * size)) * np.linalg.norm(G)
        assert math.isclose(sizes[name][-1], formula, rel_tol=0.1)
    print(
        f"{name:24}",
        "  ".join(f"r = {r}: {v:.3f}" for r, v in zip(ranks, sizes[name], strict=True)),
    )
usual, stable = sizes.values()
assert math.isclose(usual[0] / usual[-1], 8, rel_tol=0.1)
assert max(stable) / min(stable) < 1.1

# %%
picture(
    "rsLoRA keeps the first gradient at one size",
    lines(
        "Mean of 100 starts",
        "rank r",
        "norm of the first gradient of B",
        [series(name, ranks, values) for name, values in sizes.items()],
        log="xy",
    ),
)

# %% [markdown]
# Two more things are said about this training: that full training would make a change of low rank
# anyway, and that LoRA is the stabler of the two. No formula proves either; both can be measured.

# %%
print_verdicts("lowrank", "stability", "rslora")

# %% [markdown]
# ## 7. Which layers (Какие слои адаптировать)
#
# An adapter changes the layers that it is attached to and no others. The LoRA paper chose the
# queries and values of attention (`target_modules=["q_proj", "v_proj"]`); today all linear layers
# are usual (`"all-linear"`). The experiment is a case whose answer is known. A teacher is the base
# with a change of rank 4 in *one* layer of the MLP. Students see only the teacher's logits, and
# have about as many numbers each: at $r = 17$ on q and v, at $r = 7$ on the MLP, at $r = 4$ on
# all.

# %%
from minilora import AdamW, CausalLM, TransformerConfig, no_grad
from minilora.optim import warmup_cosine


def fit(model, loss, steps, lr):
    """Train what the model lets train, by AdamW; returns the losses. loss: step -> Tensor."""
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        value = loss(step)
        scale = warmup_cosine(step, steps, warmup=10, floor=0.01)
        optimizer.step(gradients(value, optimizer.params), scale)
        losses.append(value.item())
    return losses


shape = TransformerConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    initializer_range=0.1,
)
teacher = CausalLM(shape, seed=0)
weight = teacher.model.layers[0].mlp.up_proj.weight
change = rng.standard_normal((64, 4)) @ rng.standard_normal((4, 32))
change *= np.linalg.norm(weight.numpy()) / np.linalg.norm(change)
weight.data = weight.data + change.astype(np.float32)

MLP = ["gate_proj", "up_proj", "down_proj"]
students = {"q and v": (17, ["q_proj", "v_proj"]), "MLP": (7, MLP), "all": (4, "all-linear")}
batches = [rng.integers(0, 64, (8, 16)) for _ in range(150)]
with no_grad():
    wanted = [Tensor(teacher(ids).numpy()) for ids in batches]


def distance(model, step):
    """The mean squared difference from the teacher's logits, as a share of their variance."""
    error = model(batches[step]) - wanted[step]
    return (error * error).mean() / float(wanted[step].numpy().var())


curves, counts = {}, {}
for name, (r, targets_of_adapter) in students.items():
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets_of_adapter)
    model = get_peft_model(CausalLM(shape, seed=0), config)
    counts[name], _ = model.get_nb_trainable_parameters()
    curves[name] = fit(model, lambda step, model=model: distance(model, step), 150, 2e-2)
    print(f"{name:8} r = {r:2}   {counts[name]:,} numbers   unexplained {curves[name][-1]:.1%}")
assert max(counts.values()) < 1.1 * min(counts.values())
assert curves["MLP"][-1] < 0.5 * curves["q and v"][-1]
assert curves["all"][-1] < 0.5 * curves["q and v"][-1]
print_verdicts("layers")

# %%
steps = [*range(0, 150, 10), 149]
picture(
    "Adapters that are not where the change is cannot make it",
    lines(
        "The change is in one MLP layer",
        "step",
        "unexplained share of the logits",
        [series(name, steps, [losses[i] for i in steps]) for name, losses in curves.items()],
        log="y",
    ),
)

# %% [markdown]
# Nobody knows beforehand where a change will be. Adapters of a low rank everywhere cost no more
# than those of a high rank in a few places, and they are never quite in the wrong place.

# %% [markdown]
# ## 8. In practice (На практике: PEFT)
#
# The usual snippet of PEFT runs here as it is. Only its first line has another name: with PEFT it
# is `from peft import LoraConfig, get_peft_model`.
#
# Beside memory, section 1, the promise is practical: the base stays as it is, an adapter is a
# small file, tasks are switched by switching adapters, and a merged adapter costs no time, because
# $W_0 + sBA$ is a matrix like any other. We train a small base on English, and let adapters learn
# Python.

# %%
from minilora import ByteTokenizer
from minilora.data import Windows
from minilora.data.texts import prose, python_sources, split
from minilora.training.loop import bits_per_byte, evaluate
from minilora.training.parallel import ShardedStep

to_ids = ByteTokenizer().encode
english, held_out_english = map(to_ids, split(prose()))
python, held_out_python = map(to_ids, split(python_sources(400_000)))


def learn(model, text, steps, lr, seed=0):
    """The loss of each step in bits per byte."""
    windows = Windows(text, context=48, batch_size=16, seed=seed)
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=lr)
    losses = []
    with ShardedStep(model.train()) as sharded:
        for step in range(steps):
            loss, grads = sharded.gradients(windows.batch(step), optimizer.params, step=step)
            optimizer.step(grads, warmup_cosine(step, steps, warmup=10, floor=0.1))
            losses.append(bits_per_byte(float(loss)))
    model.eval()
    return losses


def bits(model, text):
    return bits_per_byte(evaluate(model, text, 48, limit=128))


base_model = CausalLM(
    TransformerConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, tie_word_embeddings=True
    ),
    seed=0,
)
losses = learn(base_model, english, 300, 5e-3)
state = {name: value.copy() for name, value in base_model.state_dict().items()}

# %%
from minilora import LoraConfig, get_peft_model

config = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "v_proj"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)
model = get_peft_model(base_model, config)
model.print_trainable_parameters()

# %%
from minilora import PeftModel

before = {"English": bits(model, held_out_english), "Python": bits(model, held_out_python)}
losses += learn(model, python, 120, 1e-2)
after = {"English": bits(model, held_out_english), "Python": bits(model, held_out_python)}
for text in before:
    print(f"{text}: {before[text]:.2f} bits per byte, with the adapter {after[text]:.2f}")

ids = held_out_python[None, :48]
with no_grad():
    adapted = model(ids).numpy()
    with model.disable_adapter():
        plain = model(ids).numpy()
    model.add_adapter("other", config, seed=1)
    model.set_adapter("other")  # another task; its adapter is new
    assert np.array_equal(model(ids).numpy(), plain)
    model.set_adapter("default")  # and back
    assert np.array_equal(model(ids).numpy(), adapted)
    model.delete_adapter("other")

    model.save_pretrained(FOLDER.name + "/adapter")
    size_of_file = Path(FOLDER.name, "adapter", "adapter_model.safetensors").stat().st_size
    fresh = CausalLM(base_model.config, seed=None)
    fresh.load_state_dict(state)
    assert np.array_equal(fresh(ids).numpy(), plain)  # the base has every bit that it had
    again = PeftModel.from_pretrained(fresh, FOLDER.name + "/adapter")
    assert np.array_equal(again(ids).numpy(), adapted)
    merged = again.merge_and_unload()(ids).numpy()

size_of_base = sum(value.nbytes for value in state.values())
print(f"the adapter's file has {size_of_file:,} bytes, the base's weights {size_of_base:,}")
assert np.abs(merged - adapted).max() < 1e-5 * np.abs(adapted).max()
assert size_of_file < 0.1 * size_of_base
assert after["Python"] < before["Python"] - 0.1
assert after["English"] > before["English"]
print_verdicts("counts")

# %%
picture(
    "A base learns English, then an adapter learns Python",
    lines(
        "Training",
        "step",
        "bits per byte",
        [
            series("base, English", list(range(0, 300, 5)), losses[:300:5], dots=True),
            series("adapter, Python", list(range(300, 420, 5)), losses[300::5], dots=True),
        ],
    ),
    bars(
        "Held-out text",
        "bits per byte",
        list(before),
        [
            bar("base", list(before.values()), control=True),
            bar("with the adapter", list(after.values())),
        ],
    ),
)

# %% [markdown]
# English becomes worse while Python becomes better: the adapter *forgets*. Switch it off, and the
# base is back. That is the part of "LoRA does not forget" which is certain.

# %% [markdown]
# ## 9. The rank, and where LoRA fails (Выбор ранга, и где LoRA не справляется)
#
# LoRA cannot make a change that needs a higher rank than it has. If full training would move $W$
# by $\Delta W^\star$, rank $r$ leaves at least what section 2 says,
#
# $$\|\Delta W^\star - sBA\|_F^2 \;\ge\; \sum_{i>r} \sigma_i(\Delta W^\star)^2 ,$$
#
# however long it trains. Here is a layer of 32 x 32 with two tasks: one needs rank 4, the other
# needs all 32 directions alike. The inputs are the unit vectors, so that the loss *is* this
# distance.

# %%
Q1, Q2 = (np.linalg.qr(rng.standard_normal((32, 32)))[0] for _ in range(2))
spectra = {
    "needs rank 4": np.array([1.0] * 4 + [0.0] * 28),
    "needs every direction": np.ones(32),
}
unit = Tensor(np.eye(32, dtype=np.float32))
ranks = [1, 2, 4, 8, 16, 32]
left_by_training, left_at_best = {}, {}
for task, spectrum in spectra.items():
    tuned = (Q1 * spectrum) @ Q2.T  # dW*
    left_by_training[task], left_at_best[task] = [], []
    for r in ranks:
        base = Sequential(Linear(32, 32, bias=False))
        goal = Tensor((base[0].weight.numpy() + tuned).astype(np.float32).T)
        model = get_peft_model(base, LoraConfig(r=r, lora_alpha=r, target_modules=["0"]))

        def loss(step, model=model, goal=goal, spectrum=spectrum):
            error = model(unit) - goal
            return (error * error).sum() / float((spectrum**2).sum())

        left_by_training[task].append(fit(model, loss, 400, 2e-2)[-1])
        left_at_best[task].append((spectrum[r:] ** 2).sum() / (spectrum**2).sum())
    print(f"{task}: left", "  ".join(f"{v:.1%}" for v in left_by_training[task]), "at r =", ranks)
    pairs = list(zip(left_by_training[task], left_at_best[task], strict=True))
    assert all(-1e-4 < trained - best < 0.02 for trained, best in pairs)
assert math.isclose(left_by_training["needs every direction"][ranks.index(8)], 0.75, rel_tol=0.02)
print_verdicts("rank", "regret", "forgets")

# %%
picture(
    "Rank 4 is enough for one task; for the other every direction that is missing is missed",
    *[
        lines(
            task,
            "rank r",
            "share of the change that is left",
            [
                series("LoRA, trained", ranks, left_by_training[task]),
                series("best of this rank", ranks, left_at_best[task], control=True),
            ],
            log="x",
        )
        for task in spectra
    ],
)

# %% [markdown]
# So the question of the rank is a question about the task. A style, a format, a narrow subject
# need little; another language, or much new knowledge, needs a high rank, or full training. If a
# run falls short, look at the learning rate first (the best one for an adapter is usually several
# times that of full training), then at which layers have adapters, and at the rank last.

# %% [markdown]
# ## 10. Relatives (Родственники: QLoRA, DoRA, AdaLoRA, многозадачность)
#
# ### QLoRA
#
# The frozen base may be stored in four bits (Dettmers et al. 2023): $y = \tilde W x + sBAx$, where
# $\tilde W$ is decoded from codes. NF4 has 16 levels per block of 64 weights, scaled by the
# largest of them, and placed for weights that are normally distributed; equal steps waste levels
# where few weights are.

# %%
from minilora.quant import LEVELS, encode, quantization_report, quantize

blocks = rng.standard_normal((4096, 64)).astype(np.float32)
absmax = np.abs(blocks).max(axis=1, keepdims=True)
error = {"nf4": np.abs(encode(blocks, "nf4").decode() - blocks).mean()}
error["equal steps"] = np.abs(np.round(blocks / absmax * 7) * absmax / 7 - blocks).mean()
print("mean error of a normal weight:", ", ".join(f"{k} {e:.3f}" for k, e in error.items()))
assert len(LEVELS["nf4"]) == 16
assert error["nf4"] < error["equal steps"]

model = CausalLM(base_model.config, seed=None)
model.load_state_dict(state)
report = quantization_report(quantize(model, "nf4"))
stored = 8 * sum(r.nbytes for r in report) / sum(r.parameters for r in report)
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
model = get_peft_model(model, config)
rough = bits(model, held_out_python)
learn(model, python, 60, 5e-3)
print(f"{stored:.2f} bits per weight; Python {rough:.2f} bits per byte, then", end=" ")
print(f"{bits(model, held_out_python):.2f} with an adapter over the codes")
assert stored < 4.3
assert bits(model, held_out_python) < rough
print_verdicts("qlora")

# %% [markdown]
# ### DoRA
#
# A row of a weight has a length and a direction. LoRA moves both by one $\Delta W$. DoRA (Liu et
# al. 2024) trains the lengths $m$ apart, with the norm of each row in the denominator:
#
# $$W' = m \,\frac{W_0 + sBA}{\|W_0 + sBA\|}, \qquad m = \|W_0\| \text{ at the start.}$$
#
# So the first output is again the base's, and $m$ *is* the lengths of the rows, whatever $BA$
# does.

# %%
model = adapted_layer(r=4, lora_alpha=8, use_dora=True)
with model.disable_adapter():
    before = model(inputs).numpy()
assert np.array_equal(model(inputs).numpy(), before)
start = loss_and_gradients(model)[0]
end = fit(model, lambda step: ((model(inputs) - targets) ** 2).mean(), 60, 1e-2)[-1]
m = model.get_base_model()[0].adapters["default"].lora_magnitude_vector.numpy()
lengths = np.linalg.norm(model.merge_and_unload()[0].weight.numpy(), axis=1)
print(f"loss {start:.2f} -> {end:.2f}; lengths equal m to {np.abs(lengths / m - 1).max():.0e}")
assert end < start
assert np.allclose(lengths, m, rtol=1e-5)
print_verdicts("dora")

# %% [markdown]
# ### AdaLoRA
#
# Section 7 asked where the rank belongs; AdaLoRA (Zhang et al. 2023) lets training answer. It
# writes $\Delta W = s\,P \Lambda Q$ with a diagonal $\Lambda$, keeps $P$ and $Q$ near orthonormal
# by a penalty, and sets those $\lambda_i$ to zero that matter least, over all layers together,
# until a budget is met. The teacher is that of section 7: one layer of fourteen has changed.

# %%
from minilora import AdaLoraConfig
from minilora.lora import RankAllocator
from minilora.optim import clip_by_global_norm

STEPS = 150
config = AdaLoraConfig(
    init_r=6,
    target_r=1,
    lora_alpha=60,
    target_modules="all-linear",
    total_step=STEPS,
    tinit=20,
    tfinal=40,
    deltaT=4,
    orth_reg_weight=0.1,
)
model = get_peft_model(CausalLM(shape, seed=0), config).train()
allocator = RankAllocator.of(model)
optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
place = {id(p): i for i, p in enumerate(optimizer.params)}
allocated = [place[id(p)] for p in allocator.params]
history = [(0, allocator.ranks)]
for step in range(STEPS):
    grads = gradients(distance(model, step), optimizer.params)
    _, penalties = allocator.penalty()
    for i, penalty in zip(allocated, penalties, strict=True):
        if penalty is not None:
            grads[i] = grads[i] + penalty
    grads, _ = clip_by_global_norm(grads, 1.0)
    optimizer.step(grads, warmup_cosine(step, STEPS, warmup=10, floor=0.1))
    allocator.step([grads[i] for i in allocated])
    if allocator.ranks != history[-1][1]:
        history.append((step, allocator.ranks))
ranks_left = allocator.ranks
(changed,) = [path for path in ranks_left if path.endswith("layers.0.mlp.up_proj")]
print(f"{sum(ranks_left.values())} of {6 * len(ranks_left)} ranks are left;", end=" ")
print(f"{ranks_left[changed]} of them in the layer that changed")
assert len(ranks_left) == sum(ranks_left.values()) == 14  # the budget: one per layer
assert ranks_left[changed] == max(ranks_left.values()) >= 4  # its change has rank 4
print_verdicts("adalora")

# %%
show(plots.rank_allocation, history, STEPS)

# %% [markdown]
# ### Several tasks (Многозадачность)
#
# One base, one batch, an adapter for each row: $y_i = W_0 x_i + s B_{t(i)} A_{t(i)} x_i$ with the
# task $t(i)$ of row $i$. The product with $W_0$, which costs most, is shared by all rows. And what
# a row gets does not depend on its neighbours.

# %%
from minilora import get_multitask_model

base = CausalLM(base_model.config, seed=None)
base.load_state_dict(state)
config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
model = get_multitask_model(base, {"python": config, "english": config}, shared=None, seed=0)
ids = np.stack([held_out_python[:48], held_out_english[:48]])
with no_grad():
    mixed = model(ids, tasks=["python", "english"]).numpy()
    alone = np.stack([model(ids, tasks=t).numpy()[i] for i, t in enumerate(model.tasks)])
    swapped = model(ids, tasks=["english", "python"]).numpy()
apart = np.abs(mixed - alone).max() / np.abs(alone).max()
print(f"a mixed batch differs from each task alone by {apart:.0e} of the largest logit")
assert apart < 1e-5
assert np.abs(mixed - swapped).max() > 1e-2 * np.abs(mixed).max()  # the tasks do differ
print_verdicts("interference")

# %% [markdown]
# ## What the laboratory found
#
# A course *says* what LoRA does; `minilora lab all` measures it, at tuned learning rates, over
# three seeds, beside controls, on small models. A verdict holds for these models and this task:
# "does not hold here" is an observation, too.

# %%
for name, experiment in EXPERIMENTS.items():
    results = read_results(name)
    if results is None:
        verdict = "not measured yet"
    elif results["made_with"]["quick"]:
        verdict = "only tried, by --quick"
    else:
        verdict = results["verdict"]
    print(f"{name:14} {verdict:23} {experiment.CLAIM}")
