"""Adapters: the original's training, the same on any number of ranks, and what of a run peft loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file

from data.loader import StepLoader
from tests.adapter_cases import FILES, adapter, adapter_flags, train_adapter
from tests.model_cases import golden_folder
from tests.tiny import read_metrics, run_ranks, tiny_data, tiny_model, tiny_world
from trainer.config import parse
from trainer.distributed import start
from trainer.prepare import make_plan
from trainer.trainable import refuse_idle


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("lora"))


def loss_with_stock_peft(checkpoint, step, argv):
    """In a rank of its own: the mean loss of a step's samples, from base and adapter as peft loads them."""
    plan = make_plan(parse(argv), start())
    loader = StepLoader(
        plan.reader,
        plan.sampler,
        rank=0,
        num_ranks=1,
        samples_per_micro_batch=plan.global_batch,
        first_step=step - 1,
        num_steps=step,
        packing=plan.packing,
    )
    ((batch,),) = loader
    model = AutoPeftModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        print("loss", model(**batch.inputs).loss.item())


def train_and_prove(folder, name, *flags, ranks=1, steps=3):
    """As `train_adapter`; the loss of the last step must be that of the adapter saved before it, by peft."""
    saves = ("--save_strategy", "steps", "--save_steps", "1")
    saved, output = train_adapter(folder, name, *saves, *flags, ranks=ranks, steps=steps)
    argv = adapter_flags(folder, name, *flags, steps=steps)
    before = saved / f"checkpoint-{steps - 1}"
    (printed,) = run_ranks(1, loss_with_stock_peft, before, steps, argv)
    loss = float(printed.rpartition("loss ")[2])
    assert loss == pytest.approx(read_metrics(saved)[-1]["loss"], rel=1e-5)
    return saved, output


def refuse(folder, *flags):
    """What is said of flags that cannot be used; nothing may be trained."""
    with pytest.raises(AssertionError) as failure:
        train_adapter(folder, "refused", *flags)
    output = str(failure.value)
    assert "statuses [2]" in output, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert not (folder / "refused").exists()
    return errors


EQUAL = ("--adam_epsilon", "1e-5", "--warmup_ratio", "0.2", "--fix_vit", "False")


