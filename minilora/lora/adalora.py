"""AdaLoRA: ranks that training finds, dW = s B diag(E) A (Zhang et al. 2023).

               x (I)
             /       \\
      W (O, I)        A (r, I)      right singular vectors, rows kept near orthonormal by a penalty
      frozen          E (r, 1)      singular values, zero at the start; a zero here is a triplet cut
             \\        B (O, r)      left singular vectors, columns kept near orthonormal
              \\      /  * s         s = lora_alpha / (init_r + 1e-5)
               y (O)

The paper's P, Lambda, Q are PEFT's lora_B, lora_E, lora_A. Triplet i of a layer is (B[:, i], E[i], A[i]): one rank of
dW. `RankAllocator` measures what each is worth, over all layers at once, and leaves only as many as a falling budget
has room for. `orthogonality` is what the loss gets besides.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import functional as F
from .. import fused
from ..autograd import Tensor, grad_enabled, gradients, namespace, record
from ..backend import Array
from ..errors import CheckpointError, ConfigError
from ..nn import Dropout, LinearBase, Parameter, normal
from .config import LoraConfig
from .lora import LoraAdapter

RANK_EPS = 1e-5  # what PEFT adds to AdaLoRA's rank before it divides by it


@dataclasses.dataclass
class AdaLoraConfig(LoraConfig):
    """Adaptive rank: dW = s B diag(E) A, of which training keeps the triplets that matter (Zhang et al. 2023).

    init_r, target_r    triplets of every layer at the start, and of the average layer at the end
    total_step          steps of the whole training: there is no schedule without it
    tinit, tfinal       the first steps, in which nothing is cut, and the last, in which ranks stand: between them the
                        budget falls, so tinit < total_step - tfinal
    deltaT              steps from one allocation to the next
    beta1, beta2        how slowly sensitivity and uncertainty forget
    orth_reg_weight     of the penalty that keeps A's rows and B's columns orthonormal
    rank_pattern        after pruning, "<layer>.lora_E" -> which of its init_r triplets are left
    init_lora_weights   True: E zero, A and B ~ N(0, 0.02^2); False: all three ~ N(0, 1)

    The other fields are LoraConfig's. s = lora_alpha / (init_r + 1e-5), whatever is cut. As in PEFT `r` means nothing
    here: another one than the default warns. use_rslora, alpha_pattern and use_dora mean nothing either: ConfigError.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int = None  # type: ignore[assignment]  # PEFT's default, which it refuses
    rank_pattern: dict[str, list[bool]] = dataclasses.field(default_factory=dict)  # type: ignore[assignment]

    peft_type = "ADALORA"

    def __post_init__(self) -> None:
        kept, self.rank_pattern = (
            self.rank_pattern or {},
            {},
        )  # LoRA's field of this name means something else
        super().__post_init__()
        self.rank_pattern, need = kept, self._need
        for name, least in {
            "init_r": 1,
            "target_r": 1,
            "total_step": 1,
            "tinit": 0,
            "tfinal": 0,
            "deltaT": 1,
        }.items():
            value = getattr(self, name)
            need(
                type(value) is int and least <= value < 2**24,
                name,
                f"an integer of at least {least}",
            )
        need(self.target_r <= self.init_r, "target_r", f"at most init_r = {self.init_r}")
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"tinit must be below total_step - tfinal = {self.total_step - self.tfinal}, got {self.tinit}: "
                "the budget needs steps in which to fall"
            )
        for name in ("beta1", "beta2"):
            need(
                type(getattr(self, name)) is float and 0 < getattr(self, name) < 1,
                name,
                "between 0 and 1",
            )
        weight = self.orth_reg_weight
        need(
            type(weight) in (int, float) and 0 <= weight < math.inf,
            "orth_reg_weight",
            "a number of at least 0",
        )
        need(isinstance(self.init_lora_weights, bool), "init_lora_weights", "True or False")
        need(
            self.use_rslora is False,
            "use_rslora",
            f"False: the scaling is lora_alpha / (init_r + {RANK_EPS})",
        )
        need(not self.alpha_pattern, "alpha_pattern", "empty: all layers have one lora_alpha")
        need(self.use_dora is False, "use_dora", "False: AdaLoRA has no magnitude")
        table, r = self.rank_pattern, self.init_r
        ok = isinstance(table, dict) and all(
            isinstance(k, str) and k.endswith(".lora_E") for k in table
        )
        ok = ok and all(
            isinstance(v, list) and len(v) == r and {*map(type, v)} == {bool}
            for v in table.values()
        )
        need(
            ok,
            "rank_pattern",
            f"a dictionary from '<layer>.lora_E' to {r} times True or False, one a triplet",
        )
        if self.r != 8:
            warnings.warn(
                f"r = {self.r} means nothing in AdaLoRA: init_r is the rank to begin with",
                stacklevel=3,
            )

    def rank(self, name: str) -> int:
        """How many triplets the layer `name` has when it is made: init_r, or what pruning left."""
        kept = self.rank_pattern.get(f"{name}.lora_E")
        return self.init_r if kept is None else sum(kept)

    def scaling(self, name: str) -> float:
        """s, of every layer. init_r stands for the rank for good: to scale up what is left would undo the cut."""
        return self.lora_alpha / (self.init_r + RANK_EPS)

    def to_dict(self) -> dict[str, Any]:
        """Every field that PEFT 0.21 writes, for adapter_config.json; rank_pattern is null while nothing was cut."""
        return {**super().to_dict(), "rank_pattern": self.rank_pattern or None}


