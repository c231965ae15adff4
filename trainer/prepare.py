"""The plan of a run, made before any weight is read: the data, the description of the model, the steps.

Input: a configuration whose values are valid. Output: a `Plan`, or None after all problems of all files have
been logged together.

    plan = make_plan(config, ranks)
    plan.model                    # on the meta device: shapes and dtypes, no memory
    plan.total_steps              # 750: 3 epochs of 4,000 samples, 16 per step

With packing, the length of every sample is measured here on all cores; the next start reads a cache.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import trainer.models
from data.errors import DataError
from data.lengths import bad_samples, measure_lengths, needed_records, num_cut
from data.loader import SampleReader, StepLoader
from data.mixture import Source, read_mixture
from data.packing import CostModel, Packing
from data.reader import cost_model, open_reader
from data.sampler import StepSampler
from trainer.adapter_folder import adapter_preprocessing, adapter_template, loads_by_itself
from trainer.atomic import output_dir_problems
from trainer.config import Config
from trainer.distributed import Ranks, all_max
from trainer.evaluate import EvalPlan, plan_evaluation
from trainer.job import agree_on_problems, is_main, log, rank_zero_first
from trainer.lora import Adapters, add_adapters
from trainer.models import Parts, build_model, flops_of, parts_of, set_options
from trainer.models.family import Flops
from trainer.trainable import model_table, parameter_rows, set_trainable, trained_names
from trainer.weights import LoadReport, weights_dtype


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the weights are read; the same on every rank."""

    tokenizer: PreTrainedTokenizerBase
    model_config: PreTrainedConfig
    model: PreTrainedModel
    """On the meta device, with dtypes and requires_grad set."""
    parts: Parts
    adapters: Adapters | None
    training: set[str]
    """Names of the parameters that train."""
    save_dtype: torch.dtype
    """Dtype of the saved weights."""
    reader: SampleReader
    flops: Flops | None
    """Operations of the model, with --measure_mfu; else None."""
    sampler: StepSampler
    packing: Packing | None
    evaluation: EvalPlan | None
    global_batch: int
    """Samples per optimizer step."""
    total_steps: int
    warmup_steps: int

    @property
    def sources(self) -> list[Source]:
        return list(self.reader.sources)

    def parameter_rows(self, config: Config) -> list[dict[str, Any]]:
        """The rows of the table at the start: which parameters train, at which rate, and in which dtype."""
        in_adapter = self.adapters.saved if self.adapters else None
        return parameter_rows(self.model, self.parts, config.learning_rates, in_adapter)


def make_plan(config: Config, ranks: Ranks) -> Plan | None:
    """Read all files except weights; every rank calls it. None if rank 0 has logged problems."""
    plan, problems = describe(config, ranks)
    if agree_on_problems([*_machine_problems(config, ranks), *problems]):
        return None
    assert plan is not None
    if not config.packing:
        return plan
    cost = cost_model(trainer.models, plan.model_config, config.fix_vit)
    packing, problems = measure(plan.reader, plan.sampler, plan.total_steps, cost, config)
    plan = replace(plan, packing=packing)
    if plan.evaluation:
        reader, sampler = plan.evaluation.reader, plan.evaluation.sampler
        packing, more_problems = measure(reader, sampler, sampler.steps_per_epoch, cost, config)
        plan = replace(plan, evaluation=replace(plan.evaluation, packing=packing))
        problems += more_problems
    return None if agree_on_problems(problems) else plan


def describe(config: Config, ranks: Ranks, *, for_training: bool = True) -> tuple[Plan | None, list[str]]:
    """The plan without the lengths of samples, or None; and all problems of the files, a sentence each.

    for_training: False for a plan that nothing is loaded or saved with. It needs neither weights, which
    are then taken to be bfloat16, nor data.
    """
    problems: list[str] = []
    sources, eval_sources = list[Source](), list[Source]()
    plan = None
    if config.sharding == "hybrid" and not for_training:
        problems += uneven_nodes(ranks)
    problems += config.batch_problems(ranks.world)
    files = [(config.data_path, sources)] if config.data_path or for_training else []
    if config.eval_data_path is not None and config.evaluates:
        files.append((config.eval_data_path, eval_sources))
    for path, found in files:
        try:
            with rank_zero_first():
                found += read_mixture(
                    path,
                    config.given_num,
                    config.image_root,
                    skip_bad=config.on_bad_sample == "skip",
                    show_progress=ranks.rank == 0,
                )
        except DataError as error:
            problems += str(error).splitlines()
    try:
        plan = _describe_model(config, ranks, sources, for_training)
        problems += _text_only_problems(plan, config)
        if eval_sources:
            evaluation = plan_evaluation(config, plan.reader, eval_sources, plan.global_batch)
            plan = replace(plan, evaluation=evaluation)
    except (ValueError, OSError) as error:
        problems += str(error).splitlines()
    return plan, problems


