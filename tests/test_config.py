"""Flags: what is accepted, what is refused, and that every problem is said at once."""

import pytest

from data.flags import ConfigError
from trainer.config import REPLACED, Config, parse


@pytest.fixture
def usable(tmp_path):
    """Flags that have nothing wrong with them."""
    (tmp_path / "data.txt").write_text("a.json\n")
    return ["--model_name_or_path", str(tmp_path), "--data_path", str(tmp_path / "data.txt")]


def problems_of(argv):
    with pytest.raises(ConfigError) as error:
        parse(argv)
    return str(error.value).splitlines()


def test_values_take_the_type_of_their_field(usable):
    config = parse([*usable, "--bf16", "False", "--fix_vit", "--max_steps=7", "--learning_rate", "2e-4"])
    assert (config.bf16, config.fix_vit, config.max_steps, config.learning_rate) == (False, True, 7, 2e-4)
    assert parse([*usable, "--hd_num", "none"]).hd_num is None


def test_the_original_scripts_defaults_hold():
    config = Config()
    assert (config.fix_vit, config.fix_sampler, config.given_num, config.bf16) == (True, False, True, True)
    assert (config.weight_decay, config.adam_beta2, config.warmup_ratio) == (0.1, 0.95, 0.01)


def test_every_problem_is_reported_at_once(tmp_path):
    flags = f"--data_path {tmp_path}/none.txt --max_lenght 8 --seed x --bf16 perhaps --adam_beta1 1.5"
    flags += " --vit_learning_rate 1 --lr_scheduler_type cosin"
    problems = problems_of(flags.split())
    text = "\n".join(problems)
    assert "--max_lenght is unknown; did you mean --max_length?" in problems
    for part in ("--model_name_or_path is missing", "none.txt", "--seed x", "--bf16 perhaps", "--adam_beta1"):
        assert part in text
    assert "--vit_learning_rate has no effect while --fix_vit is True" in text
    assert "--lr_scheduler_type cosin: choose one of cosine, linear" in text
    assert len(problems) == 8


@pytest.mark.parametrize(
    ("flags", "ranks", "said"),
    [
        ("--per_device_train_batch_size 4 --gradient_accumulation_steps 2", 2, None),
        (
            "--per_device_train_batch_size 4 --gradient_accumulation_steps 1",
            2,
            "× 1 accumulated × 2 ranks = 8",
        ),
        ("--per_device_train_batch_size 3", 2, None),
        ("--per_device_train_batch_size 3 --loss_average micro_batch", 2, "_batch_size 1, 2, 4, 8 or --loss"),
        ("--per_device_train_batch_size 4 --loss_average micro_batch", 3, "use 1, 2, 4 ranks or --loss_av"),
        ("--per_device_train_batch_size 4 --loss_average micro_batch", 4, None),
    ],
)
def test_flags_that_do_not_make_up_the_global_batch_are_refused(usable, flags, ranks, said):
    config = parse([*usable, "--global_batch_size", "16", *flags.split()])
    assert config.global_batch(ranks) == 16
    problems = config.batch_problems(ranks)
    assert len(problems) == (said is not None)
    assert said is None or said in problems[0]


@pytest.mark.parametrize("name", REPLACED)
def test_a_flag_of_the_original_says_what_replaces_it(usable, name):
    (problem,) = problems_of([*usable, f"--{name}", "anything"])
    assert problem == f"--{name} has no meaning here: {REPLACED[name]}"


def test_a_yaml_file_gives_defaults_below_the_command_line(usable, tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 2e-5\nmax_steps: 3\nfix_vit: false\n")
    config = parse([*usable, "--config", str(tmp_path / "run.yaml"), "--max_steps", "5"])
    assert (config.learning_rate, config.max_steps, config.fix_vit) == (2e-5, 5, False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("max_lenght: 3\n", "did you mean --max_length?"),
        ("- a list\n", "must hold lines `flag: value`"),
        ("a: [1\n", "cannot be read as YAML"),
        ("max_steps: many\n", "--max_steps many: must be a whole number"),
    ],
)
def test_a_bad_yaml_file_is_a_sentence(usable, tmp_path, content, said):
    (tmp_path / "run.yaml").write_text(content)
    (problem,) = problems_of([*usable, "--config", str(tmp_path / "run.yaml")])
    assert said in problem


def test_a_value_without_its_flag_is_not_dropped(usable):
    assert problems_of([*usable, "stray"]) == ["'stray' stands alone: every value needs its --flag"]


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    shown = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert f"--{name} " in shown
    assert "None (default" not in shown


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_read(usable, monkeypatch):
    assert parse(usable).report_to == ("none",)
    assert parse([*usable, "--report_to", "tensorboard"]).report_to == ("tensorboard",)
    monkeypatch.setattr("trainer.config.find_spec", lambda name: None)
    (problem,) = problems_of([*usable, "--report_to", "tensorboard"])
    assert problem == "--report_to tensorboard needs tensorboard: pip install -e '.[tensorboard]'"
    assert problems_of([*usable, "--report_to", "wandb", "trackio"]) == [
        "--report_to wandb needs wandb: pip install -e '.[wandb]'",
        "--report_to trackio needs trackio: pip install -e '.[trackio]'",
    ]


def test_trackers_are_known_ones_or_none(usable):
    assert problems_of([*usable, "--report_to", "mlflow"]) == [
        "--report_to mlflow: choose from none, tensorboard, wandb, trackio"
    ]
    assert problems_of([*usable, "--report_to", "none,tensorboard"]) == [
        "--report_to none excludes the trackers beside it"
    ]


def test_a_whole_vision_tower_must_be_frozen_and_stays_on_the_device(usable):
    assert not parse([*usable, "--shard_frozen_vision", "False", "--sharding", "hybrid"]).shard_frozen_vision
    problems = problems_of([*usable, "--shard_frozen_vision", "False", "--fix_vit", "False"])
    assert problems == ["--shard_frozen_vision False is for a frozen vision tower: it needs --fix_vit True"]
    (problem,) = problems_of([*usable, "--shard_frozen_vision", "False", "--cpu_offload", "True"])
    assert problem.endswith("it excludes --shard_frozen_vision False")


def test_dora_says_all_that_it_needs_at_once(usable):
    problems = problems_of([*usable, "--use_dora", "True"])
    assert any("no effect without --use_lora True" in problem for problem in problems)
    assert any("needs --lora_dropout 0" in problem for problem in problems)