class AdaLoraAdapter(LoraAdapter):
    """The trainable triplets of one layer: lora_A (r, I), lora_E (r, 1) and lora_B (O, r), with their scaling s.

    r is how many there are, `ranknum` how many there were before the first was cut: s is made of that for good.
    """

    TENSORS = ("lora_A", "lora_E", "lora_B")
    SUFFIX = ""  # in PEFT these are bare parameters
    lora_E: Parameter

    def __init__(
        self,
        base: LinearBase,
        name: str,
        config: LoraConfig,
        rng: np.random.Generator,
        stream: int = 0,
    ):
        assert isinstance(config, AdaLoraConfig)
        self.r, self.ranknum = config.rank(name), float(config.init_r)
        self.scaling = config.scaling(name)
        self.dropout = Dropout(config.lora_dropout, stream)
        std = 0.02 if config.init_lora_weights else 1.0
        for tensor, shape in self.shapes(base, self.r).items():
            zero = (
                tensor == "lora_E" and config.init_lora_weights
            )  # so the start is the base, bit for bit
            values = np.zeros(shape, base.dtype) if zero else normal(rng, std, shape, base.dtype)
            setattr(self, tensor, Parameter(base.backend.from_numpy(values)))
        self._settled: int | None = (
            None  # lora_E's version when ranks were last allocated, where that is known
        )

    @staticmethod
    def shapes(base: LinearBase, r: int) -> dict[str, tuple[int, ...]]:
        """The trainable tensors of a layer over `base`, by name: r (in + out + 1) numbers."""
        return {"lora_A": (r, base.in_features), "lora_E": (r, 1), "lora_B": (base.out_features, r)}

    def __call__(self, x: Tensor, y: Tensor, base: LinearBase) -> Tensor:
        """y with this adapter added: LoRA's, its A being diag(E) A.    x (..., I), y (..., O) -> (..., O)

        ConfigError if this trains and nobody allocates its ranks.
        """
        self._require_allocator()
        return F.lora_linear(
            self.dropout(x), y, self.lora_A * self.lora_E, self.lora_B, self.scaling
        )

    def delta_weight(self, W: Array) -> Array:
        """dW = s B diag(E) A (O, I), over the base's weight W (O, I) and in its precision."""
        A, E, B = (p.data.astype(W.dtype) for p in (self.lora_A, self.lora_E, self.lora_B))
        return (B @ (A * E)) * self.scaling

    def effective(self, W: Array) -> tuple[tuple[Tensor, ...], fused.Pull]:
        """Add dW to W (O, I) in place; returns the parameters, and how their gradients are found: LoRA's, then dE."""
        self._require_allocator()
        a, e, b, s = self.lora_A.data, self.lora_E.data, self.lora_B.data, self.scaling
        W += (b @ (a * e)) * s
        scaled_t = self.lora_A.backend.xp.ascontiguousarray((a * e).T)  # (I, r)

        def pull(X: Array, dY: Array) -> F.Grads:
            product = ((dY @ b) * s).T @ X  # of E A: (r, N) @ (N, I) -> (r, I)
            dE = (product * a).sum(axis=1, keepdims=True)
            return product * e, dE, dY.T @ ((X @ scaled_t) * s)  # dA (r, I), dE (r, 1), dB (O, r)

        return (self.lora_A, self.lora_E, self.lora_B), pull

    def keep(self, kept: np.ndarray) -> None:
        """Cut out every triplet i with kept[i] False: new, smaller parameters. dW changes by theirs alone."""
        backend = self.lora_E.backend
        rows = backend.from_numpy(np.flatnonzero(kept))
        for name, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            before: Parameter = getattr(self, name)
            setattr(
                self,
                name,
                Parameter(backend.xp.take(before.data, rows, axis=axis), before.requires_grad),
            )
        self.r = len(rows)

    def settle(self, known: bool = True) -> None:
        """Take lora_E as it is for allocated; with `known` False, as it will be at the next forward in training."""
        assert self.lora_E.version is not None
        self._settled = self.lora_E.version[0] if known else None

    def _require_allocator(self) -> None:
        """Between two forwards of training lora_E may change, but then a RankAllocator has to come after it."""
        if not (self.training and self.lora_E.requires_grad and grad_enabled()):
            return
        if self._settled is None:
            self.settle()
        elif self.lora_E.version is not None and self._settled != self.lora_E.version[0]:
            raise ConfigError(
                "AdaLoRA trains with a RankAllocator: make one with RankAllocator.of(model), and call its step(grads) "
                "after every step of the optimiser. Without it no rank would ever change"
            )


