"""What one rank of a published model holds and sends, for many ranks, beside the numbers that are recorded.

    python -m tests.forecast_gates              # record them anew, in tests/forecast_gates.json

A change that adds a collective to a block, or a gigabyte to a rank, shows here without a machine. Models have
the published shapes and no weights; a step of one micro-batch of 2,048 tokens with a picture is forecast.
Most cases have 2 blocks of vision and 2 of language, which are like the others; some have all of them.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from data.flags import parse_flags
from tests.processor_cases import make_processor
from tests.tiny import word_tokenizer
from tests.tiny_models import CHAT_TEMPLATE
from trainer.forecast.config import ForecastConfig
from trainer.forecast.forecast import forecast
from trainer.models.generic.pictures import Pictures
from trainer.models.xcomposer2.configuration_xcomposer2 import InternLMXcomposer2Config

RECORDED = Path(__file__).with_suffix(".json")
MODELS, FEW = ("XComposer2-7B", "Qwen2.5-VL-7B"), 2
MESHES = ((8, "full"), (64, "full"), (64, "hybrid"), (1024, "full"), (1024, "hybrid"))
"""(ranks, sharding) on nodes of 8, where 8 ranks are the same in both."""
CASES = [(MODELS[number % 2], FEW, *mesh) for number, mesh in enumerate(MESHES)]
"""(model, blocks, ranks, sharding): every mesh once, 2 seconds each."""
SLOW_CASES = [(MODELS[1 - number % 2], FEW, *mesh) for number, mesh in enumerate(MESHES)]
SLOW_CASES += [(model, None, *mesh) for model in MODELS for mesh in ((8, "full"), (1024, "hybrid"))]
COLLECTIVES = "number of collectives, megabytes within and between machines"
TOLERANCE = {"gigabytes": 0.05, COLLECTIVES: 1.0}
"""Rounding, and what another version of torch allocates, is less."""


def name(model: str, blocks: int | None, ranks: int, sharding: str) -> str:
    return f"{model}, {blocks or 'all'} blocks, {ranks:,} ranks, {sharding}"


def make_folder(folder: Path, model: str, blocks: int | None) -> Path:
    """A model folder without weights."""
    folder = folder / f"{model}-{blocks or 'all'}"
    if folder.is_dir():
        return folder
    folder.mkdir()
    if model == "XComposer2-7B":
        vision = {"num_hidden_layers": blocks or 24}
        InternLMXcomposer2Config(
            img_size=490, num_hidden_layers=blocks or 32, vision_config=vision
        ).save_pretrained(folder)
        word_tokenizer(folder)
        return folder
    make_processor("qwen2_5_vl", folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("IMAGE", "<|image_pad|>"))
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": blocks or 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "depth": blocks or 32, "num_heads": 16}
    vision |= {"out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": [1, 7, 15, 23, 31]}
    CONFIG_MAPPING["qwen2_5_vl"](
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=Pictures(folder).slot_id,
    ).save_pretrained(folder)
    return folder


def find(folder: Path, ranks: int, sharding: str) -> dict[str, dict[str, Any]]:
    """What a rank holds and sends."""
    flags = f"--model_name_or_path {folder} --max_length 2048 --ranks {ranks} --sharding {sharding}"
    config = parse_flags(ForecastConfig, flags.split(), "trainer.forecast")
    step = forecast(config, ranks, counts_flops=False).step
    return {
        "gigabytes": {phase: [round(sum(parts.values()) / 1e9, 3)] for phase, parts in step.peaks.items()},
        COLLECTIVES: {
            f"{kind}, {dimension}": [each.number, round(each.within / 1e6, 1), round(each.between / 1e6, 1)]
            for (kind, dimension), each in step.sent.items()
        },
    }


def differences(recorded: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> list[str]:
    """A line for every number that is not as recorded."""
    lines = []
    for what, tolerance in TOLERANCE.items():
        for key in recorded[what] | found[what]:
            before, now = recorded[what].get(key, []), found[what].get(key, [])
            is_close = len(before) == len(now) and all(
                abs(a - b) <= (0 if isinstance(a, int) else max(tolerance, 0.01 * a))
                for a, b in zip(before, now, strict=True)
            )
            if not is_close:
                lines.append(f"{key}, {what}: recorded {before}, found {now}")
    return lines


def main() -> None:
    recorded = {}
    with tempfile.TemporaryDirectory() as folder:
        for model, blocks, ranks, sharding in CASES + SLOW_CASES:
            case = name(model, blocks, ranks, sharding)
            print(case, flush=True)
            recorded[case] = find(make_folder(Path(folder), model, blocks), ranks, sharding)
            RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
