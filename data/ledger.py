"""What an epoch declared and what it really trained on, a line per source.

    ledger = Ledger(sources)
    ledger.add(micro_batch, token_losses)      # for every micro-batch of this rank
    print(ledger_table(ledger.rows(epoch=0, reduce=all_sum)))
    source  declared  realised  left out  supervised tokens  mean loss  unique records
    pets       2,000     1,998         2             81,204     1.2034  2,000 of 5,000

A run that stops within an epoch keeps `totals` and gives it to the next one as `start`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from data.batch import MicroBatch
from data.mixture import Source


class Ledger:
    """Sums of an epoch by source, [4, sources]: samples, samples left out, supervised tokens, losses."""

    def __init__(
        self,
        sources: Sequence[Source],
        device: torch.device | str = "cpu",
        start: Sequence[Sequence[float]] | None = None,
    ):
        """Args: start: `totals` of the part of the epoch before this run; on one rank only."""
        self._sources = sources
        self._sums = torch.zeros(4, len(sources), dtype=torch.float64, device=device)
        if start is not None:
            self._sums += torch.tensor(start, dtype=torch.float64, device=device)

    def add(self, batch: MicroBatch, losses: torch.Tensor) -> None:
        """Args: losses: of each supervised token of the micro-batch, in the order of `source_of_target`."""
        left_out = [*batch.skipped, *batch.unsupervised]
        for row, of_source in ((0, batch.sample_ids), (1, left_out)):
            numbers = torch.tensor([number for number, _ in of_source], dtype=torch.int64)
            self._sums[row] += numbers.bincount(minlength=len(self._sources)).to(self._sums)
        source_of_target = batch.source_of_target.to(losses.device)
        self._sums[2].index_add_(0, source_of_target, torch.ones_like(losses, dtype=torch.float64))
        self._sums[3].index_add_(0, source_of_target, losses.detach().double())

    def totals(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[list[float]]:
        """The sums of all ranks; reduce adds a tensor up over them."""
        return reduce(self._sums).tolist()

    def rows(self, epoch: int, reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[dict[str, Any]]:
        """A record per source at the end of an epoch (from 0)."""
        return [
            {
                "source": source.name,
                "declared_samples": source.num_samples,
                "realised_samples": int(samples),
                "left_out_samples": int(left_out),
                "supervised_tokens": int(tokens),
                "mean_loss": loss / tokens if tokens else None,
                # No record comes twice before every one has come once.
                "unique_records": min(len(source.records), source.num_samples * (epoch + 1)),
                "records": len(source.records),
            }
            for source, samples, left_out, tokens, loss in zip(
                self._sources, *self.totals(reduce), strict=True
            )
        ]


def ledger_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    head = ("source", "declared", "realised", "left out", "supervised tokens", "mean loss", "unique records")
    lines = [head] + [
        (
            row["source"],
            f"{row['declared_samples']:,}",
            f"{row['realised_samples']:,}",
            f"{row['left_out_samples']:,}",
            f"{row['supervised_tokens']:,}",
            "–" if row["mean_loss"] is None else f"{row['mean_loss']:.4f}",
            f"{row['unique_records']:,} of {row['records']:,}",
        )
        for row in rows
    ]
    return table(lines)


def table(lines: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