# ---- the penalty ----------------------------------------------------------------------------------------------------


def orthogonality(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean of |A A^T - I| and |B^T B - I| over all pairs A (r, I), B (O, r) -> scalar    Zhang et al. 2023, eq. (4)

    |.| is Frobenius' norm, not squared as in the paper: PEFT's. d|M| / dA = 2 M A / |M| for M = A A^T - I, and 0 where
    A's rows are orthonormal.
    """
    inputs = tuple(f for pair in factors for f in pair)
    xp = namespace(*inputs)
    rows = [
        f.data if i % 2 == 0 else f.data.T for i, f in enumerate(inputs)
    ]  # all (r, n): B counts by its columns
    gaps = [M @ M.T - xp.eye(len(M), dtype=M.dtype) for M in rows]  # (r, r)
    norms = [xp.sqrt((gap * gap).sum()) for gap in gaps]
    count, tiny = len(inputs), [float(np.finfo(M.dtype).tiny) for M in rows]

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        scales = [
            dy * (2 / count) / xp.maximum(norm, least)
            for norm, least in zip(norms, tiny, strict=True)
        ]
        found = [(gap @ M) * scale for gap, M, scale in zip(gaps, rows, scales, strict=True)]
        return tuple(g if i % 2 == 0 else g.T for i, g in enumerate(found))

    return record(sum(norms) / count, inputs, vjp)


# ---- the budget -----------------------------------------------------------------------------------------------------


class RankAllocator:
    """Cuts what matters least, as a budget falls: Zhang et al. 2023, sections 3.2 and 3.3, algorithm 1.

    adapters   what it cuts, by the name of the layer
    config     theirs; `prune` writes its rank_pattern

    Sensitivity I = |w dL/dw| is smoothed, and so is how far it strays: for every number w of A, E and B

        I' <- beta1 I' + (1 - beta1) I        U' <- beta2 U' + (1 - beta2) |I - I'|        s(w) = I' U'

    and triplet i is worth S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji). At an allocation after step t the b(t) best
    of all layers stay; of the others E becomes 0, and may grow again until the next. From step total_step - tfinal on
    the choice is final. One `step` goes with each step of the optimiser; they count from 1, so that a run with
    tfinal = 0 ends within its budget, too.
    """

    def __init__(self, adapters: Mapping[str, AdaLoraAdapter], config: AdaLoraConfig):
        if not adapters:
            raise ConfigError("there is no AdaLoRA layer to allocate ranks to")
        self.adapters, self.config = dict(adapters), config
        self.steps = 0
        self.final_step = config.total_step - config.tfinal  # of the last allocation
        self.initial = sum(a.r for a in adapters.values())  # b(0), in triplets of all layers
        self.target = min(config.target_r * len(adapters), self.initial)
        self._begin()

    @classmethod
    def of(cls, model: Any, adapter_name: str | None = None) -> RankAllocator:
        """For an adapter (the active one) of a PeftModel. ConfigError unless it is AdaLoRA's."""
        name = model.active_adapter if adapter_name is None else adapter_name
        config = model.peft_config.get(name)
        if not isinstance(config, AdaLoraConfig):
            there = ", ".join(f"{n} ({c.peft_type})" for n, c in model.peft_config.items())
            raise ConfigError(
                f"only an ADALORA adapter has ranks to allocate, {name!r:.99} is none: there is {there}"
            )
        end, modules = f".adapters.{name}", model.get_base_model().named_modules()
        return cls({p.removesuffix(end): m for p, m in modules if p.endswith(end)}, config)

    def _begin(self) -> None:
        """Nothing observed, everything kept, weights taken as they are."""
        xp, size = self._xp, sum(p.size for p in self.params)
        self.sensitivity, self.uncertainty = (
            xp.zeros(size, self.params[0].dtype) for _ in range(2)
        )
        self._choose(np.ones(sum(a.r for a in self.adapters.values()), bool))
        for adapter in self.adapters.values():
            adapter.settle(known=False)

    @property
    def params(self) -> list[Parameter]:
        """A, E and B of every layer in turn: the order that `step(grads)` expects."""
        return [getattr(a, name) for a in self.adapters.values() for name in AdaLoraAdapter.TENSORS]

    @property
    def ranks(self) -> dict[str, int]:
        """How many triplets of each layer the last allocation kept."""
        return {layer: int(kept.sum()) for layer, kept in self._by_layer(self.kept)}

    def budget(self, t: int) -> int:
        """b(t), how many triplets may stay after step t: all, then fewer by a cubic, then target_r a layer."""
        tinit = self.config.tinit
        left = min(
            1.0, max(0.0, 1 - (t - tinit) / (self.final_step - tinit))
        )  # of the time in which it falls
        return int((self.initial - self.target) * left**3 + self.target)

    def penalty(self) -> tuple[Array, list[Array | None]]:
        """(orth_reg_weight times `orthogonality`, its gradients along `params`): a term of the weights alone.

        Add the gradients once a step, before they are clipped. The value is a float64 scalar where the weights are.
        """
        total = orthogonality([(a.lora_A, a.lora_B) for a in self.adapters.values()])
        weight = total.backend.xp.full((), self.config.orth_reg_weight, total.dtype)
        return (total.data * weight).astype(np.float64), gradients(total, self.params, weight)

    def importance(self) -> Array:
        """S of every triplet, layer after layer: (sum r,)"""
        score, found, at = self.sensitivity * self.uncertainty, [], 0
        for adapter in self.adapters.values():
            parts = []
            for name in adapter.TENSORS:
                p: Parameter = getattr(adapter, name)
                parts.append(score[at : at + p.size].reshape(p.shape))
                at += p.size
            A, E, B = parts
            found.append(E[:, 0] + (A.mean(axis=1) + B.mean(axis=0)))
        return self._xp.concatenate(found)

    def step(self, grads: Sequence[Array | None]) -> None:
        """Call it after each step of the optimiser, with the gradients along `params` that the optimiser had.

        They are held against the weights as they are now, as in PEFT. None, for what took no part, counts as zero.
        ConfigError if their shapes are not those of `params`; nothing changes then.
        """
        params, c, xp = self.params, self.config, self._xp
        pairs = [
            (p.data, xp.zeros_like(p.data) if g is None else g)
            for p, g in zip(params, grads, strict=False)
        ]
        if len(grads) != len(params) or any(p.shape != g.shape for p, g in pairs):
            raise ConfigError(
                f"{len(grads)} gradients do not fit the {len(params)} parameters in number or in shape"
            )
        self.steps += 1
        t, end = self.steps, self.final_step
        if t < end:
            w, g = (
                xp.concatenate([a.reshape(-1) for a in side]) for side in zip(*pairs, strict=True)
            )
            now = xp.abs(w * g.astype(w.dtype))
            self.sensitivity = c.beta1 * self.sensitivity + (1 - c.beta1) * now
            self.uncertainty = c.beta2 * self.uncertainty + (1 - c.beta2) * xp.abs(
                now - self.sensitivity
            )
        due = t == end or (c.tinit < t < end and t % c.deltaT == 0)
        if due:
            cut = self.initial - self.budget(t)
            kept = xp.ones(self.initial, bool)
            kept[xp.argsort(self.importance(), kind="stable")[:cut]] = (
                False  # of equals the first goes first
            )
            self._choose(self.params[0].backend.to_numpy(kept))
        if due or t > end:
            for adapter, (_, mask) in zip(
                self.adapters.values(), self._by_layer(self._mask), strict=True
            ):
                adapter.lora_E.data = xp.where(mask.reshape(-1, 1), adapter.lora_E.data, 0)
        for adapter in self.adapters.values():
            adapter.settle()

    def prune(self) -> None:
        """Cut out for good what the final choice leaves at zero, and say so in config.rank_pattern, as in PEFT's files.

        The parameters are new ones then. ConfigError before the choice is final.
        """
        if self.steps < self.final_step:
            raise ConfigError(
                f"ranks are final after step {self.final_step}, this is step {self.steps}"
            )
        pattern, r = {}, self.config.init_r
        for layer, kept in self._by_layer(self.kept):
            left = iter(kept.tolist())  # of those that an earlier pruning left, where there was one
            key = f"{layer}.lora_E"
            pattern[key] = [
                was and next(left) for was in self.config.rank_pattern.get(key, [True] * r)
            ]
            self.adapters[layer].keep(kept)
        self.config.rank_pattern = pattern
        self._begin()

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, numbers): copies of all that the next steps depend on besides the weights."""
        to_numpy = self.params[0].backend.to_numpy
        arrays = {
            name: np.array(to_numpy(getattr(self, name))) for name in ("sensitivity", "uncertainty")
        }
        return {**arrays, "kept": self.kept.copy()}, {"steps": self.steps}

    def load_state_dict(self, arrays: dict[str, np.ndarray], numbers: dict[str, Any]) -> None:
        """Continue from a `state_dict`, with the weights of that moment. CheckpointError if it is another's."""
        now, steps = self.state_dict()[0], numbers.get("steps")
        here, there = (
            {k: f"{a.dtype} {a.shape}" for k, a in side.items()} for side in (now, arrays)
        )
        if here != there or type(steps) is not int or steps < 0:
            raise CheckpointError(
                f"the allocator's state should be {here} and steps, got {there} and {steps!r:.40}"
            )
        from_numpy = self.params[0].backend.from_numpy
        self.steps = steps
        self.sensitivity, self.uncertainty = (
            from_numpy(arrays[k].copy()) for k in ("sensitivity", "uncertainty")
        )
        self._choose(arrays["kept"].copy())
        for adapter in self.adapters.values():
            adapter.settle(known=False)

    def _choose(self, kept: np.ndarray) -> None:
        self.kept, self._mask = (
            kept,
            self.params[0].backend.from_numpy(kept),
        )  # (sum r,) on the host, and there

    def _by_layer(self, each: Array) -> list[tuple[str, Array]]:
        """(layer, its part) of an array with an entry for every triplet."""
        ends = np.cumsum([a.r for a in self.adapters.values()]).tolist()
        return [
            (name, each[end - a.r : end])
            for (name, a), end in zip(self.adapters.items(), ends, strict=True)
        ]

    @property
    def _xp(self) -> Any:
        return self.params[0].backend.xp