@pytest.fixture(scope="module")
def reference(world):
    return train_adapter(world, "reference", *EQUAL, steps=10)[0]


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2, ()), (4, ()), (2, ("--sharding", "none")), (4, ("--sharding", "none"))],
)
def test_ranks_and_a_whole_base_change_nothing(world, reference, ranks, flags):
    folder, _ = train_adapter(world, f"equal-{ranks}{''.join(flags)}", *EQUAL, *flags, ranks=ranks, steps=10)
    for a, b in zip(read_metrics(folder), read_metrics(reference), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    (config, ours), (expected_config, theirs) = adapter(folder), adapter(reference)
    assert config == expected_config
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.endswith("k_proj.bias"):  # its true gradient is zero
            assert (ours[name] - theirs[name]).norm() < 1e-6 * theirs[name].norm().clamp(min=1e-2), name


def test_four_ranks_write_the_bytes_that_one_writes(world, reference):
    """Given equal parameters: the learning rate of a first step under warm-up is zero."""
    flags = ("--lora_weight_path", str(reference), "--warmup_ratio", "0.5", *EQUAL[4:])
    one, _ = train_adapter(world, "bytes-1", *flags, steps=1)
    four, _ = train_adapter(world, "bytes-4", *flags, ranks=4, steps=1)
    for name in FILES:
        assert (one / name).read_bytes() == (four / name).read_bytes()
    assert (one / FILES[1]).read_bytes() == (reference / FILES[1]).read_bytes()


def test_a_new_adapter_changes_nothing_and_starts_alike_on_any_ranks(world):
    flags = ("--warmup_ratio", "0.9", "--fix_sampler", "True")
    one, output = train_adapter(world, "new-1", *flags, steps=1)
    two, _ = train_adapter(world, "new-2", *flags, "--sharding", "none", ranks=2, steps=1)
    assert (one / FILES[1]).read_bytes() == (two / FILES[1]).read_bytes()
    assert "0 of 10 B matrices are not zero: it changes nothing yet" in output
    tensors = adapter(one)[1]
    down = [tensor for name, tensor in tensors.items() if "lora_A" in name]
    assert all(0.9 < tensor.abs().max() * tensor.shape[1] ** 0.5 <= 1 for tensor in down)
    assert not torch.equal(down[0], down[5])


@pytest.mark.parametrize("flags", [(), ("--use_dora", "True")])
def test_going_on_starts_with_the_loss_that_the_first_run_ended_with(world, flags):
    """Both runs see the same one record in every step, so a loss depends on the parameters alone."""
    (world / "data" / "same.json").write_text(
        json.dumps([json.loads((world / "data/colour.json").read_text())[0]])
    )
    common = ("--lr_scheduler_type", "constant", "--lora_bias", "all", "--train_modules", "Plora_B", *flags)
    common += ("--per_device_train_batch_size", "1")
    first, _ = train_adapter(world, f"first{''.join(flags)}", *common, data="same.json", steps=4)
    longer, _ = train_adapter(world, f"longer{''.join(flags)}", *common, data="same.json", steps=5)
    again, _ = train_adapter(
        world, f"again{''.join(flags)}", *common, "--lora_weight_path", str(first), data="same.json", steps=1
    )
    assert read_metrics(again)[0]["loss"] == pytest.approx(read_metrics(longer)[4]["loss"], rel=1e-6)
    assert read_metrics(longer)[4]["loss"] < read_metrics(longer)[0]["loss"] - 0.1


def test_vision_and_projector_train_and_are_saved_whole_when_not_fixed(world):
    flags = ("--fix_vit", "False", "--train_modules", "Plora_A,Plora_B", "model.norm")
    folder, output = train_and_prove(world, "whole", *flags, ranks=2)
    config, tensors = adapter(folder)
    base = load_file(world / "model/model.safetensors")
    assert config["modules_to_save"] == ["model.norm", "vision_proj", "vit"]
    for name in (
        "vit.vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_proj.0.weight",
        "model.norm.weight",
        "model.layers.1.feed_forward.w2.Plora_A.weight",
    ):
        key = "base_model.model." + name.replace(".Plora", ".base_layer.Plora")
        assert not torch.equal(tensors[key], base[name]), name
    row = next(line for line in output.splitlines() if line.startswith("vision tower"))
    assert row.split()[-3:] == ["in", "the", "adapter"]
    assert "yes" in row


def test_a_frozen_base_is_held_in_bf16_and_adapters_in_float32(world):
    folder, output = train_adapter(
        world, "bf16", "--bf16", "True", "--fix_sampler", "True", "--sharding", "none", ranks=2
    )
    rows = {
        line.split()[0]: line for line in output.splitlines() if "in the adapter" in line or " no " in line
    }
    assert "float32" in rows["adapters"]
    assert "bfloat16" in rows["language:"]
    assert all(tensor.dtype == torch.float32 for tensor in adapter(folder)[1].values())
    sharded, _ = train_adapter(world, "bf16-sharded", "--bf16", "True", "--fix_sampler", "True", ranks=2)
    for a, b in zip(read_metrics(folder), read_metrics(sharded), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


def test_b_has_a_learning_rate_of_its_own_with_lora_plus(world):
    flags = ("--lr_scheduler_type", "constant", "--weight_decay", "0", "--fix_sampler", "True")
    plain, _ = train_adapter(world, "plus-1", *flags, steps=1)
    plus, _ = train_adapter(world, "plus-8", *flags, "--loraplus_lr_ratio", "8", steps=1)
    for name, tensor in adapter(plus)[1].items():
        factor = 8 if "lora_B" in name else 1
        torch.testing.assert_close(tensor, factor * adapter(plain)[1][name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (("wqkv",), {"model.layers.0.attention.wqkv", "model.layers.1.attention.wqkv"}),
        ((r"model\.layers\.1\..*", "vision_proj.0"), {f"model.layers.1.{n}" for n in (
            "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"
        )} | {"vision_proj.0"}),
        (("output",), {"output"}),
        (("Plora_B",), {f"model.layers.{i}.{n}.Plora_B" for i in (0, 1) for n in (
            "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"
        )}),
    ],
)  # fmt: skip
def test_any_linear_layer_by_name_or_pattern_gets_an_adapter(world, targets, layers):
    name = f"targets-{targets[-1]}"
    folder, _ = train_and_prove(world, name, "--lora_target_modules", *targets, "--fix_sampler", "True")
    found = {name.partition(".lora_")[0] for name in adapter(folder)[1]}
    assert found == {f"base_model.model.{layer}" for layer in layers}


def test_all_linear_leaves_out_the_output_layer_and_plora(world):
    folder, _ = train_adapter(
        world, "all", "--lora_target_modules", "all-linear", "--fix_sampler", "True", steps=2
    )
    names = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in adapter(folder)[1]}
    assert len(names) == 2 * 5 + 2 * 6 + 2
    assert "output" not in names
    assert not any("Plora" in name for name in names)


def test_biases_train_when_asked_for(world):
    flags = ("--fix_sampler", "True", "--lora_bias")
    train_and_prove(world, "biases", *flags, "all")
    names = [name for name in adapter(world / "biases")[1] if ".lora_" not in name]
    assert all(name.endswith(".bias") for name in names)
    assert "base_model.model.vision_proj.0.bias" in names
    targets = ("--lora_target_modules", "fc1")
    only, _ = train_adapter(world, "biases-only", *flags, "lora_only", *targets, steps=2)
    names = [name for name in adapter(only)[1] if ".lora_" not in name]
    assert len(names) == 2
    assert all(name.endswith("fc1.base_layer.bias") for name in names)


def test_the_configuration_names_the_true_class_task_and_base(world, reference):
    config, _ = adapter(reference)
    assert config["task_type"] == "CAUSAL_LM"
    assert config["auto_mapping"]["base_model_class"] == "InternLMXComposer2ForCausalLM"
    assert "FSDP" not in (reference / FILES[0]).read_text()
    assert config["base_model_name_or_path"] == str(world / "model")
    assert config["inference_mode"] is True
    assert "base_model.model.model.layers.0.attention.wqkv.lora_A.weight" in adapter(reference)[1]


def test_a_high_resolution_model_trains_its_separators_too(tmp_path):
    golden_folder("xcomposer2-hd", tmp_path / "model")
    tiny_data(tmp_path / "data")
    folder, _ = train_and_prove(tmp_path, "hd", "--hd_num", "2", ranks=2)
    _, tensors = adapter(folder)
    base = load_file(tmp_path / "model/model.safetensors")
    for name in ("plora_glb_GN", "plora_sub_GN"):
        assert not torch.equal(tensors[f"base_model.model.{name}"], base[name])


def test_adapters_that_the_data_never_reaches_are_refused(world):
    """Text alone never reaches the vision tower."""
    flags = ("--lora_target_modules", "wqkv,fc1", "--fix_sampler", "True")
    with pytest.raises(
        AssertionError, match="the vision tower would get no gradient: take its layers out of"
    ):
        train_adapter(world, "idle", *flags, data="text.json")


def test_whatever_is_to_train_and_gets_no_gradient_is_named():
    reached, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    reached.sum().backward()
    refuse_idle({"reached": reached})
    with pytest.raises(ValueError, match=r"1 parameters are set to train but got no gradient .* first idle"):
        refuse_idle({"reached": reached, "idle": idle})


# --- what cannot be used --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ("--lora_target_modules", "q_prj"),
            "--lora_target_modules q_prj: no linear layer has this name; found ",
        ),
        (
            ("--lora_target_modules", "attention_norm"),
            "--lora_target_modules attention_norm: no linear layer",
        ),
        (("--lora_target_modules", "layers(.*"), "--lora_target_modules layers(.*: not a regular expression"),
        (("--lora_target_modules", "wqkv,Plora_A"), "is a part of model.layers.0.attention.wqkv"),
        (
            ("--lora_target_modules", "vision_proj.0"),
            "vision_proj cannot train as a whole while vision_proj.0",
        ),
        (("--lora_r", "0"), "--lora_r 0: must be at least 1"),
        (("--train_modules", "Plora_C"), "--train_modules Plora_C: the model has no module or parameter"),
        (("--use_dora", "True", "--lora_dropout", "0.1"), "--use_dora needs --lora_dropout 0"),
        (("--lora_weight_path", "{}/data"), "{}/data: no adapter_config.json, so this is not the folder"),
        (("--lora_weight_path", "{}/nowhere"), "{}/nowhere: no adapter_config.json"),
        (("--img_size", "84"), "--img_size 84: {}/model takes images of 70 pixels"),
    ],
)
def test_one_sentence_says_what_is_wrong(world, flags, expected):
    (error,) = refuse(world, *[flag.format(world) for flag in flags])
    assert expected.format(world) in error


