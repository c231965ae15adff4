"""Training models of transformers by the trainer's own loop: as transformers computes, on any number of
ranks, and into folders that transformers and peft load without this project."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from data.config import DataConfig
from data.errors import DataError
from data.loader import SampleReader
from data.mixture import read_mixture
from data.reader import open_reader
from data.sampler import StepSampler
from tests.processor_cases import NEEDS_NUM2WORDS
from tests.tiny import flags, read_metrics, run_ranks, tiny_data
from tests.tiny_models import tiny_folder
from tests.vlm_cases import TEXT_ONLY, five_samples, tiny_model
from trainer import models
from trainer.config import Config
from trainer.export import main as export
from trainer.export import merge
from trainer.generate import Questions, open_all
from trainer.generate import main as generate
from trainer.lora import add_adapters
from trainer.main import main

IN_THE_FAST_SUITE = ("qwen3", "qwen2_5_vl")
FAMILIES = [
    pytest.param(name, marks=() if name in IN_THE_FAST_SUITE else pytest.mark.slow)
    for name in (
        *("qwen3", "llama", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "llava", "llava_onevision"),
        *("gemma3", "glm4v", "paligemma", "qwen3_vl_moe", "glm4v_moe", "idefics3", "smolvlm"),
    )
]
STEPS = 3


def world_of(family: str, folder: Path, **changes: Any) -> Path:
    """A folder with a tiny `model`, and the `data` of other tests, without pictures for a model of text."""
    tiny_folder(family, folder / "model", **changes)
    data = tiny_data(folder / "data")
    if family in TEXT_ONLY:
        data.write_text("text.json 0.024\n")
    return folder


def train(world: Path, name: str, ranks: int = 1, **changes: Any) -> Path:
    options = {"max_steps": STEPS, "seed": 0, "per_device_train_batch_size": 4 // ranks, "packing": True}
    options |= {"max_length": 256, "plora_dropout": None, "save_strategy": "no", **changes}
    run_ranks(ranks, main, flags(world, name, **options))
    return world / name


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


def plain_model(folder: Path) -> Any:
    """The class's own model, as a user of transformers loads it."""
    config = AutoConfig.from_pretrained(folder)
    return models.answering_class(config).from_pretrained(folder, dtype=torch.float32).eval()


def first_loss_by_transformers(world: Path) -> float:
    """The mean loss over the first global batch, a sample at a time, by the class's own forward."""
    config = DataConfig(
        data_path=str(world / "data" / "data.txt"), model_name_or_path=str(world / "model"), max_length=256
    )
    reader, model_config = open_reader(config, read_mixture(config.data_path), models)
    model, total, count = plain_model(world / "model"), 0.0, 0
    for source, index in StepSampler(reader.sources, 0, 4).samples(0):
        encoded, pictures = reader.read(int(source), int(index))
        slots = torch.from_numpy(encoded.im_mask)[None]
        inputs = {"input_ids": encoded.input_ids, "labels": encoded.labels}
        inputs = {name: torch.from_numpy(ids)[None] for name, ids in inputs.items()}
        if pictures:
            inputs |= reader.image_processor.batch(pictures) | models.prompt_arguments(model_config, slots)
        if model_config.model_type == "gemma3":
            inputs["token_type_ids"] = slots.long()
        elif model_config.model_type == "paligemma":
            inputs["token_type_ids"] = (inputs["labels"] != -100).long().cummax(dim=1).values
        with torch.no_grad():
            total += model(**inputs).loss.item() * encoded.num_supervised
        count += encoded.num_supervised
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_transformers_and_of_two_ranks_and_the_folder_loads_in_transformers(
    family, tmp_path
):
    if why := NEEDS_NUM2WORDS.get(family):
        pytest.skip(why)
    world = world_of(family, tmp_path)
    run = train(world, "one")
    found = losses(run)
    assert found[0] == pytest.approx(first_loss_by_transformers(world), rel=1e-5)
    assert len(set(found)) == STEPS
    assert losses(train(world, "two", ranks=2)) == pytest.approx(found, rel=1e-5)
    assert losses(train(world, "padded", packing=False)) == pytest.approx(found, rel=1e-5)

    model = plain_model(run)
    trained = load_file(run / "model.safetensors")
    assert set(trained) == set(load_file(world / "model" / "model.safetensors"))
    assert model.generation_config.eos_token_id == plain_model(world / "model").generation_config.eos_token_id
    for name in ("chat_template.jinja", "preprocessor_config.json", "processor_config.json"):
        assert (run / name).exists() == (world / "model" / name).exists(), name
    models.load_conversation(run)
    models.load_image_processor(models.load_config(run))
    # The saved weights are the trained ones: the same first batch has a lower loss.
    again = train(world, "again", model_name_or_path=run, max_steps=1)
    assert losses(again)[0] < found[0]


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_5_vl",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "qwen3_vl", "qwen3_vl_moe")),
    ],
)
def test_an_adapter_of_two_ranks_answers_in_peft_as_in_the_merged_model(family, tmp_path):
    world = world_of(family, tmp_path)
    lora = {"use_lora": True, "lora_r": 4, "lora_dropout": 0, "learning_rate": "1e-2"}
    lora["chat_template"] = tmp_path / "says.jinja"
    template = (world / "model" / "chat_template.jinja").read_text().replace(": ", " says: ")
    lora["chat_template"].write_text(template)
    run = train(world, "one", **lora)
    assert losses(train(world, "two", ranks=2, **lora)) == pytest.approx(losses(run), rel=1e-5)

    ids = torch.randint(5, 200, (1, 24), generator=torch.Generator().manual_seed(0))
    adapted = PeftModel.from_pretrained(plain_model(world / "model"), str(world / "two"))
    assert export(["--merge", str(world / "two"), str(world / "merged")]) == 0
    assert (world / "merged" / "chat_template.jinja").read_text() == template
    _, asked, _ = open_all(Questions(model_name_or_path=str(world / "two"), question="What is it?"))
    assert asked.encoder.tokenizer.chat_template == template
    lora.pop("chat_template")
    on = train(world, "on", lora_weight_path=world / "two", max_steps=1, **lora)
    assert (on / "chat_template.jinja").read_text() == template, "the adapter's own template"
    with torch.no_grad():
        base, merged = (plain_model(world / name)(input_ids=ids).logits for name in ("model", "merged"))
        logits = adapted(input_ids=ids).logits
    torch.testing.assert_close(merged, logits, rtol=0, atol=1e-5)
    assert (logits - base).abs().max() > 1e-3


