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
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor, grad_enabled
from ..backend import Array
from ..effective import Pull
from ..errors import ConfigError
from ..nn import Dropout, LinearBase, Parameter, normal
from .config import LoraConfig
from .factors import Part, float64
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
    def shapes(base: Any, r: int) -> dict[str, tuple[int, ...]]:
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

    def part(self) -> Part:
        """dW as float64 factors on the host, diag(E) A being the first."""
        return Part(float64(self.lora_A) * float64(self.lora_E), float64(self.lora_B), self.scaling)

    def effective(self, W: Array) -> tuple[tuple[Tensor, ...], Pull]:
        """Add dW to W (O, I) in place; returns the parameters, and how their gradients are found: LoRA's, then dE."""
        self._require_allocator()
        a, e, b, s = self.lora_A.data, self.lora_E.data, self.lora_B.data, self.scaling
        W += (b @ (a * e)) * s
        scaled_t = self.lora_A.backend.xp.ascontiguousarray((a * e).T)  # (I, r)

        def pull(X: Array, dY: Array) -> F.Grads:
            product = ((dY @ b) * s).T @ X  # of E A: (r, N) @ (N, I) -> (r, I)
            dE = (product * a).sum(axis=1, keepdims=True)
            return product * e, dE, dY.T @ ((X @ scaled_t) * s)  # dA (r, I), dE (r, 1), dB (O, r)

        return (self.lora_A, self.lora_E, self.lora_B), Pull(pull)

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


# ---- the budget -----------------------------------------------------------------------------------------------------
