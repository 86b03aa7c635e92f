"""What the study's results depend on, in three sizes.

small: about 25 minutes on two CPU cores, three seeds; large: about 15 minutes on one H100; medium:
one seed of it is what the package's default model is made of, on a GPU in about two minutes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes are the decoder's; tokens are of one training, learning rates the largest of it.

    late: the domain that joins last, and is in no public text. late_share: of its fine-tuning.
    budgets: uniform ranks whose bytes the data-aware ranks may use; few: ranks beside full-size of
    what is not swept. middle: experts a token, of what is not swept either. row_rate: of an owner's
    row of the router, tuned_rate: of all owners' together, router_rate: of upcycled models' rows;
    row_scale: the standard deviation of the first logits of an owner's row.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    batch: int

    base_tokens: int
    expert_tokens: int
    dense_tokens: int
    tuned_tokens: int
    upcycled_tokens: int
    late_tokens: int

    base_rate: float
    expert_rate: float
    dense_rate: float
    upcycled_rate: float
    row_rate: float
    tuned_rate: float
    router_rate: float

    heldout_tokens: int
    items: int
    calibration_tokens: int

    late: str = "sqlite"
    budgets: tuple[int, ...] = (2, 8, 32)
    few: tuple[int, ...] = (4, 32)
    shipped_rank: int = 8
    active: tuple[int | str, ...] = (2, 4, "all")
    middle: int = 4
    warmup: float = 0.05
    clip: float = 1.0
    row_scale: float = 3.0
    z_loss: float = 1e-3
    balance: float = 1e-2
    late_share: float = 0.5
    embedded_documents: int = 1000

    @property
    def ranks(self) -> tuple[int, ...]:
        """1, 2, 4, .. up to min(D, F), and the one whose factors cost what a matrix does."""
        D, F = self.hidden_size, self.intermediate_size
        powers = {1 << bits for bits in range(min(D, F).bit_length())}
        return tuple(sorted({*powers, min(D, F), D * F // (D + F)}))

    def as_dict(self) -> dict:
        """As JSON can hold it."""
        return {**dataclasses.asdict(self), "ranks": self.ranks}

    def changed(self, **values) -> Settings:
        """The same with other values."""
        return dataclasses.replace(self, **values)


SIZES = {
    "small": Settings(
        hidden_size=64, intermediate_size=176, layers=2, heads=2, vocabulary=1024, length=128,
        batch=16,
        base_tokens=2_000_000, expert_tokens=300_000, dense_tokens=300_000, tuned_tokens=120_000,
        upcycled_tokens=200_000, late_tokens=100_000,
        base_rate=6e-3, expert_rate=3e-3, dense_rate=2e-3, upcycled_rate=1e-3, row_rate=2e-4,
        tuned_rate=2e-3, router_rate=2e-2,
        heldout_tokens=6_000, items=200, calibration_tokens=8_192,
    ),
    "medium": Settings(
        hidden_size=192, intermediate_size=512, layers=3, heads=6, vocabulary=2048, length=256,
        batch=32,
        base_tokens=8_000_000, expert_tokens=2_000_000, dense_tokens=2_000_000,
        tuned_tokens=800_000, upcycled_tokens=1_000_000, late_tokens=500_000,
        base_rate=3e-3, expert_rate=2e-3, dense_rate=1e-3, upcycled_rate=5e-4, row_rate=7e-5,
        tuned_rate=7e-4, router_rate=7e-3,
        heldout_tokens=32_768, items=500, calibration_tokens=16_384,
        budgets=(4, 16, 64), few=(4, 32), shipped_rank=24,
    ),
    "large": Settings(
        hidden_size=512, intermediate_size=1408, layers=8, heads=8, vocabulary=4096, length=256,
        batch=64,
        base_tokens=10_000_000, expert_tokens=2_500_000, dense_tokens=2_500_000,
        tuned_tokens=1_000_000, upcycled_tokens=1_500_000, late_tokens=750_000,
        base_rate=1.5e-3, expert_rate=1e-3, dense_rate=5e-4, upcycled_rate=3e-4, row_rate=2.5e-5,
        tuned_rate=2.5e-4, router_rate=2.5e-3,
        heldout_tokens=65_536, items=1000, calibration_tokens=16_384,
        budgets=(4, 16, 64), few=(4, 32, 128),
    ),
}  # fmt: skip
