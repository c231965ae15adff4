"""Families that neither the trainer nor its other tests name, trained as a user would: by their folders.

LLaVA-NeXT packs a picture's tiles into one grid with line ends; Ovis2 has a vocabulary of its own for
pictures, and tokens around each tile. Neither needs a line of the trainer.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from tests.processor_cases import TILE, image_processor, make_tokenizer
from tests.test_transformers_models import first_loss_by_transformers, losses, plain_model, train
from tests.tiny import tiny_data
from tests.tiny_models import CHAT_TEMPLATE
from tests.vlm_cases import TEXT, TOWER
from trainer.models.generic.answers import ANSWERS
from trainer.models.generic.modeling import build, prepare_for_training

SIDES = (TILE, 2 * TILE, 3 * TILE)
PINPOINTS = [[height, width] for height in SIDES for width in SIDES]


def llava_next() -> tuple[Any, dict[str, Any]]:
    """Its processor, and the settings of its model."""
    square = {"height": TILE, "width": TILE}
    tiles = image_processor(
        "LlavaNext", size={"shortest_edge": TILE}, crop_size=square, image_grid_pinpoints=PINPOINTS
    )
    tokenizer = make_tokenizer(["<image>"])
    options = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    tower = TOWER | {"model_type": "clip_vision_model", "num_hidden_layers": 3}
    return transformers.LlavaNextProcessor(tiles, tokenizer, **options), {
        "vision_config": tower | {"patch_size": 14, "image_size": TILE},
        "text_config": TEXT | {"model_type": "llama", "vocab_size": len(tokenizer)},
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_grid_pinpoints": PINPOINTS,
    }


def ovis2() -> tuple[Any, dict[str, Any]]:
    indicators = [f"<IMG_{name}>" for name in ("START", "GRID", "COL", "ROW", "END")]
    tokenizer = make_tokenizer(["<image>", "<IMG_ATOM>", *indicators])
    tiles = image_processor("Ovis2", size={"height": TILE, "width": TILE}, max_patches=4)
    tower = {**TOWER, "patch_size": 14, "image_size": TILE, "vocab_size": 40}
    return transformers.Ovis2Processor(tiles, tokenizer, image_seq_length=4), {
        "vision_config": {**tower, "hidden_stride": 1, "num_visual_indicator_tokens": 5},
        "text_config": TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer)},
        "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        "visual_indicator_token_ids": tokenizer.convert_tokens_to_ids(indicators),
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "tie_word_embeddings": False,
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", [llava_next, ovis2])
def test_a_family_that_nothing_names_trains_to_transformers_losses_on_any_ranks_and_loads(family, tmp_path):
    name, folder = family.__name__, tmp_path / "model"
    assert name not in ANSWERS
    processor, settings = family()
    processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("IMAGE", "<image>"))
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**settings)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tiny_data(tmp_path / "data")

    run = train(tmp_path, "one")
    found = losses(run)
    assert found[0] == pytest.approx(first_loss_by_transformers(tmp_path), rel=1e-5)
    assert losses(train(tmp_path, "two", ranks=2)) == pytest.approx(found, rel=1e-5)
    assert losses(train(tmp_path, "padded", packing=False)) == pytest.approx(found, rel=1e-5)
    plain_model(run)
    assert load_file(run / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert (
        json.loads((run / "processor_config.json").read_text())["processor_class"] == type(processor).__name__
    )
    adapted = train(tmp_path, "adapter", ranks=2, use_lora=True, lora_r=4)
    assert Path(adapted / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        (
            "mllama",
            {
                "vision_config": {"num_hidden_layers": 2, "num_global_layers": 1, "max_num_tiles": 4},
                "text_config": {"num_hidden_layers": 2, "cross_attention_layers": [1]},
            },
            "its base model takes pictures, but not their features",
        ),
        ("blip-2", {}, "is not a base model and an output layer"),
    ],
)
def test_a_family_of_another_design_is_refused_in_a_sentence(family, settings, reason):
    with torch.device("meta"):
        model = build(CONFIG_MAPPING[family](**settings))
        with pytest.raises(ValueError, match=rf"^{type(model).__name__}.*{reason}"):
            prepare_for_training(model)
