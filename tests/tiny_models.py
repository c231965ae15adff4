"""Whole folders of tiny models of transformers: weights, processor, tokenizer and chat template.

tiny_folder("qwen2_5_vl", tmp_path / "model")     # 0.1 M random parameters, as save_pretrained writes them
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
)

from tests.processor_cases import TILE, make_processor, make_tokenizer
from tests.vlm_cases import CASES, TEXT_ONLY, as_published
from trainer.models.generic.pictures import Pictures
from trainer.weights import persistent_buffers

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- message.role + ': ' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {{- 'IMAGE' if part.type == 'image' else part.text }}
        {%- endfor %}
    {%- endif %}
    {{- '</s>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
SIZES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"patch_size": 14},
    "exaone4_5": {"patch_size": 14, "window_size": 4 * TILE},
    "qwen2_5_vl": {"patch_size": 14, "window_size": 4 * TILE},
    "qwen3_vl": {"patch_size": 14, "num_position_embeddings": 256},
    "qwen3_vl_moe": {"patch_size": 14, "num_position_embeddings": 256},
    "qwen3_5": {"patch_size": 14, "num_position_embeddings": 256},
    "glm4v": {"patch_size": 14, "image_size": TILE},
    "glm4v_moe": {"patch_size": 14, "image_size": TILE},
    "internvl": {"patch_size": [7, 7], "image_size": [TILE, TILE]},
    "idefics3": {"patch_size": 7, "image_size": TILE},
    "smolvlm": {"patch_size": 7, "image_size": TILE},
}
"""Of the vision tower, to go with the processors; other towers take tiles of TILE pixels in four patches."""
SAME_PROCESSOR = {
    "qwen2_vl": "qwen2_5_vl",
    "exaone4_5": "qwen2_5_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5": "qwen3_vl",
    "glm4v_moe": "glm4v",
}
"""Families without a processor of their own."""


def tiny_folder(family: str, folder: Path, vision: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a model; vision, changes: other settings of its vision tower and of its language model."""
    torch.manual_seed(0)
    case = CASES[family]
    config: dict[str, Any] = {**case.config}
    if family in TEXT_ONLY:
        tokenizer, image = make_tokenizer([]), ""
        config |= {"vocab_size": len(tokenizer), **changes}
        tokenizer.save_pretrained(folder)
        auto: Any = AutoModelForCausalLM
    else:
        processor = make_processor(SAME_PROCESSOR.get(family, family), folder)
        tokenizer, image = processor.tokenizer, processor.image_token
        name = "image_token_index" if "image_token_index" in config else "image_token_id"
        tower = {"patch_size": 14, "image_size": TILE} if "image_size" in config["vision_config"] else {}
        config |= {
            name: Pictures(folder).slot_id,
            "vision_config": config["vision_config"] | tower | SIZES.get(family, {}) | (vision or {}),
            "text_config": config["text_config"] | {"vocab_size": len(tokenizer)} | changes,
        }
        if pinpoints := getattr(processor.image_processor, "image_grid_pinpoints", None):
            config["image_grid_pinpoints"] = pinpoints
        auto = AutoModelForImageTextToText
    shown = f"<|vision_start|>{image}<|vision_end|>" if family.startswith(("qwen", "exaone")) else image
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("IMAGE", shown))
    model = auto.from_config(CONFIG_MAPPING[case.model_type or family](**config), dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    for buffer in persistent_buffers(model).values():
        buffer.normal_(std=0.1)
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(as_published(family, load_file(weights)), weights, metadata={"format": "pt"})
    return folder
