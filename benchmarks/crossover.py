"""From which rank on a merged expert is faster than its factors: written to tuned/sm_*.json.

python -m benchmarks.crossover        # a few seconds on a GPU

Two layers that differ in nothing else are timed side by side, of ranks r, r and four times 16: with
factors alone, and with the two experts of rank r merged. By operations they cost the same at
r* = D F / (D + F); the entry's `share` is the rank at which they took the same time, over r*.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

from benchmarks import records, tune
from flexmore_kernels import explain
from flexmore_kernels.shapes import SHAPES
from flexmore_kernels.timing import compare

SHARES = (0.5, 0.7, 0.85, 0.95, 1.05)
SHAPE = SHAPES["flexolmo_mixed"]


@torch.no_grad()
def times(rank: int) -> tuple[float, float]:
    """Milliseconds with factors, and merged."""
    shape = SHAPE._replace(ranks=(0, rank, rank, 16, 16, 16, 16))
    factors, merged = (explain.make_layer(shape, "cuda", torch.bfloat16) for _ in range(2))
    merged.load_state_dict(factors.state_dict())
    factors.prepare(merge=None)
    merged.prepare(merge=[1, 2])
    x = torch.randn(shape.tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    calls = {"factors": lambda: factors(x), "merged": lambda: merged(x)}
    found = compare(calls, "cuda", rounds=9, budget_s=1.0)
    return found["factors"].ms, found["merged"].ms


def crossover(found: dict[float, tuple[float, float]]) -> float:
    """The share at which the difference changes its sign, between the two nearest; at most 1."""
    lead = {share: factors - merged for share, (factors, merged) in sorted(found.items())}
    if next(iter(lead.values())) >= 0:
        return min(lead)
    for (low, before), (high, after) in itertools.pairwise(lead.items()):
        if after >= 0:
            return low + (high - low) * -before / (after - before)
    return 1.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", help="where the sources came without their history")
    parser.add_argument("--out", type=Path, help="default: the file of this architecture")
    given = parser.parse_args()
    D, F = SHAPE.hidden, SHAPE.intermediate
    found = {}
    for share in SHARES:
        rank = round(share * D * F / (D + F) / 64) * 64
        found[rank * (D + F) / (D * F)] = times(rank)
        print(f"rank {rank}: factors, merged {found[rank * (D + F) / (D * F)]} ms", flush=True)
    where = records.environment("cuda", given.commit)
    entry = {
        "share": round(crossover(found), 3),
        "case": f"T={SHAPE.tokens}, D={D}, F={F}, top-{SHAPE.top_k} of 7, ranks r, r, 4 x 16",
        "share_factors_merged_ms": [
            [round(share, 3), records.short(factors), records.short(merged)]
            for share, (factors, merged) in found.items()
        ],
        **{name: where[name] for name in ("device", "commit", "time", "torch", "triton")},
    }
    tune.write(given.out, torch.cuda.get_device_capability(), merge_above=entry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
