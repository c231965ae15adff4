"""Packing and balance: they say which rank runs what, and a pack trains what rows train."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data.lengths
import data.packing
from data.batch import collate
from data.errors import DataError
from data.lengths import BAD, UNMEASURED, bad_samples, measure_lengths, needed_records, num_cut
from data.loader import SampleReader, StepLoader
from data.mixture import read_mixture
from data.packing import CostModel, Packing, deal, idle_share, pack
from data.sampler import StepSampler
from data.tokens import SampleEncoder
from tests.data_fixtures import (
    EOS,
    SizedProcessor,
    SquareProcessor,
    encoder,
    pixel_values,
    record,
    write_json,
)
from tests.model_cases import golden
from tests.tiny import tiny_data, word_tokenizer
from trainer.models.xcomposer2.family import XComposer2
from trainer.models.xcomposer2.image_processing_xcomposer2 import HDImageProcessor, SquareImageProcessor


@settings(deadline=None, max_examples=300)
@given(
    tokens=st.lists(st.integers(0, 100), max_size=40),
    num_ranks=st.integers(1, 8),
    seed=st.integers(0, 10),
)
def test_a_plan_runs_every_sample_once_in_rows_that_fit(tokens, num_ranks, seed):
    tokens = np.array(tokens, dtype=np.int64)
    costs = tokens * np.random.default_rng(seed).uniform(0.5, 2, len(tokens))
    plan = pack(tokens, costs, num_ranks, 100)
    assert len(plan) == num_ranks
    assert len({len(parts) for parts in plan}) == 1, "ranks differ in their number of micro-batches"
    rows = [row for parts in plan for row in parts]
    assert sorted(index for row in rows for index in row) == list(range(len(tokens)))
    assert all(tokens[row].sum() <= 100 for row in rows)
    loads = [max(costs[parts[number]].sum() for parts in plan) for number in range(len(plan[0]))]
    assert loads == sorted(loads, reverse=True), "the costliest round runs first"
    again = pack(tokens.copy(), costs.copy(), num_ranks, 100)
    assert all(np.array_equal(a, b) for a, b in zip(rows, itertools.chain(*again), strict=True))


def fill_rows_by_looking_at_all(tokens, costs, num_rows, max_tokens):
    rows, row_tokens, row_costs = [[] for _ in range(num_rows)], np.zeros(num_rows), np.zeros(num_rows)
    for sample in np.argsort(-costs, kind="stable"):
        has_room = row_tokens + tokens[sample] <= max_tokens
        if not has_room.any():
            return None
        row = int(np.argmin(np.where(has_room, row_costs, np.inf)))
        rows[row].append(int(sample))
        row_tokens[row] += tokens[sample]
        row_costs[row] += costs[sample]
    return rows, row_costs.tolist()


@settings(deadline=None, max_examples=300)
@given(
    tokens=st.lists(st.integers(0, 100), max_size=60),
    num_rows=st.integers(1, 30),
    seed=st.integers(0, 10),
)
def test_a_sample_goes_to_the_cheapest_row_with_room_and_of_equal_ones_to_the_first(tokens, num_rows, seed):
    tokens = np.array(tokens, dtype=np.int64)
    for costs in (tokens * np.random.default_rng(seed).uniform(0.5, 2, len(tokens)), tokens // 20 + 0.1):
        expected = fill_rows_by_looking_at_all(tokens, costs, num_rows, 100)
        found = data.packing._fill_rows(tokens, costs, num_rows, 100)
        assert expected == (found and (found[0], found[1].tolist()))


def test_planning_for_1024_ranks_looks_at_few_rows_for_a_sample(monkeypatch):
    looked_at, heappop = [], data.packing.heappop
    monkeypatch.setattr(data.packing, "heappop", lambda rows: looked_at.append(rows) or heappop(rows))
    tokens, slots = realistic(16_384, np.random.default_rng(0))
    pack(tokens, CostModel()(tokens, slots), 1024, 4096)
    assert len(looked_at) < 16_384  # beside the one row that each sample goes to


def test_the_documented_plan():
    lengths = np.array([90, 10, 50, 40, 60])
    plan = pack(lengths, lengths.astype(float), num_ranks=2, max_tokens=100)
    assert [[row.tolist() for row in parts] for parts in plan] == [[[0], [2]], [[4], [1, 3]]]


def test_idle_share():
    assert idle_share([[np.array([0])], [np.array([1])]], np.array([4.0, 2.0])) == 0.25
    assert idle_share([[np.array([], dtype=int)]], np.array([])) == 0.0


def test_a_cost_model_of_the_7b():
    sizes = {"language": (4096, 14336, 32), "vision": (1024, 4096, 24), "kv_share": 0.25}
    square = CostModel.from_sizes(**sizes, patches_per_image=1225, patches_per_slot=1, trains_vision=True)
    assert (square.image_slot, square.token_pair) == pytest.approx(
        (CostModel().image_slot, CostModel().token_pair), rel=0.05
    )
    frozen = CostModel.from_sizes(**sizes, patches_per_image=1600, patches_per_slot=4, trains_vision=False)
    assert square.image_slot < frozen.image_slot < 4 / 3 * 1.2 * square.image_slot


def realistic(num_samples, rng):
    """(tokens, image slots): texts log-normal around 270 tokens, 60 % with images of 1225, some with two."""
    text = np.exp(rng.normal(5.6, 0.9, num_samples)).astype(int) + 20
    images = (rng.random(num_samples) < 0.6).astype(int) * (1 + (rng.random(num_samples) < 0.15))
    return np.minimum(text + 1225 * images, 4096), 1225 * images


def test_ranks_finish_together_on_a_realistic_mixture():
    rng, cost = np.random.default_rng(0), CostModel()
    packed, dealt = [], []
    for _ in range(30):
        tokens, slots = realistic(16 * 8, rng)
        costs = cost(tokens, slots)
        packed.append(idle_share(pack(tokens, costs, 8, 4096), costs))
        dealt.append(idle_share(deal(len(tokens), 8, 2), costs))
    assert np.mean(packed) < 0.05 < 0.2 < np.mean(dealt)


# --- lengths ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name, size in (("small", (2, 2)), ("wide", (5, 2)), ("big", (9, 9))):
        Image.new("RGB", size, (200, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


RECORDS = [
    record("5 5 5", "31"),
    record("<ImageHere>", "32", images=["small.png"]),
    record("<ImageHere>6<ImageHere>", "33 33", images=["wide.png", "small.png"]),
    record("7", "34 34", "<ImageHere>", "8", images=["big.png"]),
    record("5 " * 90, "35"),
]


def reader_of(folder, records, max_length=60, processor=None, skip_bad=False):
    if not (folder / "a.json").exists():
        write_json(folder / "a.json", records)
    sources = read_mixture(folder / "a.json", skip_bad=skip_bad)
    return SampleReader(sources, encoder(max_length), processor or SizedProcessor())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lengths_are_what_the_loader_makes(folder, num_workers, monkeypatch):
    monkeypatch.setattr("data.lengths.CHUNK_RECORDS", 2)
    reader = reader_of(folder, RECORDS)
    (lengths,) = measure_lengths(reader, num_workers=num_workers)
    whole = reader_of(folder, RECORDS, max_length=1000)
    for index, (tokens, slots, supervised, before_cut) in enumerate(lengths.tolist()):
        encoded, pictures = reader.read(0, index)
        assert before_cut == len(whole.read(0, index)[0].input_ids)
        assert encoded.is_cut == (before_cut > tokens)
        assert (len(encoded.input_ids), int(encoded.im_mask.sum())) == (tokens, slots)
        assert encoded.num_supervised == supervised
        assert sum(picture[0].numel() for picture in pictures) == slots
    assert lengths[4, :3].tolist() == [60, 0, 0], "cut before its answer"
    assert num_cut(lengths) == 2


def test_measuring_that_was_interrupted_goes_on_where_it_ended(folder, monkeypatch):
    monkeypatch.setattr("data.lengths.CHUNK_RECORDS", 2)
    monkeypatch.setattr("data.lengths.WRITE_SECONDS", 0)
    measure, measured = data.lengths._measure, list[int]()

    def measure_until(reader, chunk, last=3):
        if chunk[1][-1] > last:
            raise KeyboardInterrupt
        measured.extend(chunk[1].tolist())
        return measure(reader, chunk)

    monkeypatch.setattr("data.lengths._measure", measure_until)
    with pytest.raises(KeyboardInterrupt):
        measure_lengths(reader_of(folder, RECORDS), num_workers=0)
    assert measured == [0, 1, 2, 3]
    monkeypatch.setattr("data.lengths._measure", partial(measure_until, last=len(RECORDS)))
    (lengths,) = measure_lengths(reader_of(folder, RECORDS), num_workers=0)
    assert measured == [*range(len(RECORDS))]
    assert lengths.min() >= 0


def test_lengths_are_computed_once_for_the_same_settings(folder, monkeypatch):
    first = measure_lengths(reader_of(folder, RECORDS), num_workers=0)
    calls = []
    monkeypatch.setattr(SampleReader, "read", lambda *arguments, **options: calls.append(arguments) or 1 / 0)
    again = measure_lengths(reader_of(folder, RECORDS), num_workers=0)
    assert np.array_equal(first[0], again[0])
    for changed in (
        reader_of(folder, RECORDS, max_length=61),
        reader_of(folder, RECORDS, processor=SquareProcessor()),
    ):
        with pytest.raises(ZeroDivisionError):
            measure_lengths(changed, num_workers=0)
    write_json(folder / "a.json", RECORDS[::-1])
    with pytest.raises(ZeroDivisionError):
        measure_lengths(reader_of(folder, RECORDS), num_workers=0)


def test_a_short_run_measures_only_what_it_needs(folder, monkeypatch):
    reader = reader_of(folder, RECORDS[:4] * 10, max_length=120)
    sampler = StepSampler(reader.sources, seed=0, global_batch=3)
    needed = needed_records(sampler, range(4))
    planned = {record for step in range(4) for _, record in sampler.samples(step).tolist()}
    assert needed[0].tolist() == sorted(planned)
    assert len(planned) == 12
    (lengths,) = measure_lengths(reader, needed, num_workers=0)
    assert np.flatnonzero(lengths[:, 0] != UNMEASURED).tolist() == sorted(planned)
    calls = []
    monkeypatch.setattr("data.lengths._measure", lambda reader, chunk: calls.extend(chunk[1]) or 7)
    measure_lengths(reader, num_workers=0)
    assert len(calls) == 40 - 12, "what is cached is not measured again"


def test_bad_samples_have_no_length_and_are_named(folder):
    (folder / "broken.png").write_bytes(b"nothing")
    records = [*RECORDS[:2], record("<ImageHere>", "9", images=["broken.png"], record_id="x7"), {"id": "y"}]
    reader = reader_of(folder, records, skip_bad=True)
    lengths = measure_lengths(reader, num_workers=0)
    assert (lengths[0][:, 0] < 0).tolist() == [False, False, True, True]
    first, second = bad_samples(reader, lengths)
    assert "record 2 (id 'x7')" in first
    assert "broken.png" in first
    assert "record 3 (id 'y')" in second
    assert "1 more" in bad_samples(reader, lengths, max_named=1)[1]
    Image.new("RGB", (2, 2)).save(folder / "broken.png")
    (mended,) = measure_lengths(reader, num_workers=0)
    assert (mended[:, 0] == BAD).tolist() == [False, False, False, True]


# --- the loader, packed -----------------------------------------------------------------------------------


def packed_steps(reader, *, num_ranks=1, packing=True, num_workers=0, per=2, global_batch=6, **options):
    sampler = StepSampler(reader.sources, seed=0, global_batch=global_batch)
    lengths = measure_lengths(reader, num_workers=0)
    ranks = []
    for rank in range(num_ranks):
        loader = StepLoader(
            reader,
            sampler,
            rank=rank,
            num_ranks=num_ranks,
            samples_per_micro_batch=per,
            num_steps=sampler.steps_per_epoch,
            num_workers=num_workers,
            packing=Packing(lengths, reader.encoder.max_length) if packing else None,
            **options,
        )
        ranks.append(list(loader))
    return [[batch for rank in ranks for batch in rank[step]] for step in range(sampler.steps_per_epoch)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_packing_keeps_each_steps_samples_and_pads_nothing(folder, num_ranks, num_workers):
    reader = reader_of(folder, RECORDS[:4] * 4, max_length=120)
    packed = packed_steps(reader, num_ranks=num_ranks, num_workers=num_workers)
    unpacked = packed_steps(reader, packing=False)
    for packed_step, step in zip(packed, unpacked, strict=True):
        samples = sorted(pair for batch in packed_step for pair in batch.sample_ids)
        assert samples == sorted(pair for batch in step for pair in batch.sample_ids)
        assert sum(batch.num_supervised for batch in packed_step) == sum(
            batch.num_supervised for batch in step
        )
        for batch in packed_step:
            rows, tokens = batch.inputs["input_ids"].shape
            assert rows == 1
            assert tokens <= 120
            assert batch.inputs["attention_mask"] is None
            assert tokens == batch.num_tokens or batch.num_samples == 0
            assert (batch.inputs["position_ids"] == 0).sum() == max(1, batch.num_samples)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_steps_plan_leaves_idle_comes_with_its_micro_batches(folder, num_workers):
    reader = reader_of(folder, RECORDS[:4] * 4, max_length=120)
    packing = Packing(measure_lengths(reader, num_workers=0), 120)
    sampler = StepSampler(reader.sources, seed=0, global_batch=6)
    for step, batches in enumerate(packed_steps(reader, num_ranks=3, num_workers=num_workers)):
        samples = sampler.samples(step)
        share = idle_share(*packing.plan(samples, 3))
        assert {batch.planned_idle_share for batch in batches} == {share}
    for batches in packed_steps(reader, packing=False):
        assert {batch.planned_idle_share for batch in batches} == {None}


def test_left_out_samples_stay_left_out_when_packed(folder, caplog):
    records = [*RECORDS, record("<ImageHere>", "9", images=["absent.png"])]
    reader = reader_of(folder, records, skip_bad=True)
    ((*batches,),) = packed_steps(reader, num_ranks=2, on_bad_sample="skip")
    assert sum(batch.num_samples for batch in batches) == 4
    assert (
        sum(len(batch.skipped) for batch in batches) == sum(len(batch.unsupervised) for batch in batches) == 1
    )
    assert caplog.text.count("left out") == 2


def test_an_image_that_grew_since_it_was_measured_is_an_error(folder):
    reader = reader_of(folder, RECORDS[1:2] * 6, max_length=120)
    measure_lengths(reader, num_workers=0)
    Image.new("RGB", (9, 9)).save(folder / "small.png")
    with pytest.raises(DataError, match=r"remove the \*\.lengths files"):
        packed_steps(reader)


# --- packed = unpacked on the model -----------------------------------------------------------------------


def model_reader(folder, family):
    data = tiny_data(folder / "data")
    word_tokenizer(folder)
    processor = SquareImageProcessor(70, 14) if family == "xcomposer2" else HDImageProcessor(56, 14, 4, 1.5)
    return SampleReader(read_mixture(data), SampleEncoder(XComposer2().conversation(folder), 256), processor)


def losses_and_gradients(model, batches):
    model.zero_grad()
    num_supervised = sum(batch.num_supervised for batch in batches)
    loss = sum(model(**batch.inputs, num_items_in_batch=num_supervised).loss for batch in batches)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_order_within_a_pack_changes_nothing(tmp_path):
    model = golden("xcomposer2").model()
    reader = model_reader(tmp_path, "xcomposer2")
    (first, *_) = packed_steps(reader, global_batch=14)[0]
    assert first.num_samples > 3
    expected, gradients = losses_and_gradients(model, [first])
    for order in (first.sample_ids[::-1], sorted(first.sample_ids)):
        read = [reader.read(*place) for place in order]
        pictures = [picture for _, pictures in read for picture in pictures]
        given = pixel_values(pictures)
        batch = collate([encoded for encoded, _ in read], given, order, EOS, packed=True)
        loss, permuted = losses_and_gradients(model, [batch])
        assert loss == pytest.approx(expected, abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(permuted[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["xcomposer2", "xcomposer2-hd"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_trains_what_rows_train(tmp_path, family, attention):
    """Text, one image, several images; different orders in a pack: the same loss and gradients."""
    model = golden(family).model()
    model.config._attn_implementation = attention
    reader = model_reader(tmp_path, family)
    (expected_step, *_) = packed_steps(reader, packing=False, global_batch=14, per=2)
    expected, gradients = losses_and_gradients(model, expected_step)
    assert len(expected_step) == 7
    for num_ranks in (1, 3):
        (step, *_) = packed_steps(reader, num_ranks=num_ranks, global_batch=14)
        assert max(batch.num_samples for batch in step) > 2
        loss, packed_gradients = losses_and_gradients(model, step)
        assert loss == pytest.approx(expected, abs=1e-5)
        assert packed_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            scale = gradient.abs().max().clamp(min=1e-3)
            assert ((packed_gradients[name] - gradient).abs().max() / scale).item() < 1e-4, name


def test_a_poisoned_neighbour_does_not_leak(tmp_path):
    model = golden("xcomposer2").model()
    reader = model_reader(tmp_path, "xcomposer2")
    batch = max(packed_steps(reader, global_batch=14)[0], key=lambda batch: batch.num_samples)
    ids, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
    starts = (positions[0] == 0).nonzero()[:, 0].tolist()
    arguments = {key: batch.inputs[key] for key in ("im_mask", "position_ids", "pixel_values")}
    with torch.no_grad():
        clean = model(input_ids=ids, **arguments).logits
        for poisoned, (begin, end) in enumerate(itertools.pairwise([*starts, ids.shape[1]])):
            hook = model.model.tok_embeddings.register_forward_hook(
                lambda *call, begin=begin, end=end: call[2].index_fill(1, torch.arange(begin, end), torch.nan)
            )
            logits = model(input_ids=ids, **arguments).logits
            hook.remove()
            inside = torch.zeros(ids.shape[1], dtype=torch.bool)
            inside[begin:end] = True
            text = inside & ~batch.inputs["im_mask"][0]
            assert logits[0, text].isnan().all(), poisoned
            assert torch.equal(logits[0, ~inside], clean[0, ~inside]), "a NaN of one sample reached another"