def test_a_merged_model_ties_its_output_layer_to_the_trained_embeddings_though_the_base_stores_both(tmp_path):
    world = world_of("qwen3", tmp_path, tie_word_embeddings=True)
    weights = world / "model" / "model.safetensors"
    stored = load_file(weights)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, weights, {"format": "pt"})
    train(world, "run", use_lora=True, lora_r=4, train_modules="embed_tokens")
    assert export(["--merge", str(world / "run"), str(world / "merged")]) == 0
    assert load_file(world / "merged" / "model.safetensors").keys() == stored.keys() - {"lm_head.weight"}
    merged = plain_model(world / "merged")
    assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert not torch.equal(merged.lm_head.weight, stored["lm_head.weight"])

    train(world, "head", use_lora=True, lora_r=4, lora_target_modules="lm_head", max_steps=1)
    with pytest.raises(DataError, match="lm_head shares its weight with the embeddings and cannot be merged"):
        merge(world / "head", world / "none")


def test_linear_layers_that_peft_takes_for_experts_get_no_adapter(tmp_path):
    """GLM-4V-MoE's shared experts and its dense first layer are linear, the experts are not."""
    folder = tiny_folder("glm4v_moe", tmp_path / "model")
    config = models.load_config(folder)
    settings = Config(model_name_or_path=str(folder), use_lora=True)
    with torch.device("meta"):
        model = models.build_model(config)
        found = add_adapters(model, models.parts_of(config), settings).peft_config.target_modules
        assert {name.rpartition(".")[2] for name in found or ()} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert not [name for name, _ in model.named_parameters() if ".experts.base_layer" in name]
        model, settings.lora_target_modules = models.build_model(config), ("q_proj", "up_proj", "gate_proj")
        with pytest.raises(DataError, match="--lora_target_modules: up_proj is for peft the name of"):
            add_adapters(model, models.parts_of(config), settings)


