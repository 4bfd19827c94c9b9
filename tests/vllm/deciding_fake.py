"""The part of a fake client that says which blocks are worth loading."""

from typing import Any


class DecidingFake:
    """`worth`: how many leading blocks of any chain are worth loading; None for all of them."""

    worth: int | None = None
    measured: Any = None

    def __new__(cls) -> "DecidingFake":
        self = super().__new__(cls)
        self.asked_worth, self.declines = [], []
        return self

    asked_worth: list[Any]
    declines: list[str]

    def worth_loading(self, tiers: list[str], depth: int, tokens_per_s: float) -> int:
        self.asked_worth.append((tiers, depth, tokens_per_s))
        return len(tiers) if self.worth is None else min(self.worth, len(tiers))

    def declined(self, tiers: list[str]) -> None:
        self.declines += tiers

    def estimates(self) -> Any:
        return self.measured

    def adopt(self, estimates: Any) -> None:
        self.measured = estimates