def measure(
    reader: SampleReader, sampler: StepSampler, num_steps: int, cost: CostModel, config: Config
) -> tuple[Packing, list[str]]:
    """Measure the samples of the first `num_steps` steps; also returns the problems of bad ones."""
    needed = needed_records(sampler, range(num_steps))
    lengths, problems = [], []
    try:
        with rank_zero_first():
            lengths = measure_lengths(reader, needed, show_progress=is_main())
        if config.on_bad_sample == "error":
            problems = bad_samples(reader, lengths)
    except DataError as error:  # a file changed while it was read
        problems = str(error).splitlines()
    return Packing(lengths, config.row_tokens, cost), problems


def uneven_nodes(ranks: Ranks) -> list[str]:
    """The problem, if not all nodes can have as many ranks."""
    if ranks.world % ranks.local_world == 0:
        return []
    return [
        f"--sharding hybrid: {ranks.world} ranks are not a whole number of nodes of {ranks.local_world}; "
        "give every node as many ranks, or use --sharding full"
    ]


def _machine_problems(config: Config, ranks: Ranks) -> list[str]:
    """Problems with output_dir, and flags that this machine cannot satisfy, a sentence each."""
    read = {name: getattr(config, name) for name in ("model_name_or_path", "lora_weight_path")}
    problems = output_dir_problems(Path(config.output_dir), read)
    if config.sharding == "hybrid":
        fewest, most = (int(sign * all_max(sign * ranks.local_world, ranks.device)) for sign in (-1, 1))
        if fewest < most:
            problems.append(
                f"--sharding hybrid: some nodes have {fewest} ranks and others {most}; give every node as "
                "many ranks, or use --sharding full"
            )
        else:
            problems += uneven_nodes(ranks)
    if config.cpu_offload and ranks.device.type == "cpu":
        problems.append(
            "--cpu_offload: there is no accelerator here, so everything is in host memory already; "
            "remove the flag"
        )
    if config.attn_implementation == "flex_attention" and ranks.device.type == "cpu":
        problems.append("--attn_implementation flex_attention has no backward pass on a CPU: use sdpa")
    return problems


def _text_only_problems(plan: Plan, config: Config) -> list[str]:
    """A sentence for each part that should train but gets no gradient, because the data has no images."""
    if not plan.sources or any(source.records.num_images for source in plan.sources):
        return []
    by_name = "take its layers out of --lora_target_modules and --train_modules"
    return [
        f"the data has no images, so the {what} would get no gradient: {remedy}"
        for what, remedy, prefixes in (
            (
                "vision tower",
                by_name if config.fix_vit else "freeze it with --fix_vit True",
                plan.parts.vision,
            ),
            (
                "projector",
                by_name if config.fix_sampler else "freeze it with --fix_sampler True",
                plan.parts.projector,
            ),
        )
        if any(name.startswith(prefixes) for name in plan.training)
    ]


def _describe_model(config: Config, ranks: Ranks, sources: list[Source], for_training: bool) -> Plan:
    base = Path(config.model_name_or_path)
    has_weights = for_training or any(base.glob("*.safetensors"))
    base_dtype = weights_dtype(base) if has_weights else torch.bfloat16
    preprocessing = adapter_preprocessing(config.lora_weight_path)
    template = adapter_template(config.lora_weight_path, base)
    reader, model_config = open_reader(config, sources, trainer.models, preprocessing, template)
    set_options(model_config, plora_dropout=config.plora_dropout)
    model_config._attn_implementation = config.attn_implementation
    parts = parts_of(model_config)
    with torch.device("meta"):
        try:
            model = build_model(model_config)
        except (ImportError, ValueError) as error:
            if config.attn_implementation in ("sdpa", "eager"):
                raise
            # No kernel of this name is known, or its package is missing.
            raise ValueError(
                f"--attn_implementation {config.attn_implementation}: {' '.join(str(error).split())} "
                "Install it if it is a package, or use --attn_implementation sdpa"
            ) from error
        adapters = None
        if config.use_lora:
            adapters = add_adapters(model, parts, config, None if for_training else "")
    training = trained_names(model, parts, config)
    # A full model is saved with its frozen parts unchanged; the base of adapters is not saved.
    frozen_dtype = torch.float32 if not config.bf16 else torch.bfloat16 if adapters else base_dtype
    set_trainable(model, training, training | (adapters.saved if adapters else set()), frozen_dtype)
    vision = {p for name, p in model.named_parameters() if name.startswith(parts.vision)}
    vision_trains = any(parameter.requires_grad for parameter in vision)
    if not config.shard_frozen_vision:
        if vision_trains:
            raise ValueError(
                "--shard_frozen_vision False is for a frozen vision tower: take its layers out of "
                "--lora_target_modules and --train_modules"
            )
        if config.bf16 and any(parameter.dtype != torch.bfloat16 for parameter in vision):
            raise ValueError(
                f"--shard_frozen_vision False: {base} does not store the vision tower in bfloat16, so it "
                "would not compute in bfloat16 either: use --shard_frozen_vision True"
            )
    if config.compile and any("forward" in vars(block) for blocks in parts.blocks(model) for block in blocks):
        raise ValueError(
            "--compile: linear attention and convolutions of this model run once for each sample of a row, "
            "which cannot be compiled; remove the flag"
        )
    flops = flops_of(model, reader) if config.measure_mfu else None
    # Whole on every rank, a frozen tower has no collectives, so a rank without images need not run it; but
    # all ranks must have a gradient of the projector, or none.
    projector = [p for name, p in model.named_parameters() if name.startswith(parts.projector)]
    projector_trains = any(parameter.requires_grad for parameter in projector)
    reader.needs_images = (
        vision_trains
        or (config.shard_frozen_vision and config.sharding != "none")
        or (projector_trains and not parts.projects_nothing)
    )
    global_batch = config.global_batch(ranks.world)
    sampler = StepSampler(sources, config.seed, global_batch)
    total_steps = math.ceil(config.num_train_epochs * sampler.steps_per_epoch)
    if config.max_steps > 0:
        total_steps = config.max_steps
    return Plan(
        tokenizer=reader.encoder.tokenizer,
        model_config=model_config,
        model=model,
        parts=parts,
        adapters=adapters,
        training=training,
        save_dtype=base_dtype if config.save_dtype == "auto" else getattr(torch, config.save_dtype),
        reader=reader,
        flops=flops,
        sampler=sampler,
        packing=None,
        evaluation=None,
        global_batch=global_batch,
        total_steps=total_steps,
        warmup_steps=math.ceil(config.warmup_ratio * total_steps),
    )