def test_a_list_of_projectors_that_trains_beside_adapters_is_saved_as_its_modules(tmp_path):
    """Qwen3-VL has one for each of its deepstack features, and peft takes no list of modules."""
    folder = tiny_folder("qwen3_vl", tmp_path / "model")
    config = models.load_config(folder)
    with torch.device("meta"):
        model = models.build_model(config)
        settings = Config(model_name_or_path=str(folder), use_lora=True)
        saved = add_adapters(model, models.parts_of(config), settings).peft_config.modules_to_save
    lists = "model.visual.deepstack_merger_list"
    assert saved == [f"{lists}.0", f"{lists}.1", "model.visual.merger"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one_also_on_another_number_of_ranks(family, tmp_path):
    world = world_of(family, tmp_path)
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    straight = train(world, "straight", **steps)
    checkpoint = straight / "checkpoint-2"
    resumed = train(world, "resumed", resume_from_checkpoint=checkpoint, **steps)
    ours, theirs = (load_file(run / "model.safetensors") for run in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    wider = train(world, "wider", ranks=2, resume_from_checkpoint=checkpoint, **steps)
    assert losses(wider) == pytest.approx(losses(straight)[2:], rel=1e-5)


@pytest.mark.slow
def test_a_buffer_in_float32_is_not_rounded_by_a_merge_in_bfloat16(tmp_path):
    world = world_of("glm4v_moe", tmp_path)
    run = train(world, "run", max_steps=1, use_lora=True, fix_sampler=True)
    merge(run, world / "merged", dtype=torch.bfloat16)
    dtypes = {key: tensor.dtype for key, tensor in load_file(world / "merged" / "model.safetensors").items()}
    biases = {name for name in dtypes if name.endswith("e_score_correction_bias")}
    assert biases
    assert {name for name in dtypes if dtypes[name] == torch.float32} == biases


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("model", {"shard_frozen_vision": False}, marks=pytest.mark.slow),
        ("adapter_model", {"use_lora": True, "lora_r": 4, "lora_dropout": 0, "sharding": "none"}),
    ],
)
def test_a_projector_trains_alike_where_a_rank_has_no_image_and_the_tower_no_collectives(
    name, changes, tmp_path
):
    """Of 34 records one has an image, in one batch of the ten."""
    world = world_of("qwen2_5_vl", tmp_path)
    data = world / "data" / "rare.txt"
    data.write_text("text.json\ncolour.json 0.001\n")
    runs = [
        train(world, f"of {ranks}", ranks, data_path=data, max_steps=10, adam_epsilon=1e-5, **changes)
        for ranks in (1, 2)
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-6)
    ours, theirs = (load_file(run / f"{name}.safetensors") for run in runs)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert (ours[key] - theirs[key]).norm() < 1e-5 * theirs[key].norm().clamp(min=1e-3), key


