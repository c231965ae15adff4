"""High-resolution models (4KHD, 2.5) end to end: tiles, unequal images, long samples, every command."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from data import check, preview
from data.easy_vqa import write_demo_data
from data.errors import DataError
from data.lengths import bad_samples, measure_lengths
from data.loader import SampleReader, StepLoader
from data.mixture import read_mixture
from data.packing import Packing
from data.sampler import StepSampler
from data.tokens import SampleEncoder
from tests.model_cases import golden, golden_folder
from tests.tiny import flags, read_metrics, run_ranks, tiny_model
from trainer import export, generate
from trainer.config import Config
from trainer.distributed import device_mesh, start
from trainer.generate import load_model
from trainer.main import main
from trainer.models import build_model, load_config, load_conversation, load_image_processor, parts_of
from trainer.models.xcomposer2.demo_base import make_base
from trainer.parallelize import parallelize
from trainer.weights import load_weights

TILE = 56  # 4 × 4 patches, merged 2 × 2: an image of h by w tiles has 4 (h w + 1) + 1 + 2 (h + 1) slots


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return golden_folder("xcomposer2-hd", tmp_path_factory.mktemp("hd") / "model")


# --- a few tiles at a time ------------------------------------------------------------------------------


def inputs(tiles: list[tuple[int, int]], seed: int) -> dict:
    """A packed row of one sample, with an image for each (rows, columns); without any, a dummy image."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(3, h * TILE, w * TILE, generator=generator) for h, w in tiles]
    slots = sum(4 * (h * w + 1) + 1 + 2 * (h + 1) for h, w in tiles)
    ids = torch.randint(3, 300, (1, slots + 9), generator=generator)
    im_mask = torch.zeros_like(ids, dtype=torch.bool)
    im_mask[:, 2 : 2 + slots] = True
    labels = ids.masked_fill(im_mask, -100)
    labels[:, :2] = -100
    return {
        "input_ids": ids,
        "im_mask": im_mask,
        "labels": labels,
        "position_ids": torch.arange(ids.shape[1])[None],
        "pixel_values": images or [torch.zeros(3, TILE, TILE)],
    }


def gradients(
    folder: Path, batches: list[dict], fix_vit: bool, runs: dict[Path, tuple[int | None, bool]]
) -> int:
    """The gradients of the sum of all ranks' losses, `batches[rank]` each; rank 0 writes them.

    runs: file to write → tiles at a time, and whether activations are checkpointed.
    """
    ranks = start()
    mesh = device_mesh(ranks)
    for out, (bound, checkpointing) in runs.items():
        config = load_config(folder)
        config.plora_dropout = 0.0
        with torch.device("meta"):
            model = build_model(config)
        parts = parts_of(model.config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (fix_vit and name.startswith(parts.vision)))
        chosen = Config(bf16=False, gradient_checkpointing=checkpointing, vision_micro_batch=bound)
        model = parallelize(model, mesh, parts, chosen)
        model.to_empty(device="cpu")
        load_weights(model, folder)
        model.init_buffers()
        seen = []  # what a block really computes at once
        mlp = model.get_submodule(parts.vision_blocks)[0].mlp
        mlp.register_forward_hook(lambda module, args, output, seen=seen: seen.append(len(args[0])))
        loss = model(**batches[ranks.rank], num_items_in_batch=10).loss
        loss.backward()
        assert max(seen) <= (bound or 1000)
        result = {"loss": loss.detach()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert isinstance(parameter.grad, DTensor)
                result[name] = parameter.grad.full_tensor()
        if ranks.rank == 0:
            save_file(result, out)
    return 0


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], without: tuple[str, ...] = ()) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # k_proj's bias shifts every score of a query alike: its true gradient is zero.
        if name not in without and not name.endswith("k_proj.bias"):
            difference = (ours[name] - tensor).norm() / tensor.norm().clamp(min=1e-3)
            assert difference < 1e-6, f"{name}: {difference}"