def open_loader(plan: Plan, config: Config, ranks: Ranks, first_step: int) -> StepLoader:
    """The micro-batches of this rank, one list per step, starting at `first_step` (counted from 0)."""
    return StepLoader(
        plan.reader,
        plan.sampler,
        rank=ranks.rank,
        num_ranks=ranks.world,
        samples_per_micro_batch=config.per_device_train_batch_size,
        num_steps=plan.total_steps,
        first_step=first_step,
        num_workers=config.dataloader_num_workers,
        on_bad_sample="skip" if config.on_bad_sample == "skip" else "error",
        packing=plan.packing,
    )


def log_plan(plan: Plan, config: Config, ranks: Ranks, loaded: LoadReport) -> None:
    """Log which parameters train, the sources and the batch arithmetic; `loaded`: the report on the base."""
    adapters, base = plan.adapters, Path(config.model_name_or_path)
    log(model_table(plan.parameter_rows(config)))
    if adapters and not loads_by_itself(base, plan.parts):
        log(
            f"{base} has no code that today's transformers can run: to use the adapter without this "
            f"project, `python -m trainer.export --modernise {base} NEW_BASE --adapter {config.output_dir}`"
        )
    if loaded.carried and not adapters:
        log(
            f"{len(loaded.carried)} tensors of {base} are unknown to the model and will be saved unchanged, "
            f"first {next(iter(loaded.carried))}"
        )
    for number, source in enumerate(plan.sources):
        log(f"{source.name}: {len(source.records):,} records, {source.num_samples:,} samples per epoch")
        if source.repetition:
            log(f"warning: {source.repetition}")
        if plan.packing and (cut := num_cut(lengths := plan.packing.lengths[number])):
            measured = int((lengths[:, 0] >= 0).sum())
            outcome = "are left out" if config.on_long_sample == "skip" else "are truncated"
            log(
                f"warning: {source.name}: {cut:,} of {measured:,} measured samples are over "
                f"max_length={config.max_length} and {outcome}"
            )
    if plan.evaluation:
        parts = [f"{s.num_samples:,} samples of {s.name}" for s in plan.evaluation.reader.sources]
        asked = f", {len(plan.evaluation.questions):,} of them questions" if config.eval_generate else ""
        log(f"evaluation on {', '.join(parts)}{asked}")
    rows = (
        f"packed into rows of at most {config.row_tokens:,} tokens"
        if plan.packing
        else f"{config.per_device_train_batch_size} per padded micro-batch"
    )
    size, accumulated = config.per_device_train_batch_size, config.accumulation(ranks.world)
    sign = "=" if plan.global_batch == size * accumulated * ranks.world else "≤"
    log(
        f"global batch {plan.global_batch} samples {sign} {size} per device × {accumulated} accumulated "
        f"× {ranks.world} ranks, {rows}; "
        f"{plan.sampler.steps_per_epoch} steps per epoch, {plan.total_steps} in all, "
        f"{plan.warmup_steps} of them warm-up"
    )
