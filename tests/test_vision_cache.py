"""A frozen tower's features, kept on disk: the same training, whoever computed them and wherever they are.

A feature that was read is the one that was computed, bit for bit. What may differ is which images the tower
ran on together when it was computed: on the CPU that changes no bit, so losses are compared exactly.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from data.features import FeatureFolder, folder_bytes, read_features, write_features
from data.images import open_image
from tests.test_high_resolution import SIZES, hd_model, write_data
from tests.test_resume import main_stopped_after
from tests.tiny import free_port, read_metrics, run_ranks, tiny_data, tiny_model
from trainer.main import main
from trainer.models import load_config, load_image_processor
from trainer.models.xcomposer2.vision_xcomposer2 import VisionEncoder

COMPARED = ("loss", "grad_norm", "samples", "tokens", "loss_by_source", "model_flops_language")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    tiny_model(folder / "square")
    tiny_data(folder / "data", samples=16, image_sizes=(40, 90))
    hd_model(folder / "tiles")
    write_data(folder / "tiled", {f"{name}{i}": sizes for i in range(3) for name, sizes in SIZES.items()})
    (folder / "data" / "rare.txt").write_text("text.json\ncolour.json 0.001\n")
    return folder


def counting_main(argv: list[str]) -> int:
    """The run, which prints on how many images its tower ran."""
    computed, tower_outputs = [], VisionEncoder.tower_outputs

    def counted(self: VisionEncoder, images: torch.Tensor | list[torch.Tensor]) -> list:
        computed.append(len(images))
        return tower_outputs(self, images)

    VisionEncoder.tower_outputs = counted
    status = main(argv)
    print(f"\nthe tower ran {len(computed)} times")
    return status


def flags(
    world: Path, name: str, model: str = "square", data: str = "data/data.txt", *more: str
) -> list[str]:
    words = f"""
        --model_name_or_path {world}/{model} --data_path {world}/{data} --output_dir {world}/{name}
        --bf16 False --learning_rate 1e-3 --max_steps 10 --max_length 700 --per_device_train_batch_size 2
        --gradient_accumulation_steps 2 --dataloader_num_workers 1 --save_strategy no --rehearse False
    """
    return [*words.split(), *more]


def assert_same(world: Path, name: str, other: str) -> None:
    for a, b in zip(read_metrics(world / name), read_metrics(world / other), strict=True):
        assert [a[key] for key in COMPARED] == [b[key] for key in COMPARED]
    (file,) = (world / name).glob("*model.safetensors")
    ours, theirs = load_file(file), load_file(world / other / file.name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert ours.keys() == theirs.keys()


def images_of(output_dir: Path) -> tuple[int, int]:
    lines = read_metrics(output_dir)
    return sum(line["images"] for line in lines), sum(line["images_from_cache"] for line in lines)


LORA = ("--use_lora", "True", "--lora_r", "4")
FAST = ("--reshard_after_forward", "False", "--forward_prefetch", "True", "--time_phases_every", "5")
CASES = {
    "square": (1, "square", "data/data.txt", ("--packing", "False")),
    "square, packed, 2 ranks": (2, "square", "data/data.txt", FAST),
    "tiles, adapters": (1, "tiles", "tiled/data.json", (*LORA, "--verify_adapter", "True")),
    "tiles, fitted, 2 ranks": (2, "tiles", "tiled/data.json", ("--max_length", "80", "--fit_images", "True")),
    "bfloat16, 2 ranks": (2, "square", "data/data.txt", ("--bf16", "True", "--dataloader_num_workers", "0")),
    "adapters, base whole, 2 ranks": (2, "square", "data/data.txt", (*LORA, "--sharding", "none")),
}


@pytest.mark.parametrize("case", CASES)
def test_filling_and_reading_train_as_without(world, case):
    ranks, model, data, more = CASES[case]
    name = case.replace(", ", "-").replace(" ", "-")
    keep = ("--cache_vision_features", f"{world}/features-{name}")
    run_ranks(ranks, main, flags(world, f"{name}-plain", model, data, *more))
    output = run_ranks(ranks, main, flags(world, f"{name}-filling", model, data, *more, *keep))[0]
    assert_same(world, f"{name}-filling", f"{name}-plain")
    images, known = images_of(world / f"{name}-filling")
    assert 0 < known < images
    assert f"{known:,} of {images:,} images" in output
    outputs = run_ranks(ranks, counting_main, flags(world, f"{name}-reading", model, data, *more, *keep))
    assert_same(world, f"{name}-reading", f"{name}-plain")
    assert images_of(world / f"{name}-reading") == (images, images)
    assert all("the tower ran 0 times" in output for output in outputs)
    plain, reading = (read_metrics(world / f"{name}-{run}")[0] for run in ("plain", "reading"))
    assert "images" not in plain
    assert 0 < reading["model_flops_vision"] < plain["model_flops_vision"]


def test_ranks_with_everything_known_wait_for_none_and_no_rank_for_them(world):
    """Of 4 ranks some know all images of a micro-batch, some none, some have none."""
    keep = ("--cache_vision_features", f"{world}/features-uneven", "--gradient_accumulation_steps", "1")
    for data in ("data/data.txt", "data/rare.txt"):
        run_ranks(4, main, flags(world, f"{data[5:9]}-plain", "square", data, *keep[2:]))
    run_ranks(4, main, flags(world, "uneven-1", "square", "data/data.txt", *keep))
    files = sorted((world / "features-uneven").rglob("*.safetensors"))
    assert len(files) == 6
    for file in files[::2]:
        file.unlink()
    run_ranks(4, main, flags(world, "uneven-2", "square", "data/data.txt", *keep))
    assert_same(world, "uneven-2", "data-plain")
    images, known = images_of(world / "uneven-2")
    assert 0 < known < images
    for name in ("rare-1", "rare-2"):
        run_ranks(4, main, flags(world, name, "square", "data/rare.txt", *keep))
        assert_same(world, name, "rare-plain")


def alone(world: Path) -> int:
    """One of several jobs of a single process each."""
    number = os.environ["RANK"]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_PORT=str(free_port()))
    model = ("tiles", "tiled/data.json") if number == "3" else ("square", "data/data.txt")
    return main(flags(world, f"job-{number}", *model, "--cache_vision_features", f"{world}/features-jobs"))


def test_jobs_that_fill_one_folder_at_once_train_as_alone(world):
    run_ranks(4, alone, world)
    run_ranks(1, main, flags(world, "job-plain"))
    run_ranks(1, main, flags(world, "job-plain-tiles", "tiles", "tiled/data.json"))
    for number in range(3):
        assert_same(world, f"job-{number}", "job-plain")
    assert_same(world, "job-3", "job-plain-tiles")
    towers = list((world / "features-jobs").iterdir())
    assert len(towers) == 2
    assert not list((world / "features-jobs").rglob(".*")), "half-written files are left"
    assert all(read_features(file) for tower in towers for file in tower.rglob("*.safetensors"))


def damage_file(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[-1] ^= 1
    elif how == "flipped in the header":
        place = content.index(b'"rows":"') + len('"rows":"')
        content[place] ^= 1
    elif how == "of another format":
        content = bytearray(save({"other": torch.zeros(3)}))
    file.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(how, len(content))])


@pytest.mark.parametrize("how", ["flipped", "flipped in the header", "cut", "empty", "of another format"])
def test_a_damaged_file_is_named_and_made_again(tmp_path, caplog, how):
    file = tmp_path / "a" / "b.safetensors"
    patches = torch.randn(3, 4, 8, dtype=torch.bfloat16)
    assert read_features(file) is None
    assert not caplog.text
    assert write_features(file, patches, 2)
    found, rows = read_features(file)
    assert torch.equal(found, patches)
    assert rows == 2
    damage_file(file, how)
    assert read_features(file) is None
    assert f"{file} is damaged" in caplog.text
    assert not file.exists()


def test_a_run_on_damaged_files_is_the_run(world):
    keep = ("--cache_vision_features", f"{world}/features-damaged")
    run_ranks(1, main, flags(world, "whole", "square", "data/data.txt", *keep))
    files = list((world / "features-damaged").rglob("*.safetensors"))
    for file in files[:3]:
        damage_file(file, "flipped")
    (output,) = run_ranks(1, main, flags(world, "damaged", "square", "data/data.txt", *keep))
    assert_same(world, "damaged", "whole")
    assert output.count("is damaged and will be made again") >= 3
    assert all(read_features(file) for file in files)


def test_the_folder_keeps_its_bound(world):
    keep = ("--cache_vision_features", f"{world}/features-small", "--cache_vision_gigabytes", "1e-5")
    run_ranks(2, main, flags(world, "small", "square", "data/data.txt", *keep))
    run_ranks(2, main, flags(world, "small-again", "square", "data/data.txt", *keep))
    run_ranks(2, main, flags(world, "unbounded"))
    assert_same(world, "small", "unbounded")
    assert_same(world, "small-again", "unbounded")
    files = list((world / "features-small").rglob("*.safetensors"))
    assert 0 < len(files) < 6
    assert sum(load_file(file)["patches"].nbytes for file in files) <= 1e4


def test_a_folder_that_cannot_be_written_costs_a_warning(world):
    (world / "features-file").mkdir()
    keep = ("--cache_vision_features", f"{world}/features-file/x")
    run_ranks(1, main, flags(world, "writable", "square", "data/data.txt", *keep))
    (tower,) = (world / "features-file/x").iterdir()
    shutil.rmtree(tower)
    tower.write_text("a file where a folder should be")
    (output,) = run_ranks(1, main, flags(world, "unwritable", "square", "data/data.txt", *keep))
    assert_same(world, "unwritable", "writable")
    assert output.count("cannot be written: no more features are kept") == 1


def test_stopping_and_going_on_changes_no_bit(world):
    keep = ("--cache_vision_features", f"{world}/features-resume", "--rehearse", "True")
    run_ranks(2, main, flags(world, "straight"))
    argv = flags(world, "resumed", "square", "data/data.txt", *keep)
    run_ranks(2, main_stopped_after, 4, None, argv, status=75)
    run_ranks(2, main, argv)
    assert_same(world, "resumed", "straight")


def test_a_full_and_a_lora_training_of_one_base_share_features_and_other_towers_do_not(world):
    keep = ("--cache_vision_features", f"{world}/features-shared", "--max_steps", "6")
    tiny_model(world / "half", dtype=torch.bfloat16)
    run_ranks(1, main, flags(world, "sharing", "half", "data/data.txt", "--bf16", "True", *keep))
    run_ranks(2, main, flags(world, "sharing-lora", "half", "data/data.txt", "--bf16", "True", *LORA, *keep))
    images, known = images_of(world / "sharing-lora")
    assert images == known > 0
    run_ranks(1, main, flags(world, "float32", "half", "data/data.txt", *keep))
    run_ranks(1, main, flags(world, "other-size", "half", "data/data.txt", "--img_size", "56", *keep))
    assert len(list((world / "features-shared").iterdir())) == 3


def test_a_picture_s_features_are_known_by_its_content_and_what_is_done_to_it(world, tmp_path):
    folder = FeatureFolder(tmp_path / "features", "tower")
    processor = load_image_processor(load_config(world / "tiles"), 4)
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    Image.new("RGB", (300, 200), (254, 0, 0)).save(tmp_path / "other.png")

    def load(name: str, tower=folder, processor=processor, as_viewed=False):
        with open_image(tmp_path / name) as image:
            return tower.load(image, processor, as_viewed)

    first = load("a.png")
    assert first.output is None
    assert first.pixels.shape[0] == 3
    assert write_features(first.file, torch.ones(2, 16, 8), 1)
    again = load("copy.png")
    assert again.pixels is None
    assert torch.equal(again.output[0], torch.ones(2, 16, 8))
    unknown = [
        load("other.png"),
        load("a.png", processor=processor.smaller()[0]),
        load("a.png", as_viewed=True),
        load("a.png", tower=FeatureFolder(tmp_path / "features", "other")),
    ]
    assert len({first.file, *(picture.file for picture in unknown)}) == 5
    assert all(picture.output is None for picture in unknown)
    assert folder_bytes(tmp_path / "features") == first.file.stat().st_size


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fix_vit", "False"], "--cache_vision_features needs --fix_vit True"),
        (["--train_modules", "pre_layrnorm"], "needs a frozen vision tower, and 2 parameters of it train"),
        (
            [*LORA, "--lora_target_modules", "fc1"],
            "needs a frozen vision tower, and 4 parameters of it train",
        ),
    ],
)
def test_a_tower_that_trains_is_refused(world, tmp_path, more, message):
    argv = flags(world, f"refused-{tmp_path.name}", "square", "data/data.txt")
    argv += ["--cache_vision_features", str(tmp_path / "features"), *more]
    (output,) = run_ranks(1, main, argv, status=2)
    assert message in output
    assert json.dumps(output).count("error: ") == 1
    assert not (tmp_path / "features").exists()
