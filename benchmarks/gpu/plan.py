"""The parts in order of value, with the seconds that each may take, its process's start included.

A part may take longer while no later part loses time by it: see `conducting.run`.
"""

from __future__ import annotations

Plan = dict[str, int]

SIZE_NAMES = ("micro", "tiny", "small", "gpt2")

# What the first three minutes on a device must show.
QUICK: Plan = {
    "probe": 12,
    "floors": 24,
    "tests": 98,
    "ours:micro": 14,
    "ours:tiny": 10,
    "graph": 16,
}
# The eight minutes after that.
REST: Plan = {
    "probe": 10,
    "parity": 46,
    "ours:small": 16,
    "ours:gpt2": 24,
    "speed": 20,
    "method:dora": 12,
    "method:adalora": 12,
    "method:nf4": 12,
    "eager:micro": 18,
    "eager:tiny": 14,
    "eager:small": 14,
    "eager:gpt2": 28,
    "compiled:micro": 32,
    "compiled:tiny": 32,
    "compiled:small": 36,
    "compiled:gpt2": 52,
    "reduce-overhead:tiny": 36,
    "variant:tf32": 14,
    "variant:workspace-4-mib": 12,
    "variant:workspace-32-mib": 12,
    "variant:no-cub": 12,
}
COUNT: Plan = {"count": 600}

LONGEST = {"quick": 177, "rest": 477}  # seconds for all parts of a call
# An emulated device compiles every kernel with g++ when its cache is empty.
REHEARSAL_IS_SLOWER = 10