@pytest.mark.parametrize("fix_vit", [False, True])
def test_any_number_of_tiles_at_a_time_gives_the_same_loss_and_gradients(model, tmp_path, fix_vit):
    batch = [inputs([(2, 2), (1, 3), (1, 1)], seed=0)]  # 5 + 4 + 2 tiles with the global views
    ways = [(None, False), *itertools.product((1, 3, 11), (False, True))]
    runs = {tmp_path / str(number): way for number, way in enumerate(ways)}
    run_ranks(1, gradients, model, batch, fix_vit, runs)
    expected, *others = map(load_file, runs)
    assert any(name.startswith("vit.") for name in expected) == (not fix_vit)
    for other in others:
        assert_same(other, expected)


def test_forty_tiles_beside_a_rank_without_an_image_neither_hang_nor_change_gradients(model, tmp_path):
    batches = [inputs([], seed=1), inputs([(3, 4), (4, 3), (1, 11), (1, 1)], seed=2)]  # 13 + 13 + 12 + 2
    both = {tmp_path / "kept": (4, False), tmp_path / "checkpointed": (4, True)}
    run_ranks(2, gradients, model, batches, False, both, timeout=60)
    for i, batch in enumerate(batches):
        run_ranks(1, gradients, model, [batch], False, {tmp_path / f"rank{i}": (None, False)})
    alone = [load_file(tmp_path / f"rank{i}") for i in range(2)]
    expected = {name: alone[0][name] + alone[1][name] for name in alone[1]}
    for out in both:
        assert_same(load_file(out), expected, without=("loss",))


# --- samples that are too long --------------------------------------------------------------------------


