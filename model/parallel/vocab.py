"""Logits whose vocabulary columns are spread over the world."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from model.parallel.collectives import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabLogits:
    """Logits of rows that are the same on every rank; each rank holds its share of the columns.

    Args:
        local: float32 [N, this rank's columns].
        vocab_size: columns in all.
        group: the world.
    """

    local: Tensor
    vocab_size: int
    group: Group

    @property
    def share(self) -> int:
        """Columns of every rank but the last ones, which may have fewer."""
        return -(-self.vocab_size // self.group.size)

    @property
    def first(self) -> int:
        """Token id of this rank's first column."""
        return self.group.rank * self.share

    @property
    def everyone_has_columns(self) -> bool:
        """Whether no rank's share is empty."""
        return self.share * (self.group.size - 1) < self.vocab_size

    def rows(self, index: Tensor | slice | list[int]) -> VocabLogits:
        """Some of the rows, in any order."""
        return VocabLogits(local=self.local[index], vocab_size=self.vocab_size, group=self.group)

    def full(self) -> Tensor:
        """All columns, float32 [N, vocab_size], on every rank; collective."""
        if self.group.size == 1:
            return self.local
        rows = self.local.shape[0]
        padded = functional.pad(self.local, (0, self.share - self.local.shape[1]))
        gathered = self.group.all_gather(padded).view(self.group.size, rows, self.share)
        return gathered.transpose(0, 1).reshape(rows, -1)[:, : self.vocab_size]

    def gather(self, numbers: Tensor) -> Tensor:
        """One number a row from every rank: [N] -> [ranks, N]; collective."""
        return self.group.all_gather(numbers[None].contiguous())