def test_flags_that_contradict_the_adapter_are_refused(world, reference):
    (error,) = refuse(world, "--lora_weight_path", str(reference), "--lora_r", "8")
    assert f"--lora_r 8: the adapter of {reference} has 4; leave the flag out" in error
    more = ("--lora_r", "8", "--use_dora", "True", "--lora_dropout", "0", "--lora_target_modules", "wqkv")
    assert len(refuse(world, "--lora_weight_path", str(reference), *more)) == 3


def test_an_adapter_for_another_base_is_refused(tmp_path, world, reference):
    for name in ("data", "model"):
        shutil.copytree(world / name, tmp_path / name)
    tiny_model(tmp_path / "narrow", intermediate_size=96)
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    going_on = ("--lora_weight_path", str(reference))
    (error,) = refuse(tmp_path, *going_on)
    assert error == (
        f"error: {reference}: an adapter for another base ({world}/model): "
        f"its weights are not those of {tmp_path}/model"
    )
    (error,) = refuse(tmp_path, *going_on, "--model_name_or_path", str(tmp_path / "narrow"))
    assert "an adapter for another base" in error
    assert "w1.lora_B.weight is [128, 4]" in error
    assert "needs [96, 4]" in error


def test_an_adapter_in_a_pickle_is_never_opened(tmp_path, world, reference):
    shutil.copy(reference / FILES[0], tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    (error,) = refuse(world, "--lora_weight_path", str(tmp_path))
    assert "an adapter in a pickle (.bin) is never opened here" in error
    assert not Path(world / "refused").exists()