def write_data(folder: Path, sizes: dict[str, list[tuple[int, int]]]) -> Path:
    """A JSON file of a record each: its id, and the (width, height) of its images."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for name, images in sizes.items():
        paths = [f"{name}-{i}.png" for i in range(len(images))]
        for path, size in zip(paths, images, strict=True):
            Image.new("RGB", size, "red").save(folder / path)
        # The convention of 2.5: nothing for a single image, a numbered place for each of several.
        places = "".join(f"Image{i + 1} <ImageHere>; " for i in range(len(images))) if len(images) > 1 else ""
        turns = [
            {"from": "human", "value": f"{places}what colour is it?"},
            {"from": "bot", "value": "it is red."},
        ]
        records.append({"id": name, "image": paths, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


SIZES = {
    "small": [(40, 40)],
    "square": [(220, 220)],
    "two": [(300, 200), (200, 300)],
    "text": [],
    "wide": [(900, 90)],
}


def reader_of(folder: Path, data: Path, max_length: int, hd_num: int = 16, **options) -> SampleReader:
    return SampleReader(
        read_mixture(data, show_progress=False),
        SampleEncoder(load_conversation(folder), max_length),
        load_image_processor(load_config(folder, hd_num=hd_num)),
        **options,
    )


def steps_of(reader: SampleReader, packing: bool, num_workers: int = 0, on_bad_sample="error") -> list:
    lengths = measure_lengths(reader, num_workers=0, show_progress=False)
    loader = StepLoader(
        reader,
        StepSampler(reader.sources, seed=0, global_batch=5),
        rank=0,
        num_ranks=1,
        samples_per_micro_batch=2,
        num_steps=1,
        num_workers=num_workers,
        on_bad_sample=on_bad_sample,
        packing=Packing(lengths, reader.encoder.max_length) if packing else None,
    )
    return next(iter(loader))


def test_the_text_rules_of_2_5(model, tmp_path):
    reader = reader_of(model, write_data(tmp_path, SIZES), max_length=1000)
    small, images = reader.read(0, 0)
    slots = reader.image_processor.num_tokens(40, 40)
    assert slots == 4 * 5 + 1 + 2 * 3
    assert small.im_mask[:slots].all()
    assert small.input_ids[slots] == 1  # an image without a placeholder stands before <s>
    assert [image.shape for image in images] == [(3, 2 * TILE, 2 * TILE)]
    two, images = reader.read(0, 2)
    assert two.image_tokens == [reader.image_processor.num_tokens(*size) for size in SIZES["two"]]
    assert images[0].shape == images[1].mT.shape
    assert small.num_supervised == two.num_supervised == 8  # "it is red ." with spaces, and two ends


@pytest.mark.parametrize("packing", [False, True])
def test_images_are_made_to_fit_by_the_largest_hd_num_that_does(model, tmp_path, packing, caplog):
    data = write_data(tmp_path, SIZES)
    whole = [reader_of(model, data, 1000).read(0, i)[0] for i in range(5)]
    longest = max(len(sample.input_ids) for sample in whole)
    reader = reader_of(model, data, max_length=80, fit_images=True)
    for index, (name, sample) in enumerate(zip(SIZES, whole, strict=True)):
        fitted, images = reader.read(0, index)
        assert not fitted.is_cut
        assert fitted.num_supervised == 8
        assert [tokens_of(image) for image in images] == fitted.image_tokens
        assert (fitted.image_limit is None) == (len(sample.input_ids) <= 80), name
        if fitted.image_limit is not None:
            assert len(fitted.input_ids) <= 80
            hd_num = int(fitted.image_limit.removeprefix("hd_num="))
            looser = reader_of(model, data, max_length=1000, hd_num=hd_num + 1)
            assert len(looser.read(0, index)[0].input_ids) > 80, "one tile more would have fitted as well"
    assert longest > 80
    lengths = measure_lengths(reader, num_workers=0, show_progress=False)[0]
    step = steps_of(reader, packing)
    assert sum(batch.num_tokens for batch in step) == lengths[:, 0].sum()
    assert sum(batch.num_supervised for batch in step) == 40
    shrunk = [what for batch in step for _, what in batch.shrunk]
    assert len(shrunk) == sum(len(sample.input_ids) > 80 for sample in whole)
    assert all(f"made to fit: {what}" in caplog.text for what in shrunk)
    assert any("(id 'two') takes its images at hd_num=" in what for what in shrunk)


def tokens_of(image: Tensor) -> int:
    h, w = image.shape[1] // TILE, image.shape[2] // TILE
    return 4 * (h * w + 1) + 1 + 2 * (h + 1)


@pytest.mark.parametrize("packing", [False, True])
def test_a_long_sample_is_cut_left_out_or_refused_by_choice(model, tmp_path, packing, caplog):
    data = write_data(tmp_path, SIZES)
    whole = [reader_of(model, data, 1000).read(0, i)[0] for i in range(5)]
    lengths = [len(sample.input_ids) for sample in whole]
    max_length = lengths[1] - 2  # the end of "square" is cut, but not all of its answer
    long = [name for name, length in zip(SIZES, lengths, strict=True) if length > max_length]
    assert "square" in long
    assert "small" not in long

    cut = steps_of(reader_of(model, data, max_length), packing)
    assert max(batch.inputs["input_ids"].shape[1] for batch in cut) <= max_length
    assert sum(batch.num_supervised for batch in cut) % 8, "nothing of square's answer was cut"

    skipping = reader_of(model, data, max_length, on_long_sample="skip")
    step = steps_of(skipping, packing)
    left_out = [what for batch in step for _, what in batch.unsupervised]
    assert len(left_out) == len(long)
    assert all(f"(id '{name}') is longer than max_length={max_length}" in caplog.text for name in long)
    assert sum(batch.num_samples for batch in step) == 5 - len(long)

    refusing = reader_of(model, data, max_length, on_long_sample="error")
    problems = bad_samples(refusing, measure_lengths(refusing, num_workers=0, show_progress=False))
    assert len(problems) == len(long)
    named = f"(id 'square') has {lengths[1]} tokens, over max_length={max_length}"
    assert any(named in problem for problem in problems)
    with pytest.raises(DataError, match="over max_length"):
        steps_of(refusing, packing=False)


def test_what_does_not_fit_even_with_one_tile_goes_the_chosen_way(model, tmp_path):
    data = write_data(tmp_path, {"two": SIZES["two"]})
    fitting = reader_of(model, data, max_length=40, fit_images=True, on_long_sample="error")
    with pytest.raises(DataError, match=r"\(id 'two'\) has \d+ tokens, over max_length=40"):
        fitting.read(0, 0)
    fitting.on_long_sample = "skip"
    assert fitting.read(0, 0)[0].num_supervised == 0


def test_a_question_that_is_too_long_takes_its_images_smaller_and_is_never_cut(model, tmp_path):
    data = write_data(tmp_path, SIZES)
    with pytest.raises(DataError, match=r"\(id 'square'\) the question is longer than max_length=60"):
        reader_of(model, data, max_length=60).read_prompt(0, 1)
    reader = reader_of(model, data, max_length=60, fit_images=True)
    _, prompt, (image,) = reader.read_prompt(0, 1)
    assert len(prompt.input_ids) <= 60
    assert prompt.num_image_slots == build_model(load_config(model)).vit.num_tokens(*image.shape[1:])
    _, whole, _ = reader_of(model, data, max_length=1000, hd_num=4).read_prompt(0, 1)
    assert len(whole.input_ids) == len(prompt.input_ids), "the largest that fits has 2 × 2 tiles"
    with pytest.raises(DataError, match=r"\(id 'two'\) the question is longer than max_length=40"):
        reader_of(model, data, max_length=40, fit_images=True).read_prompt(0, 2)


EXTREME = {"line": [(5000, 1)], "post": [(1, 5000)], "dot": [(1, 1)], "all": [(5000, 1), (1, 1), (1, 5000)]}


@pytest.mark.parametrize("hd_num", [1, 16])
def test_the_strangest_shapes_pass_through_worker_and_model(model, tmp_path, hd_num):
    data = write_data(tmp_path, {**EXTREME, "text": []})
    reader = reader_of(model, data, 1000, hd_num)
    step = steps_of(reader, packing=True, num_workers=1)
    lengths = measure_lengths(reader, num_workers=0, show_progress=False)[0]
    assert sum(batch.num_tokens for batch in step) == lengths[:, 0].sum()
    net = golden("xcomposer2-hd").model()
    for batch in step:
        with torch.no_grad():
            assert net(**batch.inputs).loss.isfinite()


# --- every command --------------------------------------------------------------------------------------

# Names as those of the published 2.5's task adapters, which are no part of the base model.
EXTRA = {
    "model.layers.0.attention.wqkv.lora_web_A.weight": torch.arange(6.0).view(2, 3),
    "model.layers.1.feed_forward.w2.lora_sft_B.weight": torch.ones(3, 2, dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with weights that nobody knows, data with samples over max_length, and two runs on it."""
    folder = tmp_path_factory.mktemp("commands")
    golden_folder("xcomposer2-hd", folder / "base")
    weights = {**load_file(folder / "base/model.safetensors"), **EXTRA}
    save_file(weights, folder / "base/model.safetensors", metadata={"format": "pt"})
    write_data(folder / "data", {**SIZES, **EXTREME})
    options = {"max_length": 80, "fit_images": True, "on_long_sample": "skip", "hd_num": 16}
    options |= {"vision_micro_batch": 3, "per_device_train_batch_size": 4, "max_steps": 3}
    options |= {"model_name_or_path": folder / "base", "data_path": folder / "data/data.json"}
    options |= {"dataloader_num_workers": 1, "plora_dropout": None}
    run_ranks(2, main, flags(folder, "full", **options, fix_vit=False))
    run_ranks(2, main, flags(folder, "lora", **options, use_lora=True, lora_r=4))
    return folder


