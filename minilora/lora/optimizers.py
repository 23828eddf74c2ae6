"""Optimisers for the factors A, B of adapters: LoRA+, LoRA-FA and the Riemannian step.

Each is AdamW or SGD with other learning rates, or over other gradients ("<-" replaces a gradient):

loraplus     lr for A and ratio lr for B                              Hayou et al. 2024
lorafa       A is frozen;  g_B <- s^-2 g_B (A A^T + 1e-8)^+            Zhang et al. 2023
riemannian   g_A <- (B^T B + reg)^+ g_A,  g_B <- g_B (A A^T + reg)^+   Zhang & Pilanci 2024

With G = dL/dW (O, I), the gradients are g_A = s B^T G (r, I) and g_B = s G A^T (O, r). Let P_A =
A^+ A and P_B = B B^+ be the projections onto the rows of A and the columns of B. Without damping,
a step of SGD changes dW = s B A by

    -lr G P_A                           lorafa: depends on the row space of A alone, not on s
    -lr s^2 (P_B G + G P_A) + O(lr^2)   riemannian: the same for all factors (M A, B M^-1) of dW

and a step of plain SGD by -lr s^2 (B B^T G + G A^T A) + O(lr^2). lorafa and riemannian change the
steps of A and B in linear layers with LoRA or DoRA. All other parameters (an embedding's factors,
DoRA's magnitudes, copied modules) train as with AdamW or SGD alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, backend_of
from ..errors import ConfigError, NonFiniteError, Rule, check_fields, is_number
from ..nn import Parameter
from ..optim import AdamW, Group, Optimizer
from .config import LoraConfig
from .dora import DoraAdapter
from .lora import LoraAdapter
from .maps import MapConfig
from .targets.plan import wrappers

OPTIMIZERS = ("adamw", "loraplus", "lorafa", "riemannian")
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
DAMPING = 1e-8  # LoRA-FA's

_is_positive = is_number(above=0)
_RULES = (
    Rule("lr", _is_positive, "a finite number above 0"),
    Rule("loraplus_lr_ratio", _is_positive, "a finite number above 0"),
    Rule("loraplus_lr_embedding", _is_positive, "a finite number above 0"),
)
_REG = Rule("reg", is_number(0), "a finite number of at least 0")


def require_optimizable(optimizer: str, config: LoraConfig | None) -> None:
    """ConfigError unless `optimizer` can train this adapter, or the whole model (config None)."""
    if optimizer not in OPTIMIZERS:
        names = ", ".join(OPTIMIZERS)
        raise ConfigError(f"optimizer must be one of {names}, got {optimizer!r:.99}")
    if optimizer == "adamw":
        return
    if config is None:
        raise ConfigError(
            f"optimizer {optimizer} is for the factors of an adapter, and all weights train: "
            "use adamw, or train an adapter"
        )
    if isinstance(config, MapConfig):
        raise ConfigError(
            f"optimizer {optimizer} is for the factors A and B, and {config.title} has none: "
            "use adamw"
        )
    if optimizer != "loraplus" and config.peft_type != "LORA":
        raise ConfigError(
            f"optimizer {optimizer} is for the A and B of LoRA and DoRA, not for "
            f"{config.peft_type}: use adamw or loraplus"
        )


def make_optimizer(
    model: Any, optimizer: str, lr: float, weight_decay: float = 0.0, **options: float | None
) -> Any:
    """The optimiser that `optimizer` names, over the parameters of `model` that require a gradient.

    options   arguments of the create_... functions below, by name; None is the default

    ConfigError if it cannot train the active adapters.
    """
    configs = getattr(model, "peft_config", {})
    active = [configs[name] for name in getattr(model, "active_adapters", ())]
    for config in active or [None]:
        require_optimizable(optimizer, config)
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if optimizer == "loraplus":
        return create_loraplus_optimizer(model, lr=lr, loraplus_weight_decay=weight_decay, **given)
    given |= {"lr": lr, "weight_decay": weight_decay}
    if optimizer == "lorafa":
        return create_lorafa_optimizer(model, **given)
    if optimizer == "riemannian":
        return create_riemannian_optimizer(model, **given)
    return AdamW(_trained(model), **given)


def _trained(model: Any) -> list[tuple[str, Parameter]]:
    """(name, parameter) of all that require a gradient."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


# ---- LoRA+ ---------------------------------------------------------------------------------------


