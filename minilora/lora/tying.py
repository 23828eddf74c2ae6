"""A tied weight: an embedding and a head that share it, in a model and in a checkpoint's files.

An adapter that changes one of the two places, or each in its own way, cannot be merged into the one
weight without a choice:

    untie   each place gets a weight of its own, and the model's output stays the same
    share   both places get the changed weight, as in peft, and so the output changes

While an adapter is merged, the changed place leads and the other follows: `leader` and `follower`
of a wrapper (merging.py). With `ensure_weight_tying` both places have the same adapter, the head's
being the embedding's transposed: A_head = B^T, B_head = A^T. Then the merged weight is one again,
without a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from .factors import Part
from .layer import SavedModule, Wrapper
from .merging import Merging

CHOICES = ("untie", "share")
CUSTOM = "custom"  # the type of a network that is not a language model


def choose(
    choice: str | None, adapters: str, embedding: bool, head: bool, same: bool = False
) -> str:
    """The way to merge a tied weight: "share" (one weight for both places) or "untie".

    choice            what the user chose, or None
    adapters          what changes the weight, for the message
    embedding, head   is the weight changed in this place?
    same              is it the same change in both?

    ConfigError if a choice is needed and missing, or impossible.
    """
    if choice is not None and choice not in CHOICES:
        raise ConfigError(f"tied must be {' or '.join(map(repr, CHOICES))}, got {choice!r:.99}")
    if same or not (embedding or head):
        return "share"
    if choice is None:
        place = "the head" if head else "the embedding"
        if embedding and head:
            place = "both, each in its own way"
        raise ConfigError(
            f"{adapters} changes {place}, and embedding and head share one weight (they are tied): "
            "choose tied='untie' to give each its own weight and keep the output, or tied='share' "
            "to change both, as peft does, and so the output (--tied on the command line)"
        )
    if choice == "share" and embedding and head:
        raise ConfigError(
            f"tied='share' needs a change of one place, but {adapters} changes embedding and head: "
            "choose tied='untie'"
        )
    return choice


def are_transposed(embedding: Part, head: Part) -> bool:
    """Is the head's part the embedding's, transposed: the same change of the one weight (V, C)?"""
    plain = embedding.m is None and head.m is None and embedding.c == head.c
    return plain and np.array_equal(embedding.A, head.B.T) and np.array_equal(embedding.B, head.A.T)


# ---- in a model -------------------------------------------------------------------------------


def unwrap(module: Any) -> Any:
    """The module as it was before any adapter: neither a wrapper nor merged."""
    while isinstance(module, Wrapper):
        module = getattr(module, "_original", None) or module.inner
    return module


def model_type_of(model: Any) -> str:
    """The type in the model's configuration; "custom", as PEFT calls it, for any other network."""
    return str(getattr(getattr(model, "config", None), "model_type", CUSTOM))


def embedding_and_head(model: Any) -> tuple[Any, Any]:
    """The modules in the places of the embedding and of the head; None for a missing one.

    Only a language model says where they are: any other network has neither.
    """
    get_embedding = getattr(model, "get_input_embeddings", lambda: None)
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    return get_embedding(), get_head()


def is_tied(model: Any) -> bool:
    """Do embedding and head share one weight, apart from adapters?"""
    places = embedding_and_head(model)
    embedding, head = map(unwrap, places)
    if embedding is None or head is None:
        return False
    followers = [getattr(place, "follower", None) for place in places]
    if followers[0] is head or followers[1] is embedding:
        return True
    return vars(head).get("weight") is vars(embedding).get("weight")


def prepare_tie(model: Any, names: Sequence[str], choice: str | None) -> None:
    """Set what merging the adapters `names` does to a tied weight; see `choose` for errors."""
    if choice is not None:
        choose(choice, "", False, False)  # an unknown choice raises, needed or not
    places = embedding_and_head(model)
    adapters_of = [_adapters_in(place, names) for place in places]
    embedding, head = places
    of_embedding, of_head = adapters_of
    if not (of_embedding or of_head) or not is_tied(model):
        return
    if of_embedding == of_head and head.leader is embedding:
        return
    changed = [(place, some) for place, some in zip(places, adapters_of, strict=True) if some]
    if choice is None and all({*place.merged} >= {*some} for place, some in changed):
        return
    how = choose(choice, f"adapter {', '.join(names)}", bool(of_embedding), bool(of_head))
    for place, _ in changed:
        other = head if place is embedding else embedding
        _set_follower(place, unwrap(other) if how == "share" else None)


def copy_to_share(model: Any, names: Sequence[str]) -> tuple[Any, Any] | None:
    """(the module that keeps the base's weight, the trained copy whose weight it is to share).

    None if the weight is not tied, or the adapters `names` copy neither place, or both as one.
    ConfigError if they change the two places, each in its own way.
    """
    if not is_tied(model):
        return None
    places = embedding_and_head(model)
    modules = [place.result(names) if isinstance(place, Wrapper) else place for place in places]
    copied = []
    changed = []
    for place, module in zip(places, modules, strict=True):
        copied.append(isinstance(place, SavedModule) and module is not place.inner)
        changed.append(copied[-1] or bool(_adapters_in(place, names)))
    if not any(copied):
        return None
    same = all(copied) and modules[0].weight is modules[1].weight
    choose("share", f"adapter {', '.join(names)}", changed[0], changed[1], same)
    embedding, head = modules
    return None if same else (head, embedding) if copied[0] else (embedding, head)


def _adapters_in(place: Any, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in place.adapters] if isinstance(place, Merging) else []


def _set_follower(place: Merging, follower: Any) -> None:
    """ConfigError if something is merged already, with the other choice."""
    if place.merged and place.follower is not follower:
        before, now = CHOICES if place.follower is None else CHOICES[::-1]
        raise ConfigError(
            f"{', '.join(place.merged)} is merged with tied={before!r}, got tied={now!r}: "
            "call unmerge_adapter first"
        )
    place.lead(follower)