def test_full_training_moves_every_part_and_carries_unknown_weights(world):
    before, after = load_file(world / "base/model.safetensors"), load_file(world / "full/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in EXTRA.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    unused = {name for name in before if "post_layernorm" in name}
    assert moved == before.keys() - EXTRA.keys() - unused
    assert read_metrics(world / "full")[0]["samples"] == 8


@pytest.mark.parametrize("run", ["full", "lora"])
def test_the_trained_model_answers_about_images_of_any_size(world, run, capsys):
    out = world / f"{run}.jsonl"
    argv = ["--model_name_or_path", world / run, "--data_path", world / "data/data.json", "--output", out]
    argv += ["--hd_num", 4, "--max_new_tokens", 3, "--batch_size", 3, "--bf16", "False"]
    run_ranks(1, generate.main, [str(word) for word in argv])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [*SIZES, *EXTREME]
    assert all(isinstance(row["prediction"], str) for row in rows)
    argv += ["--fit_images", "True", "--max_length", 80, "--hd_num", 16]
    answers = []
    for tiles in ("none", 1):
        run_ranks(1, generate.main, [str(word) for word in [*argv, "--vision_micro_batch", tiles]])
        answers.append(out.read_text())
    assert answers[0] == answers[1]


def test_merging_and_modernising_give_models_of_the_same_answers(world):
    assert export.main(["--merge", f"{world}/lora", f"{world}/merged"]) == 0
    assert export.main(["--modernise", f"{world}/base", f"{world}/modern"]) == 0
    merged = load_file(world / "merged/model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in EXTRA.items())
    batch = golden("xcomposer2-hd").inputs("two_images_multi_turn")
    adapted = load_model(world / "lora", None, torch.float32)[0]
    logits = {
        "adapter": adapted(**batch).logits,
        "merged": load_model(world / "merged", None, torch.float32)[0](**batch).logits,
        "base": load_model(world / "base", None, torch.float32)[0](**batch).logits,
        "modern": load_model(world / "modern", None, torch.float32)[0](**batch).logits,
    }
    torch.testing.assert_close(logits["merged"], logits["adapter"], rtol=0, atol=1e-5)
    assert torch.equal(logits["modern"], logits["base"])
    assert not torch.allclose(logits["merged"], logits["base"], atol=1e-3)


def test_check_and_preview_know_what_the_training_will_see(world, capsys):
    argv = [f"{world}/data/data.json", "--model_name_or_path", f"{world}/base", "--hd_num", "16"]
    argv += ["--max_length", "80", "--num_workers", "0"]
    assert check.main([*argv, "--fit_images", "True", "--out", f"{world}/fit.json"]) == 0
    report = json.loads((world / "fit.json").read_text())
    assert report["sources"][0]["tokens"]["longest"] <= 80
    assert any("(id 'two') has hd_num=" in line for line in report["warnings"]["images made to fit"])
    assert check.main([*argv, "--on_long_sample", "error", "--out", f"{world}/error.json"]) == 2
    assert any(
        "over max_length=80" in line for line in json.loads((world / "error.json").read_text())["errors"]
    )
    assert preview.main([*argv, "--fit_images", "True", "--out", f"{world}/preview.html"]) == 0
    page = (world / "preview.html").read_text()
    assert page.count("<img ") == sum(len(images) for images in {**SIZES, **EXTREME}.values())


def test_fitting_images_to_a_model_of_one_size_is_refused(world, tmp_path):
    tiny_model(tmp_path / "square")
    data = world / "data/data.json"
    argv = flags(tmp_path, "out", model_name_or_path=tmp_path / "square", data_path=data, fit_images=True)
    (output,) = run_ranks(1, main, argv, status=2)
    assert "--fit_images: this model resizes every image to the same square" in output
    argv = [f"{data}", "--model_name_or_path", f"{tmp_path}/square", "--fit_images", "True"]
    assert check.main([*argv, "--out", f"{tmp_path}/report.json"]) == 2
    assert "--fit_images: this model" in (tmp_path / "report.json").read_text()


def test_the_demo_has_a_high_resolution_flavour(tmp_path):
    pytest.importorskip("easy_vqa", reason="the demo's pictures: pip install -e '.[demo]'")
    write_demo_data(tmp_path / "data", num_images=30, unequal=True)
    make_base(tmp_path / "base", ["what color is the shape?", "blue"], seed=0, high_resolution=True)
    reader = reader_of(tmp_path / "base", tmp_path / "data/open.json", 100, hd_num=4)
    shapes = {tuple(reader.read(0, index)[1][0].shape[1:]) for index in range(40)}
    assert shapes >= {(64, 64), (32, 64), (64, 32)}