def create_loraplus_optimizer(
    model: Any,
    optimizer_cls: type[Any] = AdamW,
    *,
    lr: float,
    loraplus_lr_ratio: float = 16.0,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **options: Any,
) -> Any:
    """An optimiser over the groups of LoRA+, in the order of the model's parameters.

    That order is the same without groups, so the gradients' norm has the same bits. With
    loraplus_lr_ratio = 1 and loraplus_lr_embedding = lr, a step has the bits of `optimizer_cls`
    without groups, apart from the weight decay of biases.
    """
    trained = _trained(model)
    groups = loraplus_groups(trained, lr, loraplus_lr_ratio, loraplus_lr_embedding)
    optimizer = optimizer_cls(groups, lr=lr, weight_decay=loraplus_weight_decay, **options)
    places = {id(p): place for place, (_, p) in enumerate(trained)}
    optimizer.members.sort(key=lambda member: places[id(member.parameter)])
    return optimizer


def loraplus_groups(
    named: Iterable[tuple[str, Parameter]],
    lr: float,
    loraplus_lr_ratio: float = 16.0,
    loraplus_lr_embedding: float = 1e-6,
) -> list[Group]:
    """The groups of LoRA+ (Hayou et al. 2024): B's learning rate is loraplus_lr_ratio times A's.

    The groups are PEFT's, and the name of a parameter decides its group:

    lr                      A, and other matrices
    loraplus_lr_embedding   both factors of an embedding, "...lora_embedding_A.<adapter>"
    lr loraplus_lr_ratio    B, "...lora_B.<adapter>[.weight]", and vectors: DoRA's magnitudes, norms
    lr loraplus_lr_ratio    biases, without weight decay

    Only groups with parameters are returned. The first three have the optimiser's weight decay.
    """
    rates = (lr, loraplus_lr_ratio, loraplus_lr_embedding)
    check_fields(dict(zip([rule.field for rule in _RULES], rates, strict=True)), _RULES)
    slow: Group = {"params": [], "lr": lr}
    embeddings: Group = {"params": [], "lr": loraplus_lr_embedding}
    fast: Group = {"params": [], "lr": lr * loraplus_lr_ratio}
    biases: Group = {"params": [], "lr": lr * loraplus_lr_ratio, "weight_decay": 0.0}
    for name, p in named:
        # The first of the two: an adapter may be called "lora_B", too.
        factor = next((part for part in name.split(".")[-3:-1] if part in FACTORS), "")
        if "embedding" in factor:
            group = embeddings
        elif p.ndim == 1 and name.endswith("bias"):
            group = biases
        elif p.ndim == 1 or factor == "lora_B":
            group = fast
        else:
            group = slow
        group["params"].append((name, p))
    return [group for group in (slow, embeddings, fast, biases) if group["params"]]


# ---- LoRA-FA and the Riemannian step -------------------------------------------------------------


class Pair(NamedTuple):
    """A (r, I), B (O, r) and the scaling s of one adapter of a linear layer."""

    A: Parameter
    B: Parameter
    s: float


def trained_pairs(model: Any) -> list[Pair]:
    """The pairs of linear layers with LoRA or DoRA whose B trains. ConfigError without any."""
    pairs = []
    for _, wrapper in wrappers(model.get_base_model()):
        for adapter in wrapper.entries.values():
            if type(adapter) in (LoraAdapter, DoraAdapter) and adapter.lora_B.requires_grad:
                pairs.append(Pair(adapter.lora_A, adapter.lora_B, adapter.scaling))
    if not pairs:
        raise ConfigError(
            "no A and B of a linear layer trains, and the optimiser is for these: "
            "adapt a linear layer, or use adamw"
        )
    return pairs


def freeze_first_factors(model: Any) -> None:
    """Freeze A in each pair of `trained_pairs`."""
    for pair in trained_pairs(model):
        pair.A.requires_grad = False


def create_lorafa_optimizer(
    model: Any,
    optimizer_cls: type[Any] = AdamW,
    *,
    lr: float,
    weight_decay: float = 0.0,
    **options: Any,
) -> Any:
    """An optimiser of LoRA-FA, which freezes each A and preconditions g_B (Zhang et al. 2023).

    A step of SGD along s^-2 g_B (A A^T)^-1 changes dW by -lr G P_A: of all matrices whose rows are
    combinations of A's, G P_A is the nearest to G. (PEFT takes r, alpha and rsLoRA as arguments;
    here s is the adapter's.)
    """
    freeze_first_factors(model)
    trained = _trained(model)
    optimizer = optimizer_cls(trained, lr=lr, weight_decay=weight_decay, **options)
    optimizer.precondition = LoraFA(optimizer, trained_pairs(model))
    return optimizer


