"""The ledger of an epoch: declared and really trained samples, tokens and loss, one line per source.

    sums += tally(micro_batch, token_losses, len(sources))      # for every micro-batch, over all ranks
    print(ledger_table(ledger_rows(sources, sums, epoch=0)))
    source  declared  realised  left out  supervised tokens  mean loss  unique records
    pets       2,000     1,998         2             81,204     1.2034  2,000 of 5,000

The sums add up over micro-batches, ranks and steps, and over the runs of an epoch that was resumed.
"""

from collections.abc import Sequence
from typing import Any

import torch

from data.batch import MicroBatch, to_device
from data.mixture import Source


def tally(batch: MicroBatch, losses: torch.Tensor, num_sources: int) -> torch.Tensor:
    """Sums of a micro-batch by source, float64 [4, sources] on the device of the losses.

    The rows are samples, samples left out, supervised tokens and losses.

    Args: losses: the loss of each supervised token, in the order of `source_of_target`.
    """
    left_out = [*batch.skipped, *batch.unsupervised]
    counts = [
        torch.tensor([source for source, _ in samples], dtype=torch.int64).bincount(minlength=num_sources)
        for samples in (batch.sample_ids, left_out)
    ]
    sums = torch.zeros(4, num_sources, dtype=torch.float64, device=losses.device)
    sums[:2] = to_device(torch.stack(counts), losses.device)
    sums[2].index_add_(0, batch.source_of_target, torch.ones_like(losses, dtype=torch.float64))
    sums[3].index_add_(0, batch.source_of_target, losses.double())
    return sums


def ledger_rows(sources: Sequence[Source], sums: torch.Tensor, epoch: int) -> list[dict[str, Any]]:
    """One row per source at the end of an epoch (from 0); sums: `tally` of the whole epoch, [4, sources]."""
    return [
        {
            "source": source.name,
            "declared_samples": source.num_samples,
            "realised_samples": int(samples),
            "left_out_samples": int(left_out),
            "supervised_tokens": int(tokens),
            "mean_loss": loss / tokens if tokens else None,
            # No record is used twice before every record is used once.
            "unique_records": min(len(source.records), source.num_samples * (epoch + 1)),
            "records": len(source.records),
        }
        for source, samples, left_out, tokens, loss in zip(sources, *sums.tolist(), strict=True)
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
    """Aligned columns of text: the first to the left, the others to the right."""
    columns = []
    for number, column in enumerate(zip(*lines, strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if number else cell.ljust(width) for cell in column])
    return "\n".join(map("  ".join, zip(*columns, strict=True)))