def test_an_answer_begins_with_the_logits_that_the_model_was_trained_for():
    """With the tokens of an image seeing all of it, in Gemma 3, and a prompt all of itself, in PaliGemma."""
    types: dict[str, Any] = {
        "gemma3": lambda slots: slots.long(),
        "paligemma": torch.zeros_like,
    }
    for family, types_of in types.items():
        model = tiny_model(family)
        sample = five_samples(family, model)[2]
        ids, slots = sample.input_ids[None], sample.slots[None]
        given = {"input_ids": ids, **sample.vision, "attention_mask": torch.ones_like(ids)}
        arguments = models.prompt_arguments(model.config, slots)
        options = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
        with torch.no_grad():
            found = model.generate(**given, **arguments, do_sample=False, **options).scores[0]
            expected = model(**given, token_type_ids=types_of(slots.long())).logits[:, -1]
            causal = model(**given).logits[:, -1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        if family == "gemma3":
            assert (causal - expected).abs().max() > 0.01


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_answers_are_those_of_transformers(family, tmp_path):
    world = world_of(family, tmp_path)
    records = world / "data" / ("text.json" if family in TEXT_ONLY else "both.json")
    asked = ["--data_path", str(records), "--output", str(tmp_path / "answers.json")]
    asked += ["--model_name_or_path", str(world / "model"), "--max_new_tokens", "6", "--bf16", "False"]
    assert generate([*asked, "--batch_size", "3"]) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.json").read_text().splitlines()]

    config = models.load_config(world / "model")
    model, tokenizer = plain_model(world / "model"), models.load_tokenizer(world / "model")
    data = DataConfig(data_path=str(records), model_name_or_path=str(world / "model"))
    reader, _ = open_reader(data, read_mixture(records), models)
    for index, answer in enumerate(answers):
        _, prompt, pictures = reader.read_prompt(0, index)
        ids = torch.from_numpy(prompt.input_ids)[None]
        slots = torch.from_numpy(prompt.im_mask)[None]
        given = reader.image_processor.batch(pictures) | models.prompt_arguments(config, slots)
        found = model.generate(
            input_ids=ids, **(given if pictures else {}), max_new_tokens=6, do_sample=False
        )
        text = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer["prediction"] == text.strip()


@pytest.mark.parametrize(
    ("family", "limit"),
    [
        ("qwen2_5_vl", r"longest_edge=\d+"),
        pytest.param("internvl", r"max_patches=\d", marks=pytest.mark.slow),
        pytest.param("idefics3", r"longest_edge=\d+", marks=pytest.mark.slow),
    ],
)
def test_images_of_a_long_sample_are_made_to_fit_by_the_highest_limit_that_does(family, limit, tmp_path):
    world = world_of(family, tmp_path)
    Image.new("RGB", (390, 190)).save(world / "data" / "red40.png")
    (world / "data" / "data.txt").write_text("both.json 0.006\n")

    def reader_of(max_length: int) -> SampleReader:
        config = DataConfig(
            data_path=str(world / "data" / "data.txt"),
            model_name_or_path=str(world / "model"),
            max_length=max_length,
            fit_images=True,
        )
        return open_reader(config, read_mixture(config.data_path), models)[0]

    whole, _ = reader_of(4096).read(0, 0)
    room = len(whole.input_ids) - whole.image_tokens[0] // 2
    reader = reader_of(room)
    fitted, _ = reader.read(0, 0)
    assert (whole.image_limit, fitted.is_cut) == (None, False)
    assert re.fullmatch(limit, str(fitted.image_limit))
    for name, processor in reader.image_processor.smaller().items():
        tokens = [processor.num_tokens(*size) for size in ((390, 190), (90, 90))]
        if name == fitted.image_limit:
            assert tokens == fitted.image_tokens
            break
        assert len(whole.input_ids) - sum(whole.image_tokens) + sum(tokens) > room
    run = train(world, "run", fit_images=True, max_length=room, max_steps=1, on_long_sample="error")
    assert losses(run)[0] > 0


def test_fit_images_is_refused_with_the_reason_where_no_limit_can_be_lowered(tmp_path):
    world = world_of("llava", tmp_path)
    options = {"plora_dropout": None, "max_steps": 1, "fit_images": True}
    (output,) = run_ranks(1, main, flags(world, "run", **options), status=2)
    sentence = "--fit_images: CLIPImageProcessorPil has no limit of a picture's tiles or size that could be "
    assert f"{sentence}lowered; remove the flag" in " ".join(output.split())


def test_a_picture_for_a_model_of_text_is_a_sentence_that_names_the_record(tmp_path):
    world = world_of("qwen3", tmp_path)
    config = DataConfig(
        data_path=str(world / "data" / "colour.json"), model_name_or_path=str(world / "model")
    )
    reader, _ = open_reader(config, read_mixture(config.data_path), models)
    with pytest.raises(
        DataError, match=r"colour.json: record 0 .* has a picture, but the model takes only text"
    ):
        reader.read(0, 0)


def test_a_given_chat_template_trains_and_is_kept_and_a_model_without_one_asks_for_it(tmp_path):
    world = world_of("qwen3", tmp_path)
    template = tmp_path / "given.jinja"
    template.write_text((world / "model" / "chat_template.jinja").read_text().replace(": ", " says: "))
    own = losses(train(world, "own", max_steps=1))
    run = train(world, "given", max_steps=1, chat_template=template)
    assert losses(run) != own
    assert (run / "chat_template.jinja").read_text() == template.read_text()
    assert losses(train(world, "again", max_steps=1, model_name_or_path=run)) != own

    (world / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template; give one with --chat_template FILE"):
        models.load_conversation(world / "model")


def test_flags_that_mean_nothing_for_a_model_of_transformers_are_refused_together_with_a_reason(tmp_path):
    world = world_of("qwen3", tmp_path)

    def refused(**changes):
        options = {"plora_dropout": None, "max_steps": 1, **changes}
        (output,) = run_ranks(1, main, flags(world, "run", **options), status=2)
        return " ".join(output.split())

    assert "--img_size 70: this model's pictures are processed as its preprocessor" in refused(img_size=70)
    flash = refused(attn_implementation="flash_attention_2")
    assert "--attn_implementation flash_attention_2: flash_attention_2 is not for this model" in flash


def test_blocks_that_run_by_sample_are_not_compiled_and_the_reason_is_a_sentence(tmp_path):
    world = world_of("lfm2", tmp_path)
    options = {"plora_dropout": None, "max_steps": 1, "compile": True}
    (output,) = run_ranks(1, main, flags(world, "run", **options), status=2)
    assert "--compile: linear attention and convolutions of this model run once for" in " ".join(
        output.split()
    )
