"""Compute on paper how a LoRA step scales over machines that are joined by a network.

    python benchmarks/nodes.py [--rate 600] [--write]

Nothing is measured but what is given: a machine's floating point operations per second, and a
network's bandwidth and latency. A machine has 16 shards of 512 tokens. It computes

    forward, dX and dY^T X of every linear layer    6 operations per weight and token
    the head, which is not trained                  4
    attention                                       14 x context x width per layer and token
    W + dW, once a step whatever the tokens         2 r operations per weight

and the ranks exchange the gradients G of the adapter as training/group.py does: everyone gets its
share of what the others have, adds it up, and gets the sums of the others' shares. With N ranks
that is 2 G (N - 1) / N bytes out of each machine, in 2 (N - 1) messages. `weak` is the speed of N
machines with 16 shards each, `same` that of N machines which divide the 16 shards; both in numbers
of one machine. Machines that wait for a slower one are not in it.

`--write` stores the table in benchmarks/results/nodes.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

RESULT = Path(__file__).parent / "results" / "nodes.json"
SHARDS, TOKENS = 16, 512  # of a machine; tokens of a shard, which is one sequence
RANK = 8


class Base(NamedTuple):
    """A Llama-shaped model with as many heads for keys and values as for queries."""

    layers: int
    width: int
    mlp: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """The number of weights of the linear layers."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.mlp)

    @property
    def adapter(self) -> int:
        """Trained numbers: r (I + O) of every linear layer."""
        return RANK * self.layers * (4 * 2 * self.width + 3 * (self.width + self.mlp))

    def seconds(self, tokens: int, rate: float) -> float:
        """The seconds of a step on one machine of `rate` operations per second."""
        attention = 14 * TOKENS * self.width * self.layers
        per_token = 6 * self.weights + 4 * self.vocabulary * self.width + attention
        return (tokens * per_token + 2 * RANK * self.weights) / rate


class Network(NamedTuple):
    bandwidth: float  # bytes per second
    latency: float  # seconds per message

    def seconds(self, size: int, nodes: int) -> float:
        """To exchange `size` bytes of gradients."""
        messages = 2 * (nodes - 1)
        return 2 * size * (nodes - 1) / nodes / self.bandwidth + messages * self.latency


BASES = {
    "1M": Base(4, 128, 384, 256),
    "124M": Base(12, 768, 2048, 50257),
    "1B": Base(22, 2048, 5632, 32000),
    "7B": Base(32, 4096, 11008, 32000),
}
NETWORKS = {"10GbE": Network(1.1e9, 30e-6), "InfiniBand": Network(11e9, 2e-6)}


def table(rate: float) -> list[dict[str, Any]]:
    """A row for each base and network."""
    rows = []
    for name, base in BASES.items():
        alone = base.seconds(SHARDS * TOKENS, rate)
        for network_name, network in NETWORKS.items():
            row: dict[str, Any] = {"base": name, "network": network_name}
            row["adapter MB"] = round(4e-6 * base.adapter, 2)
            row["one machine s"] = round(alone, 3)
            for nodes in (8, 16):
                exchange = network.seconds(4 * base.adapter, nodes)
                divided = base.seconds(SHARDS * TOKENS // nodes, rate)
                row[f"exchange {nodes} ms"] = round(1e3 * exchange, 2)
                row[f"weak {nodes}"] = round(nodes * alone / (alone + exchange), 2)
                row[f"same {nodes}"] = round(alone / (divided + exchange), 2)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=600, help="of a machine, in GFLOP/s")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = table(1e9 * args.rate)
    print("".join(f"{title:>16}" for title in rows[0]))
    for row in rows:
        print("".join(f"{value:>16}" for value in row.values()))
    if args.write:
        networks = {name: network._asdict() for name, network in NETWORKS.items()}
        given = {"gigaflops": args.rate, "shards": SHARDS, "tokens": TOKENS, "rank": RANK}
        RESULT.write_text(
            json.dumps({**given, "networks": networks, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
