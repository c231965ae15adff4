"""`Pictures`: tokens from the size, and model inputs, equal those of transformers' own processors."""

import pickle
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.processor_cases import FAMILIES, NEEDS_NUM2WORDS, TILE, make_processor
from trainer.models.generic.pictures import SLOT, TEXT_INPUTS, Pictures

random_sizes = random.Random(0)
SIZES = [(random_sizes.randint(8, 400), random_sizes.randint(8, 400)) for _ in range(14)]
SIZES += [(28, 28), (300, 20), (16, 320), (3, 90), (700, 9), (1, 1)]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(family, transformers' processor, Pictures loaded from its files)"""
    if why := NEEDS_NUM2WORDS.get(request.param):
        pytest.skip(why)
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, make_processor(request.param, folder), Pictures(folder)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng([width, height, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def own(processor, images: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
    """What the processor gives for texts of nothing but pictures."""
    text = [processor.image_token * len(sample) for sample in images]
    return processor(text=text, images=images, return_tensors="pt", padding=True, add_special_tokens=False)


def vision(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}


def equal(ours: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == own.keys() and all(
        ours[name].dtype == own[name].dtype and torch.equal(ours[name], own[name]) for name in own
    )


def num_features(family: str, inputs: dict[str, torch.Tensor]) -> int | None:
    """Features that the model computes from a picture; None where it takes more than its shape."""
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:
        assert len(pixels) == inputs["image_grid_thw"].prod()
        return len(pixels) // 4
    if family == "llava_onevision":
        return None
    tiles = pixels.flatten(0, -4)
    assert tiles.shape[1:] == (3, TILE, TILE)
    return len(tiles) * 4


def test_tokens_follow_from_the_size(case):
    family, processor, pictures = case
    for size in SIZES:
        inputs = own(processor, [[photo(*size)]])
        ids = inputs["input_ids"][0].numpy()
        if family == "paligemma":  # adds what belongs to its prompt
            ids = ids[: list(ids).index(processor.tokenizer.bos_token_id)]
        tokens = pictures.tokens(*size)
        assert tokens.dtype == np.int64
        assert len(tokens) == pictures.num_tokens(*size)
        assert np.array_equal(np.where(tokens == SLOT, pictures.slot_id, tokens), ids), size
        assert pictures.slot_id not in tokens
        features = num_features(family, inputs)
        assert features is None or features == (tokens == SLOT).sum(), size


def test_pixels_are_the_processors_own(case):
    _, processor, pictures = case
    for size in SIZES:
        assert equal(pictures(photo(*size)), vision(own(processor, [[photo(*size)]]))), size


def test_a_batch_is_what_the_processor_gives_for_all(case):
    _, processor, pictures = case
    for start in range(0, len(SIZES), 5):
        images = [photo(*size) for size in SIZES[start : start + 5]]
        batch = pictures.batch([pictures(image) for image in images])
        assert equal(batch, vision(own(processor, [[image] for image in images])))


def test_a_batch_of_samples_with_several_pictures(case):
    family, processor, pictures = case
    if family in ("smolvlm", "idefics3"):
        pytest.skip(
            "its processor gives a row for each sample, and its model takes the tiles of all in order"
        )
    sizes = [SIZES[:1], SIZES[1:3], SIZES[3:4], SIZES[4:7]]
    samples = [[photo(*size) for size in sample] for sample in sizes]
    inputs = [pictures(image, num_images=len(sample)) for sample in samples for image in sample]
    expected = own(processor, samples)
    assert equal(pictures.batch(inputs), vision(expected))
    counts = [
        sum((pictures.tokens(*size, num_images=len(sample)) == SLOT).sum() for size in sample)
        for sample in sizes
    ]
    assert (expected["input_ids"] == pictures.slot_id).sum(1).tolist() == counts


def test_onevision_tells_a_picture_alone_from_one_of_several(tmp_path):
    make_processor("llava_onevision", tmp_path)
    pictures = Pictures(tmp_path)
    assert pictures.num_tokens(100, 100, num_images=3) == pictures.num_tokens(50, 90, num_images=2) == 5
    assert pictures.num_tokens(100, 100) > 30
    alone, several = pictures(photo(100, 100)), pictures(photo(100, 100), num_images=3)
    counts = pictures.batch([several, several, alone, several, several, several, alone, several])
    assert counts["batch_num_images"].tolist() == [2, 1, 3, 1, 2]
    with pytest.raises(ValueError, match="stands alone"):
        pictures.batch([alone, several, alone])


def test_the_dummy_is_valid_and_small(case):
    _, _, pictures = case
    dummy = pictures.dummy()
    real = pictures(photo(300, 300))
    assert dummy.keys() == real.keys()
    assert all(dummy[name].dtype == real[name].dtype for name in real)
    assert dummy["pixel_values"].numel() <= real["pixel_values"].numel()
    pictures.batch([dummy])["pixel_values"].zero_()
    assert pictures.dummy()["pixel_values"].any()


def test_workers_get_the_same(case):
    _, _, pictures = case
    pictures.tokens(90, 60)
    pictures.dummy()
    copied = pickle.loads(pickle.dumps(pictures))
    assert repr(copied) == repr(pictures)
    assert np.array_equal(copied.tokens(90, 60), pictures.tokens(90, 60))
    assert equal(copied(photo(90, 60)), pictures(photo(90, 60)))


def test_pixels_are_right_while_another_thread_computes_tokens(case):
    _, _, pictures = case
    image, stop = photo(200, 150), threading.Event()
    expected = pictures(image)

    def count():
        width = 10
        while not stop.is_set():
            pictures.tokens(width, 400)
            width += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        assert all(equal(pictures(image), expected) for _ in range(5))
    finally:
        stop.set()
        thread.join()


def test_tokens_take_no_pixels(case, monkeypatch):
    _, _, pictures = case
    expected = pictures.num_tokens(201, 99)
    fresh = pickle.loads(pickle.dumps(pictures))

    def fail(*args, **kwargs):
        raise AssertionError("an image was made")

    for name in ("new", "fromarray", "frombuffer"):
        monkeypatch.setattr(Image, name, fail)
    assert fresh.num_tokens(201, 99) == expected


def test_a_processor_that_needs_pixels_gets_a_blank_picture(case, monkeypatch):
    _, processor, pictures = case

    def fail(*args, **kwargs):
        raise TypeError("not an image")

    monkeypatch.setattr("trainer.models.generic.picture_shapes._ShapesAlone.rescale", fail)
    with_pixels = Pictures(processor)
    for size in SIZES[:3]:
        assert np.array_equal(with_pixels.tokens(*size), pictures.tokens(*size))


def test_smaller_limits_give_fewer_tokens(case):
    family, _, pictures = case
    if family in ("llava", "llava_onevision", "gemma3", "paligemma"):
        with pytest.raises(ValueError, match=r"ImageProcessorPil has no limit of a picture's tiles or size"):
            pictures.smaller()
        return
    smaller = pictures.smaller()
    limits = [int(limit.rpartition("=")[2]) for limit in smaller]
    each = [pictures, *smaller.values()]
    assert limits == sorted(limits, reverse=True)
    counts = [pictures.num_tokens(390, 190) for pictures in each]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] <= counts[0] / 2
    inputs = num_features(family, each[-1](photo(390, 190)))
    assert inputs == (each[-1].tokens(390, 190) == SLOT).sum()
    assert len({pictures.fingerprint for pictures in each}) == len(counts)
    assert smaller is pictures.smaller(), "they keep their counts of tokens"


def test_check_compares_size_and_pixels(case, monkeypatch):
    _, _, pictures = case
    pictures.check(photo(120, 80))
    monkeypatch.setattr(pictures, "_shapes", pictures.processor)
    monkeypatch.setattr(pictures, "_expansion", lambda width, height, count: "something else")
    with pytest.raises(ValueError, match="120×80"):
        pictures.check(photo(120, 80))


def test_a_size_that_the_model_cannot_take(tmp_path):
    make_processor("qwen2_5_vl", tmp_path)
    with pytest.raises(ValueError, match="a picture of 4000×1 pixels cannot be processed: absolute aspect"):
        Pictures(tmp_path).tokens(4000, 1)


def test_a_large_picture_costs_no_memory_of_its_size(tmp_path):
    make_processor("llava", tmp_path)
    assert Pictures(tmp_path).num_tokens(10**6, 10**6) == 4


def test_pictures_are_turned_and_put_on_white(tmp_path):
    make_processor("gemma3", tmp_path)
    viewed, stored = Pictures(tmp_path), Pictures(tmp_path, as_viewed=False)
    image = photo(60, 40).convert("RGBA")
    image.putalpha(0)
    image.getexif()[0x0112] = 6
    assert viewed.size(image) == viewed.rgb(image).size == (40, 60)
    assert stored.size(image) == stored.rgb(image).size == (60, 40)
    assert (np.asarray(viewed.rgb(image)) == 255).all()
    assert equal(viewed(image), viewed(viewed.rgb(image)))
    assert viewed.fingerprint != stored.fingerprint


def test_the_fingerprint_follows_settings_and_tokens(tmp_path):
    folder = tmp_path / "a"
    processor = make_processor("internvl", folder)
    first = Pictures(folder).fingerprint
    assert Pictures(folder).fingerprint == Pictures(processor).fingerprint == first
    changed = {first}
    for part, name, value in (
        (processor.image_processor, "max_patches", 3),
        (processor.image_processor, "image_mean", [0.1, 0.2, 0.3]),
        (processor, "image_seq_length", 9),
        (processor, "start_image_token", "A"),
    ):
        setattr(part, name, value)
        changed.add(Pictures(processor).fingerprint)
    assert len(changed) == 5


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="its files name no processor of transformers"):
        Pictures(tmp_path)
    make_processor("gemma3", tmp_path)
    settings: Path = tmp_path / "processor_config.json"
    text = settings.read_text()
    for own, torchvision_only, at_fault in (
        ("Gemma3ImageProcessor", "Llama4ImageProcessor", "Gemma3Processor"),
        ("Gemma3ImageProcessor", "Cohere2VisionImageProcessorFast", "Gemma3Processor"),
        ("Gemma3Processor", "PixtralProcessor", "PixtralProcessor"),
    ):
        settings.write_text(text.replace(own, torchvision_only))
        with pytest.raises(ValueError, match=f"{at_fault} cannot be loaded: it needs torchvision"):
            Pictures(tmp_path)


def test_a_processor_without_the_package_that_it_insists_on_names_the_extra(tmp_path, monkeypatch):
    make_processor("idefics3", tmp_path)
    settings = tmp_path / "processor_config.json"
    settings.write_text(settings.read_text().replace("Idefics3Processor", "SmolVLMProcessor"))
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(
        ValueError, match=r"SmolVLMProcessor cannot be loaded: it needs num2words: pip .*smolvlm"
    ):
        Pictures(tmp_path)


def test_the_models_config_names_the_slot(tmp_path):
    processor = make_processor("gemma3", tmp_path)
    assert Pictures(tmp_path).slot_id == processor.tokenizer.image_token_id != processor.image_token_id
    (tmp_path / "config.json").write_text('{"model_type": "gemma3", "image_token_index": 0}')
    with pytest.raises(ValueError, match="gives a picture no"):
        Pictures(tmp_path)
