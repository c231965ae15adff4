"""The configuration of every published variant, from its config.json and the shapes of its weights."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.model_cases import FAMILIES, golden
from tests.tiny import GOLDEN
from trainer.models import build_model, load_config, parts_of
from trainer.models.xcomposer2.configuration_xcomposer2 import InternLMXcomposer2Config, complete

SHAPES = json.loads((GOLDEN / "xcomposer2" / "shapes.json").read_text())
DYNAMIC = {"type": "dynamic", "factor": 1.0}
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 1000000,
    "use_cache": False,
    "torch_dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config"},
}
SMALL = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16}
PUBLISHED = {
    "vl-7b": {**LARGE, "model_type": "internlmxcomposer2", "img_size": 490, "rope_scaling": DYNAMIC},
    "7b": {**LARGE, "model_type": "internlmxcomposer2", "img_size": 224, "rope_scaling": DYNAMIC},
    "vl-1_8b": {**LARGE, **SMALL, "model_type": "internlm", "img_size": 490},
    "4khd-7b": {**LARGE, "model_type": "internlmxcomposer2", "max_length": 16384, "rope_scaling": None},
    "2d5-7b": {**LARGE, "model_type": "internlm2", "max_length": 16384, "max_position_embeddings": 24576},
}


def shapes_of(variant: str) -> dict[str, list[int]]:
    """All keys; in the file the layers of a list share an entry, `model.layers.*.`"""
    entry, shapes = SHAPES[variant], {}
    for key, shape in entry["shapes"].items():
        before, star, after = key.partition(".*.")
        for i in range(entry["layers"][before] if star else 1):
            shapes[f"{before}.{i}.{after}" if star else key] = shape
    return shapes


@pytest.mark.parametrize("variant", list(PUBLISHED))
def test_a_published_config_and_its_weights_build_exactly_those_weights(variant):
    shapes = shapes_of(variant)
    config = InternLMXcomposer2Config.from_dict(complete(PUBLISHED[variant], shapes))
    with torch.device("meta"):
        model = build_model(config)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == SHAPES[variant]["n_params"]
    assert config.high_resolution == (variant in ("4khd-7b", "2d5-7b"))
    side = {"vl-7b": 490, "7b": 224, "vl-1_8b": 490, "4khd-7b": 336, "2d5-7b": 560}[variant]
    assert config.image_size == side
    assert config.img_size == (None if config.high_resolution else side)
    assert config.end_token_id == 92542
    assert config.plora("wqkv") == ((8, 2.0) if variant == "4khd-7b" else (256, 1.0))
    assert config.plora("w2") == (256, 1.0)
    assert config.model_type == "internlmxcomposer2"


def test_image_slots_of_the_published_variants():
    for variant, size, slots in [
        ("vl-7b", (490, 490), 1225),
        ("7b", (224, 224), 256),
        ("4khd-7b", (2 * 336, 3 * 336), 7 * 144 + 1 + 3 * 12),
        ("2d5-7b", (560, 560), 2 * 400 + 1 + 2 * 20),
    ]:
        config = InternLMXcomposer2Config.from_dict(complete(PUBLISHED[variant], shapes_of(variant)))
        config.num_hidden_layers = 1
        with torch.device("meta"):
            assert build_model(config).vit.num_tokens(*size) == slots


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden square model that a test may change."""
    for path in (GOLDEN / "xcomposer2").iterdir():
        if path.name in ("config.json", "model.safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(folder, **changes):
    """Set fields of config.json; None removes one."""
    fields = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


@pytest.mark.parametrize("model_type", ["internlmxcomposer2", "internlm2", "internlm"])
def test_every_model_type_of_the_original_loads_as_ours(folder, model_type):
    change(folder, model_type=model_type)
    assert type(load_config(folder)) is InternLMXcomposer2Config
    assert type(AutoConfig.from_pretrained(folder)) is InternLMXcomposer2Config
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    case = golden("xcomposer2").inputs("one_image_front")
    with torch.no_grad():
        logits = model(**case).logits
    assert golden("xcomposer2").logits_error("one_image_front", logits) < 2e-5


def test_a_published_eager_attention_is_no_obstacle(folder):
    change(folder, attn_implementation="eager")
    assert AutoModelForCausalLM.from_pretrained(folder).config._attn_implementation == "sdpa"
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert eager.vit.vision_tower.vision_model.config._attn_implementation == "eager"


def test_ranks_and_image_size_come_from_the_weights(folder):
    change(folder, img_size=None, plora_alpha=None, end_token_id=None)
    config = load_config(folder)
    assert config.img_size == 70
    assert config.plora_rank == config.plora_alpha == {"wqkv": 8, "wo": 8, "w1": 8, "w2": 8, "w3": 8}
    assert config.end_token_id == 318


def test_shapes_are_found_in_the_files_of_an_index(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(weights)}
    for name in set(names.values()):
        save_file({key: weights[key] for key in weights if names[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    change(folder, img_size=None)
    assert load_config(folder).img_size == 70


def test_another_image_size_is_asked_for_and_the_positions_are_resized(folder):
    config = load_config(folder, img_size=84)
    model = build_model(config)
    name = "vit.vision_tower.vision_model.embeddings.position_embedding.weight"
    weights = load_file(folder / "model.safetensors")
    resized = {key: model.resize_for_load(key, tensor) for key, tensor in weights.items()}
    model.load_state_dict(resized)
    assert resized[name].shape == (37, 32)
    assert model.image_features(torch.zeros(1, 3, 84, 84)).shape == (36, 64)
    with pytest.raises(ValueError, match="tiles of 56 pixels"):
        load_config(GOLDEN / "xcomposer2-hd", img_size=84)
    with pytest.raises(ValueError, match="85 pixels"):
        load_config(folder, img_size=85)


def fields_of(config):
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_configuration_needs_no_weights(tmp_path, family):
    config = load_config(GOLDEN / family)
    config.save_pretrained(tmp_path)
    assert fields_of(load_config(tmp_path)) == fields_of(config)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForCausalLM"] == "modeling_xcomposer2.InternLMXComposer2ForCausalLM"
    assert saved["architectures"] == ["InternLMXComposer2ForCausalLM"]
    assert saved["vision_config"]["num_attention_heads"] == 4
    assert fields_of(type(config).from_dict(config.to_dict())) == fields_of(copy.deepcopy(config))


def test_alpha_may_be_given_for_some_layers():
    config = InternLMXcomposer2Config(plora_rank=8, plora_alpha={"wqkv": 16, "w1": 4})
    assert config.plora_alpha == {"wqkv": 16, "wo": 8, "w1": 4, "w2": 4, "w3": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"img_size": 100}, "100 pixels"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ({"plora_rank": {"wq": 3}}, "not wq"),
        ({"high_resolution": True, "vision_config": {"image_size": 70}}, "two by two"),
    ],
)
def test_what_the_model_cannot_compute_is_said(fields, message):
    with pytest.raises(ValueError, match=message):
        InternLMXcomposer2Config(**fields)


def test_a_folder_of_something_else_is_refused_in_a_sentence(folder):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_config(folder / "missing")
    change(folder, model_type="lama")
    with pytest.raises(ValueError, match="model_type is lama"):
        load_config(folder)
    change(folder, model_type="internlm2")
    save_file({"model.layers.0.attention.wqkv.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not an InternLM-XComposer2"):
        load_config(folder)


def test_a_tower_that_is_not_the_published_one_must_be_described(folder):
    change(folder, vision_config=None)
    with pytest.raises(ValueError, match="vision_config"):
        load_config(folder)


def test_the_parts_name_what_is_there():
    for family in FAMILIES:
        model = golden(family).model()
        parts = parts_of(model.config)
        names = [name for name, _ in model.named_parameters()]
        assert len(model.get_submodule(parts.language_blocks)) == 2
        assert len(model.get_submodule(parts.vision_blocks)) == model.config.vision_config.num_hidden_layers
        for prefix in (*parts.vision, "vision_proj.", *parts.unused):
            assert any(name.startswith(prefix) for name in names)
        assert any(name.startswith(parts.projector[1:]) for name in names) == (family == "xcomposer2-hd")
        modules = dict(model.named_modules())
        for target in parts.lora_targets:
            assert sum(name.endswith(f".{target}") for name in modules) == 2
        assert {path.name for path in parts.files} >= {"modeling_xcomposer2.py", "vision_xcomposer2.py"}