def create_riemannian_optimizer(
    model: Any,
    optimizer_cls: type[Any] = AdamW,
    *,
    lr: float,
    reg: float = 1e-2,
    **options: Any,
) -> Any:
    """An optimiser of the Riemannian step, which depends on dW and not on its factors.

    Zhang & Pilanci 2024, section 3: by SGD, with reg = 0, the factors (M A, B M^-1) give the same
    change of dW for every invertible M. With reg > 0 only for orthogonal M, and with AdamW, whose
    step is entry by entry, only for permutations and signs.
    """
    check_fields({"reg": reg}, [_REG])
    optimizer = optimizer_cls(_trained(model), lr=lr, **options)
    optimizer.precondition = Riemannian(optimizer, trained_pairs(model), reg)
    optimizer.uncaptured = "the Riemannian step decomposes r x r matrices on the host"
    return optimizer


class LoraFA:
    """g_B -> s^-2 g_B (A A^T + damping)^+ for each pair; other gradients stay.

    A is frozen, so the inverses are computed once, and again only after somebody changed an A. A
    step costs one product for each pair.
    """

    def __init__(self, optimizer: Optimizer, pairs: Sequence[Pair], damping: float = DAMPING):
        self.pairs = pairs
        self.places = _places(optimizer, [pair.B for pair in pairs])
        self.damping = damping
        self._versions: list[list[int]] = []
        self._inverses: list[Array] = []

    def __call__(self, grads: list[Array | None]) -> list[Array | None]:
        versions = [list(pair.A.version or ()) for pair in self.pairs]
        if versions != self._versions:
            weights = [1 / (pair.s * pair.s) for pair in self.pairs]
            factors = [pair.A.data for pair in self.pairs]
            self._inverses = invert_grams(factors, self.damping, weights)
            self._versions = versions
        result = list(grads)
        for place, pair, inverse in zip(self.places, self.pairs, self._inverses, strict=True):
            if place is not None and grads[place] is not None:
                result[place] = pair.B.backend.matmul(grads[place], inverse)
        return result


class Riemannian:
    """g_A -> (B^T B + reg)^+ g_A and g_B -> g_B (A A^T + reg)^+; other gradients stay."""

    def __init__(self, optimizer: Optimizer, pairs: Sequence[Pair], reg: float):
        self.pairs = pairs
        self.A_places = _places(optimizer, [pair.A for pair in pairs])
        self.B_places = _places(optimizer, [pair.B for pair in pairs])
        self.reg = reg

    def __call__(self, grads: list[Array | None]) -> list[Array | None]:
        inverses_A = invert_grams([pair.A.data for pair in self.pairs], self.reg)
        inverses_B = invert_grams([pair.B.data.T for pair in self.pairs], self.reg)
        result = list(grads)
        for i, pair in enumerate(self.pairs):
            matmul = pair.B.backend.matmul
            at_A = self.A_places[i]
            at_B = self.B_places[i]
            if at_A is not None and grads[at_A] is not None:
                result[at_A] = matmul(inverses_B[i], grads[at_A])  # (r, r) @ (r, I)
            if at_B is not None and grads[at_B] is not None:
                result[at_B] = matmul(grads[at_B], inverses_A[i])  # (O, r) @ (r, r)
        return result


def _places(optimizer: Optimizer, params: Sequence[Parameter]) -> list[int | None]:
    """The index of each of `params` among the optimiser's parameters; None if it is not one."""
    places = {id(p): place for place, p in enumerate(optimizer.params)}
    return [places.get(id(p)) for p in params]


def invert_grams(
    factors: Sequence[Array], damping: float, weights: Sequence[float] | None = None
) -> list[Array]:
    """weight (F F^T + damping)^+ (r, r) for each F (r, n), in F's dtype and on its device.

    Computed in float64, the inverses on the host. Eigenvalues of at most r eps times the largest
    count as 0, with eps of F's dtype, as in PEFT: along them a gradient has only rounding errors.
    NonFiniteError if a Gram matrix F F^T is not finite.
    """
    backend = backend_of(factors[0])
    wide = [F.astype(np.float64) for F in factors]
    grams = [backend.matmul(F, F.T) for F in wide]
    numbers = backend.to_numpy(backend.join(grams))  # one transfer for all
    if not np.isfinite(numbers).all():
        raise NonFiniteError("a factor of an adapter is not finite, or its square is not")
    inverses = []
    end = 0
    for i, F in enumerate(factors):
        r = len(F)
        start, end = end, end + r * r
        M = numbers[start:end].reshape(r, r) + damping * np.eye(r)
        inverse = np.linalg.pinv(M, rcond=r * np.finfo(F.dtype).eps, hermitian=True)
        if weights is not None:
            inverse *= weights[i]
        inverses.append(backend.from_numpy(inverse.astype(F.dtype)))
    return inverses
