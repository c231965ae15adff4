"""The trainer's configuration: one flat dataclass, whose fields and docstrings `data.flags` makes into flags.

Input: a command line, and the YAML file that `--config` names, whose values the command line overrides.
Output: a `Config`, or `ConfigError` with all problems.

    config = parse(["--model_name_or_path", "base", "--data_path", "data.txt", "--bf16", "False"])
    config.bf16                                       # False
    parse(["--max_lenght", "10"])                     # ConfigError: --max_lenght is unknown; did you mean …

Names and defaults follow the original scripts and Hugging Face, where these have them.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path

from data.config import DataConfig, may_change
from data.flags import ConfigError as ConfigError
from data.flags import parse_flags
from trainer.optim import SCHEDULES
from trainer.trackers import TRACKERS


@dataclass
class Config(DataConfig):
    """All settings of a training run."""

    # --- model ---------------------------------------------------------------------------------------
    attn_implementation: str = may_change("sdpa")
    """Attention kernel, by transformers' name: sdpa, eager, flash_attention_2, …"""
    plora_dropout: float = 0.05
    """Dropout in the model's built-in partial LoRA (PLoRA) at image positions, while training."""

    # --- data ----------------------------------------------------------------------------------------
    on_bad_sample: str = "error"
    """For samples that cannot be read during training: `error` ends the run, `skip` counts and skips them."""
    dataloader_num_workers: int = may_change(2)
    """Worker processes per rank that decode images ahead of the step; 0: decode in the training process."""

    # --- what trains ---------------------------------------------------------------------------------
    fix_vit: bool = True
    """Freeze the vision tower."""
    fix_sampler: bool = False
    """Freeze the projector between vision and language."""
    vit_learning_rate: float | None = None
    """Peak learning rate of the vision tower; learning_rate if absent."""
    sampler_learning_rate: float | None = None
    """Peak learning rate of the projector; learning_rate if absent."""
    train_modules: tuple[str, ...] = ()
    """Further modules or parameters to train in full, by the end of their names, as in Plora_A,Plora_B."""

    # --- adapters ------------------------------------------------------------------------------------
    use_lora: bool = False
    """Train adapters on a frozen base instead of the language model's own weights."""
    lora_r: int = 64
    """Rank of the adapters."""
    lora_alpha: int = 64
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout on the adapters' input, while training."""
    lora_target_modules: tuple[str, ...] = ()
    """Linear layers that get an adapter, by the end of their names (attention.wqkv) or a regular expression
    for whole names; or all-linear. By default attention.wqkv, attention.wo and feed_forward.w1, w2, w3."""
    lora_bias: str = "none"
    """Biases to train too: none, all, or lora_only (those of the layers with an adapter)."""
    lora_weight_path: str | None = None
    """Folder of an adapter to continue training; rank, alpha and layers are the adapter's own."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: the scale is alpha / √rank."""
    use_dora: bool = False
    """Weight-decomposed LoRA (DoRA): train the norm of each row of a weight separately from its direction."""
    loraplus_lr_ratio: float = 1.0
    """LoRA+: peak learning rate of the B matrices = this × learning_rate."""

    # --- optimisation --------------------------------------------------------------------------------
    num_train_epochs: float = may_change(1.0)
    """Passes over the samples that data_path declares for an epoch."""
    max_steps: int = may_change(-1)
    """Optimizer steps; overrides num_train_epochs when positive."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay, on matrices only."""
    adam_beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    adam_beta2: float = 0.95
    """AdamW's decay rate of the second moment."""
    adam_epsilon: float = 1e-8
    """Term in AdamW's denominator that prevents division by zero."""
    optim_state: str = "float32"
    """Format of AdamW's moments: float32; bfloat16, half the memory; 8bit, a quarter (needs torchao)."""
    max_grad_norm: float = 1.0
    """Maximum norm of the whole gradient; 0 turns clipping off."""
    warmup_ratio: float = may_change(0.01)
    """Fraction of all steps in which the learning rate rises from 0."""
    lr_scheduler_type: str = "cosine"
    """Learning rate schedule: cosine, linear, constant or constant_with_warmup."""
    loss_average: str = "token"
    """`token`: one mean over the global batch's supervised tokens; `micro_batch`: the mean of means of the
    original scripts, for comparison with old runs."""
    original_weight_decay: bool = False
    """Decay RMSNorm weights too, as the original scripts did, for comparison with old runs."""

    # --- memory and speed ----------------------------------------------------------------------------
    sharding: str = may_change("full")
    """full: shard every parameter over all ranks; hybrid: shard within each node and replicate across nodes,
    so that only gradients travel between nodes; none (with use_lora): keep the whole frozen base on every
    rank, which avoids gathering it, and shard only what trains."""
    shard_frozen_vision: bool = may_change(True)
    """Shard a frozen vision tower, too. False keeps the whole tower on every rank, so that vision needs no
    collectives and a rank without images skips it; sharding none always does so."""
    reshard_after_forward: bool = may_change(True)
    """Free a block's gathered parameters after its forward pass and gather them again for the backward pass.
    False keeps them until the end of the step: half the gathers or fewer, but the whole model in memory."""
    forward_prefetch: bool = may_change(False)
    """Start gathering the next block's parameters before a block runs instead of after it. This costs the
    memory of one block, and helps where the CPU does not run far ahead of the accelerator."""
    reduce_every_micro_batch: bool = may_change(False)
    """Reduce gradients over the ranks in every micro-batch, not only in a step's last one, so that no rank
    holds the whole gradient in float32 while gradients accumulate."""
    compile: bool = may_change(False)
    """Compile the blocks with torch.compile, once for rows of any length, which takes a minute or more before
    the first step."""
    cpu_offload: bool = may_change(False)
    """Keep parameters, gradients and optimizer state in host memory, and run the optimizer step there; a
    block's parameters are copied to the accelerator when it runs."""
    bf16: bool = True
    """Compute in bfloat16; trained parameters, reductions and the optimizer stay in float32."""
    gradient_checkpointing: bool | str = may_change(True)
    """Keep only each block's input for the backward pass and recompute the block there; `selective` also
    keeps the results of matrix products and attention, and recomputes only the rest."""
    vision_checkpointing: bool | str | None = may_change(None)
    """The same for the blocks of the vision tower, if it trains; by default as gradient_checkpointing."""
    vision_micro_batch: int | None = may_change(16)
    """Images or tiles that a block of the vision tower processes at a time; this limits memory and does not
    change the results. none: all of a micro-batch at once."""
    loss_chunk_tokens: int = may_change(1024)
    """Tokens whose logits are in memory at a time."""

    # --- output --------------------------------------------------------------------------------------
    output_dir: str = may_change("output")
    """Folder for the model, checkpoints, metrics.jsonl and run.json; on a file system that ranks share."""
    logging_steps: int = may_change(1)
    """Steps between lines of metrics.jsonl."""
    save_strategy: str = may_change("epoch")
    """When to write a checkpoint: epoch or steps, and after the last step; no: only the trained model."""
    save_steps: int = may_change(500)
    """Steps between saves when save_strategy is steps."""
    save_total_limit: int | None = may_change(None)
    """Checkpoints to keep; the oldest is deleted only when a new one is complete."""
    save_minutes: float | None = may_change(None)
    """Also save this many minutes after the last save: 30 by default, unless save_strategy is no. The next
    checkpoint replaces one that was saved only for this reason."""
    async_save: bool = may_change(True)
    """Write checkpoints in a thread while training continues, from a copy in host memory."""
    save_dtype: str = may_change("auto")
    """Dtype of the saved weights: auto (the base checkpoint's), float32 or bfloat16."""
    measure_mfu: bool = may_change(False)
    """Count the model's floating-point operations (half a minute for a 7B of transformers), measure the speed
    of matrix products in the compute dtype for a second at the start, and report the fraction of that speed
    that training reaches (mfu)."""
    profile: str | None = may_change(None)
    """START:STOP, both included: trace these steps, with named ranges, into output_dir/profile/, and print a
    table of where their time went."""
    forecast: bool = may_change(True)
    """Forecast at the start what a rank needs of memory and sends, as python -m trainer.forecast does, beside
    the run, with the lowest priority; the log and the report tell it."""
    report_to: tuple[str, ...] = may_change(("none",))
    """Trackers of the metrics, each with a package of its own (pip install -e '.[wandb]'): tensorboard (event
    files in output_dir/tensorboard), wandb, trackio; or none."""
    report: bool = may_change(True)
    """Write output_dir/report.html, the run on one page, at every evaluation and at the end; with pip install
    -e '.[report]' it has curves."""

    # --- validation ----------------------------------------------------------------------------------
    eval_data_path: str | None = may_change(None)
    """Samples to validate on, in the format of data_path; a number draws a fixed part of the file, the same
    at every evaluation."""
    eval_strategy: str = may_change("epoch")
    """When to evaluate: epoch or steps, and after the last step; no: never."""
    eval_steps: int = may_change(500)
    """Steps between evaluations when eval_strategy is steps."""
    eval_on_start: bool = may_change(False)
    """Also evaluate before the first step: the model that training starts from."""
    eval_generate: int = may_change(0)
    """Samples of each source that the model answers at every evaluation, always the same ones; the answers
    and their scores go to output_dir/eval/step-<step>.jsonl."""
    eval_metrics: tuple[str, ...] = may_change(())
    """Scores of the answers: exact_match, choice, anls, relaxed_accuracy, token_f1, rouge_l; for all sources,
    or for one, as in exact_match docs=anls,token_f1. By default choice where every answer is a letter, and
    otherwise exact_match and token_f1."""
    eval_max_new_tokens: int = may_change(128)
    """Most tokens of a generated answer."""
    metric_for_best_model: str = may_change("loss")
    """What makes an evaluation the best: loss or a score, of all sources or of one, as in anls/docs."""
    greater_is_better: bool | None = may_change(None)
    """Whether a greater value is better; by default of everything but losses."""
    load_best_model_at_end: bool = may_change(False)
    """The trained model is that of the best evaluation; each evaluation that is the best so far is saved."""
    early_stopping_patience: int | None = may_change(None)
    """End the training after this many evaluations in a row that are not the best."""

    # --- stopping and resuming -----------------------------------------------------------------------
    resume_from_checkpoint: str = may_change("auto")
    """auto: the newest complete checkpoint in output_dir, if any; none; or a checkpoint's folder."""
    resume_anyway: bool = may_change(False)
    """Resume from the checkpoint even if changes to the data or configuration alter the training."""
    deterministic: bool = may_change(False)
    """Use only deterministic kernels, so that on GPUs, as on CPUs, a resumed run equals the uninterrupted one
    bit for bit; without it the two may differ by rounding. This costs time on GPUs, most of it in attention's
    backward pass."""
    check_model: bool = may_change(True)
    """Check before the first step, on the shortest samples with and without a picture, that logits are those
    of the model's own class, pictures have as many tokens as features, samples of a batch do not see each
    other, and every parameter that trains gets a gradient."""
    rehearse: bool = may_change(True)
    """Run the micro-batches with most tokens and most image slots once before the first step, so that a lack
    of memory is found immediately."""
    max_bad_steps: int = may_change(3)
    """Number of consecutive steps with a loss or gradient that is not finite after which the run ends."""
    hang_minutes: float = may_change(30.0)
    """Time limit for a step (including its save) and for a collective; beyond it, every thread's stack is
    printed and the job ends."""

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate by part of the model."""
        rates = dict.fromkeys(("vision", "projector", "language", "adapter"), self.learning_rate)
        if self.vit_learning_rate is not None:
            rates["vision"] = self.vit_learning_rate
        if self.sampler_learning_rate is not None:
            rates["projector"] = self.sampler_learning_rate
        return rates | {"adapter_b": self.loraplus_lr_ratio * self.learning_rate}

    @property
    def adam_betas(self) -> tuple[float, float]:
        """AdamW's decay rates of the first and second moment."""
        return self.adam_beta1, self.adam_beta2

    @property
    def minutes_between_saves(self) -> float:
        """`save_minutes` or its default; infinite if nothing is saved by the clock."""
        if self.save_minutes is None:
            return math.inf if self.save_strategy == "no" else 30.0
        return self.save_minutes

    @property
    def makes_checkpoints(self) -> bool:
        """Whether the run may write checkpoints in addition to the trained model."""
        return self.save_strategy != "no" or self.save_minutes is not None or self.load_best_model_at_end

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates at all."""
        return self.eval_data_path is not None and self.eval_strategy != "no"

    @property
    def traced_steps(self) -> range:
        """The steps of `profile`; ValueError if it is not two numbers."""
        first, last = (int(number) for number in (self.profile or "1:0").split(":"))
        return range(first, last + 1)

    def batch_problems(self, num_ranks: int) -> list[str]:
        """Also for a mean of means, to which every micro-batch must bring equally many samples."""
        found, batch = super().batch_problems(num_ranks), self.global_batch(num_ranks)
        size = self.per_device_train_batch_size
        if found or self.loss_average == "token" or batch % (size * num_ranks) == 0:
            return found
        sizes = [n for n in range(1, batch + 1) if batch % (n * num_ranks) == 0]
        ranks = [n for n in range(1, batch + 1) if batch % (n * size) == 0]
        ways = [f"--per_device_train_batch_size {', '.join(map(str, sizes))}"] if sizes else []
        ways += [f"{', '.join(map(str, ranks))} ranks"] if ranks else []
        ways.append("--loss_average token")
        return [
            f"--loss_average micro_batch needs micro-batches of equally many samples, and {batch} of "
            f"--global_batch_size are not {size} per device × {num_ranks} ranks: use {' or '.join(ways)}"
        ]

    def problems(self) -> list[str]:
        """Problems with the values alone, a sentence each; of files, only their existence is checked."""
        found = super().problems()
        if Path(self.output_dir).is_file():
            found.append(f"--output_dir {self.output_dir}: this is a file; name a folder")
        for name, choices in {
            "on_bad_sample": ("error", "skip"),
            "lr_scheduler_type": SCHEDULES,
            "loss_average": ("token", "micro_batch"),
            "lora_bias": ("none", "all", "lora_only"),
            "optim_state": ("float32", "bfloat16", "8bit"),
            "sharding": ("full", "hybrid", "none"),
            "gradient_checkpointing": (True, False, "selective"),
            "vision_checkpointing": (None, True, False, "selective"),
            "save_strategy": ("no", "steps", "epoch"),
            "eval_strategy": ("no", "steps", "epoch"),
            "save_dtype": ("auto", "float32", "bfloat16"),
        }.items():
            if getattr(self, name) not in choices:
                found.append(f"--{name} {getattr(self, name)}: choose one of {', '.join(map(str, choices))}")
        found += self.too_small(
            dataloader_num_workers=0,
            lora_r=1,
            lora_alpha=1,
            vision_micro_batch=1,
            loss_chunk_tokens=1,
            logging_steps=1,
            save_steps=1,
            save_total_limit=1,
            eval_steps=1,
            eval_generate=0,
            eval_max_new_tokens=1,
            early_stopping_patience=1,
            max_bad_steps=1,
            learning_rate=0,
            vit_learning_rate=0,
            sampler_learning_rate=0,
            weight_decay=0,
            max_grad_norm=0,
        )
        for name, low, high in (
            ("adam_beta1", 0, 1),
            ("adam_beta2", 0, 1),
            ("plora_dropout", 0, 1),
            ("lora_dropout", 0, 1),
            ("warmup_ratio", 0, 1.0001),
        ):
            if not low <= getattr(self, name) < high:
                found.append(f"--{name} {getattr(self, name)}: must be at least {low} and below {high:g}")
        for name in ("adam_epsilon", "loraplus_lr_ratio", "hang_minutes", "save_minutes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                found.append(f"--{name} {getattr(self, name)}: must be above 0")
        if self.profile and not re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.profile):
            found.append(f"--profile {self.profile}: name the first and last step to trace, as in 10:12")
        elif self.profile and not self.traced_steps:
            found.append(f"--profile {self.profile}: the last step comes before the first")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            found.append("nothing to train: --num_train_epochs or --max_steps must be above 0")
        for name in self.report_to:
            if name not in ("none", *TRACKERS):
                found.append(f"--report_to {name}: choose from none, {', '.join(TRACKERS)}")
        found += self._contradictions()
        return found

    def _contradictions(self) -> list[str]:
        found = []
        if self.compile and "selective" in (self.gradient_checkpointing, self.vision_checkpointing):
            found.append(
                "--compile excludes selective checkpointing, which cannot see inside compiled code: use "
                "--gradient_checkpointing True or False"
            )
        if self.fix_vit and self.vit_learning_rate is not None:
            found.append("--vit_learning_rate has no effect while --fix_vit is True: set --fix_vit False")
        if self.fix_sampler and self.sampler_learning_rate is not None:
            found.append("--sampler_learning_rate has no effect while --fix_sampler is True")
        if not self.use_lora:
            needs_lora = [field.name for field in fields(self) if "lora" in field.name]
            needs_lora = [name for name in needs_lora if name not in ("use_lora", "plora_dropout")]
            for name in (*needs_lora, "use_dora"):
                if getattr(self, name) != getattr(Config, name):
                    found.append(f"--{name} has no effect without --use_lora True")
            if self.sharding == "none":
                found.append("--sharding none keeps a frozen base unsharded: it needs --use_lora True")
        elif self.save_dtype != "auto":
            found.append(
                "--save_dtype has no effect with --use_lora: an adapter is saved as it trains, in float32"
            )
        if self.fix_vit and not self.train_modules and self.vision_checkpointing is not None:
            found.append("--vision_checkpointing has no effect while --fix_vit is True: set --fix_vit False")
        if not self.shard_frozen_vision and not self.fix_vit:
            found.append("--shard_frozen_vision False is for a frozen vision tower: it needs --fix_vit True")
        if self.cpu_offload and (self.sharding == "none" or not self.shard_frozen_vision):
            name = "sharding none" if self.sharding == "none" else "shard_frozen_vision False"
            found.append(f"--cpu_offload moves only sharded parameters: it excludes --{name}")
        if self.optim_state == "bfloat16" and self.adam_beta2 > 0.996:
            found.append(
                f"--optim_state bfloat16 cannot express --adam_beta2 {self.adam_beta2}: use 0.996 or less"
            )
        if "none" in self.report_to and len(self.report_to) > 1:
            found.append("--report_to none excludes the trackers beside it")
        for name in [name for name in TRACKERS if name in self.report_to]:
            spec = find_spec(name)
            if spec is None or spec.origin is None:  # without an origin: a folder, such as wandb's own
                found.append(f"--report_to {name} needs {name}: pip install -e '.[{name}]'")
        if self.optim_state == "8bit" and find_spec("torchao") is None:
            found.append("--optim_state 8bit needs torchao: pip install 'torchao==0.18.*'")
        if self.use_dora and self.lora_dropout > 0:
            found.append(
                "--use_dora needs --lora_dropout 0: with dropout, peft's DoRA trains another function than "
                "it applies at inference, in layers that are more than a weight (PLoRA)"
            )
        if self.eval_data_path is not None and not Path(self.eval_data_path).is_file():
            found.append(f"--eval_data_path {self.eval_data_path}: there is no such file")
        needs = "--eval_data_path" if self.eval_data_path is None else "--eval_strategy epoch or steps"
        if not self.evaluates:
            for name in (
                *("eval_on_start", "eval_generate", "eval_metrics", "metric_for_best_model"),
                *("greater_is_better", "load_best_model_at_end", "early_stopping_patience"),
            ):
                if getattr(self, name) != getattr(Config, name):
                    found.append(f"--{name} has no effect without {needs}")
        elif self.eval_metrics and not self.eval_generate:
            found.append("--eval_metrics scores generated answers: it needs --eval_generate, such as 32")
        if not self.makes_checkpoints and self.save_total_limit is not None:
            found.append("--save_total_limit has no effect while --save_strategy is no")
        return found


# Replacements for the flags of the original scripts and of HF Trainer that have no meaning here.
REPLACED = {
    "deepspeed": "FSDP2 shards the model by itself; remove the flag",
    "fsdp": "the model is always sharded with FSDP2; remove the flag",
    "fsdp_config": "the model is always sharded with FSDP2; remove the flag",
    "fp16": "train with --bf16 True, which needs no loss scaling",
    "batch_size": "use --per_device_train_batch_size; any batch size mixes images and text",
    "local_rank": "torchrun sets it in the environment; remove the flag",
    "evaluation_strategy": "use --eval_strategy, with --eval_data_path",
    "per_device_eval_batch_size": "evaluation takes rows as training does; remove the flag",
    "torch_compile": "use --compile",
    "tf32": "call torch.set_float32_matmul_precision in trainer/main.py",
    "optim": "AdamW is built in trainer/main.py: edit it there",
    "remove_unused_columns": "every field of a record is kept; remove the flag",
}


def parse(argv: Sequence[str] | None = None) -> Config:
    """Read the trainer's flags; raise `ConfigError` with all problems.

    Only the values themselves are checked (`Config.problems`); the model and the data are read later.
    """
    return parse_flags(Config, argv, "trainer.main", REPLACED)
