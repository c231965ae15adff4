"""The ledger of an epoch: what was declared, what came, what was lost on the way."""

import json

import pytest
import torch

from data.ledger import ledger_rows, ledger_table, tally
from data.loader import SampleReader, StepLoader
from data.mixture import read_mixture
from data.sampler import StepSampler
from tests.data_fixtures import SquareProcessor, encoder, record, write_json


def test_the_ledger_adds_up_over_ranks_and_stops(tmp_path):
    write_json(tmp_path / "a.json", [record("5", "31")] * 5)
    write_json(tmp_path / "b.json", [record("5", "32 33"), {"id": "bad"}, record("5 " * 90, "34")])
    (tmp_path / "data.txt").write_text("a.json 0.007\nb.json\n")
    sources = read_mixture(tmp_path / "data.txt", skip_bad=True)
    sampler = StepSampler(sources, seed=0, global_batch=4)
    reader = SampleReader(sources, encoder(60), SquareProcessor())
    sums = torch.zeros(4, len(sources), dtype=torch.float64)
    for rank in range(2):
        for first, last in ((0, 1), (1, sampler.steps_per_epoch)):
            sums = torch.tensor(json.loads(json.dumps(sums.tolist())))
            loader = StepLoader(
                reader,
                sampler,
                rank=rank,
                num_ranks=2,
                samples_per_micro_batch=2,
                first_step=first,
                num_steps=last,
                on_bad_sample="skip",
            )
            for step in loader:
                for batch in step:
                    losses = torch.where(batch.source_of_target == 0, 2.0, 0.5)
                    sums = sums + tally(batch, losses, len(sources))
    rows = ledger_rows(sources, sums, epoch=0)
    assert rows[0] == {
        "source": "a",
        "declared_samples": 7,
        "realised_samples": 7,
        "left_out_samples": 0,
        "supervised_tokens": 21,
        "mean_loss": 2.0,
        "unique_records": 5,
        "records": 5,
    }
    assert (rows[1]["declared_samples"], rows[1]["realised_samples"], rows[1]["left_out_samples"]) == (
        3,
        1,
        2,
    )
    assert (rows[1]["supervised_tokens"], rows[1]["mean_loss"]) == (4, pytest.approx(0.5))
    lines = ledger_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "5 of 5" in lines[1]
