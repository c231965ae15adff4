"""The ledger of an epoch: what was declared, what came, what was lost on the way."""

import json

import pytest
import torch

from data.ledger import Ledger, ledger_table
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
    ledgers = [Ledger(sources), Ledger(sources)]
    for rank in range(2):
        for first, last in ((0, 1), (1, sampler.steps_per_epoch)):
            kept = json.loads(json.dumps(ledgers[rank].totals(lambda sums: sums)))
            ledgers[rank] = Ledger(sources, start=kept)
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
                    ledgers[rank].add(batch, torch.where(batch.source_of_target == 0, 2.0, 0.5))
    other = torch.tensor(ledgers[1].totals(lambda sums: sums))
    rows = ledgers[0].rows(epoch=0, reduce=lambda sums: sums + other)
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
