"""The whole run, top to bottom: read it, edit it.

    torchrun --nproc_per_node 8 -m trainer.main --model_name_or_path MODEL --data_path data.txt

Input: a Hugging Face folder and a data.txt (trainer/config.py lists the flags). Output in `output_dir`: the
trained model as a Hugging Face folder, `checkpoint-<step>/`, `metrics.jsonl` (a line a logged step) and
`run.json`. One step on 2 ranks, with 2 micro-batches of 4 samples each: of the step's 16 samples every rank
computes 8; the summed losses are divided once, by the supervised tokens of all 16; gradients are summed over
ranks in the last micro-batch.

Exit status: 0 finished; 2 bad input, nothing trained; 75 stopped on request: run again; 1 anything else.
"""

import faulthandler
import math
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from data.errors import DataError
from data.flags import ConfigError
from data.ledger import ledger_rows, ledger_table, tally
from data.loader import StepLoader
from trainer.adapter_folder import save_adapter
from trainer.atomic import Jobs, what_is_safe
from trainer.checkpoint import Checkpoints, SaveError, load, resumable
from trainer.config import Config, parse
from trainer.distributed import (
    BAD_INPUT,
    FAILED,
    STOPPED,
    Ranks,
    agree_on_problems,
    all_max,
    all_sum,
    device_mesh,
    finish,
    is_lost_peer,
    leave,
    log,
    no_bar,
    start,
    step_seed,
)
from trainer.extras.flops import count_flops, matmul_peak
from trainer.extras.profile import Phases
from trainer.extras.replay import write_capsule
from trainer.lock import Lock
from trainer.lora import load_adapters
from trainer.loss import chunked_cross_entropy
from trainer.metrics import MetricsFile, part_of
from trainer.optim import adamw, learning_rate_factor, parameter_groups
from trainer.parallelize import allocate, parallelize, set_communication
from trainer.prepare import make_plan, say
from trainer.rehearsal import bytes_of_a_save, longest_micro_batch, prepare_output_dir, rehearse
from trainer.resume import choose_start, describe_run
from trainer.stopping import StopRequest, wait_for_the_end
from trainer.trainable import refuse_idle
from trainer.weights import load_weights, save_model_folder, weights_dtype


def train(config: Config, ranks: Ranks, lock: Lock) -> int:
    """One run of a checked configuration, with the lock of its output_dir; returns the exit status."""
    device, output_dir, base = ranks.device, Path(config.output_dir), Path(config.model_name_or_path)

    # --- the plan: whatever is wrong with the files shows here, before any weight is read ----------------
    plan = make_plan(config, ranks)
    if plan is None:
        return BAD_INPUT
    adapters, sources, total_steps = plan.adapters, plan.sources, plan.total_steps
    run = describe_run(config, plan, ranks)
    if agree_on_problems(lock.take() if ranks.rank == 0 else []):
        return BAD_INPUT
    try:
        begin = choose_start(config, run)
    except ValueError as error:
        agree_on_problems(str(error).splitlines())
        return BAD_INPUT
    if begin.finished:
        return 0

    # --- the model: sharded while it has no memory, then every rank reads its own part -------------------
    model: Any = plan.model
    base_dtype = weights_dtype(base)
    # A full model is saved with its frozen parts as they were; a base under adapters is not saved.
    frozen_dtype = torch.float32 if not config.bf16 else torch.bfloat16 if adapters else base_dtype
    in_float32 = plan.training | (adapters.saved if adapters else set())
    parts_by_name = {name: part_of(name, plan.parts) for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in plan.training)
        parameter.data = parameter.data.to(torch.float32 if name in in_float32 else frozen_dtype)
    model = parallelize(
        model,
        device_mesh(ranks, hybrid=config.sharding == "hybrid"),
        plan.parts,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        vision_checkpointing=config.vision_checkpointing,
        vision_micro_batch=config.vision_micro_batch,
        shard_frozen=config.sharding != "none",
        reshard_after_forward=config.reshard_after_forward,
        forward_prefetch=config.forward_prefetch,
        cpu_offload=config.cpu_offload,
        compiled=config.compile,
    )
    allocate(model, device, config.cpu_offload)
    loaded = load_weights(model, base, optional=plan.parts.unused)
    if adapters:
        load_adapters(model, adapters, config.seed)
    model.init_buffers()
    model.loss_function = chunked_cross_entropy(config.loss_chunk_tokens)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = parameter_groups(
        trained, parts_by_name, config.learning_rates, config.weight_decay, config.original_weight_decay
    )
    optimizer = adamw(groups, config.adam_betas, config.adam_epsilon, device, config.optim_state)

    # --- say what will happen -----------------------------------------------------------------------------
    say(plan, config, ranks, loaded)
    save_dtype = base_dtype if config.save_dtype == "auto" else getattr(torch, config.save_dtype)
    if begin.folder:
        load(begin.folder, resumable(trained, optimizer))
    space = bytes_of_a_save(model, trained, resumable(trained, optimizer), save_dtype, config)
    if agree_on_problems(prepare_output_dir(output_dir, run, begin, space) if ranks.rank == 0 else []):
        return BAD_INPUT
    metrics = MetricsFile(output_dir if ranks.rank == 0 else None, config.report_to == "tensorboard")
    described = (plan.model_config, plan.tokenizer)

    def write_model(folder: Path, jobs: Jobs) -> None:
        if adapters:
            save_adapter(model, adapters, *described, folder, jobs)
        else:
            save_model_folder(model, *described, plan.parts, folder, save_dtype, loaded.carried, jobs)

    # --- the loop ----------------------------------------------------------------------------------------
    loader = StepLoader(
        plan.reader,
        plan.sampler,
        rank=ranks.rank,
        num_ranks=ranks.world,
        samples_per_micro_batch=config.per_device_train_batch_size,
        num_steps=total_steps,
        first_step=begin.step,
        num_workers=config.dataloader_num_workers,
        on_bad_sample="skip" if config.on_bad_sample == "skip" else "error",
        packing=plan.packing,
    )
    checkpoints = Checkpoints(run, config, lock, plan.sampler.steps_per_epoch, total_steps)
    log(checkpoints.first_save(begin.step))
    stop = StopRequest(output_dir, lock.release)
    flops = count_flops(model)
    peak = matmul_peak(device, config.bf16) if config.measure_mfu else None
    phases = Phases(model, plan.parts, ranks, config)
    if config.rehearse:
        longest = longest_micro_batch(plan.reader, config.per_device_train_batch_size, plan.packing)
        rehearse(model, longest, device, config)
    batches = iter(loader)
    # leave=False: what a run that ends early prints last is why, not the bar.
    options = {"unit": "step", "dynamic_ncols": True, "leave": False}
    bar = tqdm(total=total_steps, initial=begin.step, disable=no_bar(), **options)
    # Since the last line of metrics: seconds and steps; tokens and FLOPs of vision and of language; and by
    # source the sums of data.ledger.tally, these since the epoch began too.
    seconds, window_steps = begin.notes.get("clock", [0.0, 0])
    window_started = time.perf_counter() - seconds
    work = torch.tensor(begin.notes.get("work", [0.0, 0.0, 0.0]), dtype=torch.float64)
    window, epoch = torch.zeros(2, 4, len(sources), dtype=torch.float64)
    window += torch.tensor(begin.notes.get("window", 0.0), dtype=torch.float64)
    epoch += torch.tensor(begin.notes.get("epoch", 0.0), dtype=torch.float64)
    skipped_steps, bad_steps = begin.notes.get("counts", [0, 0])
    for step in range(begin.step + 1, total_steps + 1):
        faulthandler.dump_traceback_later(60 * config.hang_minutes, exit=True)
        phases.start(step)
        micro_batches = next(batches)
        phases(None)
        torch.manual_seed(step_seed(config.seed, step, ranks.rank))  # what dropout draws

        # One mean over the supervised tokens of the global batch, whatever rank or micro-batch has them.
        # The last two columns are requests that all ranks must hear in the same step.
        rows = [(m.num_supervised, m.num_tokens, *flops.of(m), 0, 0) for m in micro_batches]
        rows.append((0, 0, 0, 0, stop.asked(), checkpoints.minutes_are_over()))
        counts = all_sum(torch.tensor(rows, dtype=torch.float64, device=device).sum(0))
        num_supervised = counts[0].clamp(min=1.0)
        sums = torch.zeros(4, len(sources), dtype=torch.float64, device=device)

        for i, micro_batch in enumerate(micro_batches):
            set_communication(model, config, is_last=i == len(micro_batches) - 1)
            phases("host_to_device")
            micro_batch = micro_batch.to(device)
            outputs = model(**micro_batch.inputs)  # outputs.loss: a sum, float32
            if config.loss_average == "micro_batch":
                divisor = max(1, micro_batch.num_supervised) * len(micro_batches) * ranks.world
            else:
                divisor = num_supervised
            (outputs.loss / divisor).backward()
            sums += tally(micro_batch, outputs.token_losses, len(sources))

        if step == 1:
            refuse_idle(trained)
        # --- step, unless a number is not finite; all ranks read the same, the one wait for the device -----
        phases("optimizer")
        grad_norm = get_total_norm([p.grad for p in trained.values() if p.grad is not None])
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        numbers = torch.cat([all_sum(sums).flatten(), counts, norm.to(device, torch.float64).view(1)]).cpu()
        step_sums, step_work = numbers[:-7].view(4, -1), numbers[-6:-3]
        stopping, minutes_over, norm = numbers[-3:].tolist()
        factor = learning_rate_factor(config.lr_scheduler_type, step - 1, total_steps, plan.warmup_steps)
        if math.isfinite(norm) and step_sums.isfinite().all():
            clip_grads_with_norm_(trained.values(), config.max_grad_norm or math.inf, grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            window += step_sums
            epoch += step_sums
            work += step_work
            bad_steps = 0
        else:
            skipped_steps += 1
            bad_steps += 1
            capsule = write_capsule(step, run, sources, micro_batches, sums[3], trained, norm)
            log(f"\nwarning: step {step} is skipped: its loss or gradient is not finite; see {capsule}")
        optimizer.zero_grad(set_to_none=True)
        phases(None)
        window_steps += 1
        bar.update()

        # --- say what happened -----------------------------------------------------------------------------
        if step % config.logging_steps == 0 or step == total_steps:
            samples, left_out, supervised, loss_sum = window.sum(1).tolist()
            by_source = zip(sources, *window[2:].tolist(), strict=True)
            tokens, vision_flops, language_flops = work.tolist()
            seconds = time.perf_counter() - window_started
            mfu = (vision_flops + language_flops) / seconds / peak if peak else None
            loss = loss_sum / supervised if supervised else math.nan
            memory = int(all_max(phases.memory.of_window(), device))
            metrics.write(
                kind="train",
                step=step,
                epoch=step / plan.sampler.steps_per_epoch,
                loss=loss,
                learning_rate=config.learning_rate * factor,
                grad_norm=norm,
                samples=int(samples),
                tokens=int(tokens),
                supervised_tokens=int(supervised),
                left_out_samples=int(left_out),
                skipped_steps=skipped_steps,
                tokens_per_second=tokens / seconds,
                supervised_tokens_per_second=supervised / seconds,
                samples_per_second=samples / seconds,
                model_flops_vision=vision_flops,
                model_flops_language=language_flops,
                mfu=mfu,
                seconds_step=seconds / window_steps,
                seconds_data_wait=phases.host_seconds["data_wait"] / window_steps,
                seconds_saving=phases.host_seconds["saving"] / window_steps,
                planned_idle_share=loader.idle_share(step - 1),
                memory_peak_bytes=memory,
                loss_by_source={source.name: total / count for source, count, total in by_source if count},
            )
            summary = (
                f"loss {loss:.4f}, lr {config.learning_rate * factor:.2e}, "
                f"{tokens / seconds:,.0f} tokens/s ({supervised / seconds:,.0f} supervised), "
                f"{samples / seconds:,.1f} samples/s, {f'MFU {mfu:.1%}, ' if mfu else ''}"
                f"data wait {phases.host_seconds['data_wait'] / seconds:.1%}, memory {memory / 2**30:.1f} GiB"
            )
            bar.set_postfix_str(summary)
            if no_bar():
                log(f"step {step} of {total_steps}: {summary}")
            window_started, window_steps = time.perf_counter(), 0
            phases.host_seconds.clear()
            work.zero_()
            window.zero_()
            skipped_steps = 0
        if step % plan.sampler.steps_per_epoch == 0:
            number = step // plan.sampler.steps_per_epoch - 1
            ledger = ledger_rows(sources, epoch, number)
            metrics.write(kind="epoch", step=step, epoch=number, sources=ledger)
            log(f"\nepoch {number}\n{ledger_table(ledger)}")
            epoch.zero_()

        if bad_steps >= config.max_bad_steps:
            log(f"\nerror: {bad_steps} steps in a row were not finite: see trainer/extras/replay.py")
            checkpoints.wait()
            return FAILED

        # --- save ----------------------------------------------------------------------------------------
        due = checkpoints.is_due(step) or (stopping and step < total_steps)
        if due or (minutes_over and step < total_steps):
            notes = {"window": window.tolist(), "epoch": epoch.tolist(), "work": work.tolist()}
            notes["counts"] = [skipped_steps, bad_steps]
            notes["clock"] = [time.perf_counter() - window_started, window_steps]
            phases("saving")
            checkpoints.save(step, write_model, resumable(trained, optimizer), notes, not due)
        if measured := phases.stop(step, is_last=stopping or step == total_steps):
            metrics.write(kind="phases", step=step, **measured)
        if stopping and step < total_steps:
            checkpoints.wait()
            stop.honoured()
            log(f"\nstopped after step {step} of {total_steps}, as asked; {what_is_safe(output_dir)}")
            return FAILED if checkpoints.failed else STOPPED
    bar.leave = True
    bar.close()

    # --- the end: the model itself in output_dir --------------------------------------------------------
    faulthandler.cancel_dump_traceback_later()
    checkpoints.save_final_model(total_steps, write_model)
    stop.honoured()
    log(f"the trained {'adapter' if adapters else 'model'} is in {output_dir}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, join the other ranks, train; every failure ends as a sentence or one traceback, and a status."""
    try:
        config = parse(argv)
    except ConfigError as error:
        log("\n".join(f"error: {problem}" for problem in str(error).splitlines()))
        return BAD_INPUT
    ranks = start(60 * config.hang_minutes + 60, host_collectives=config.cpu_offload)  # after the watchdog
    try:
        with Lock(Path(config.output_dir)) as lock:
            status = train(config, ranks, lock)
    except SaveError as error:  # the same on every rank
        log(f"\nerror: {error}")
        return FAILED
    except DataError as error:
        log(f"\nerror: rank {ranks.rank}: {error}", every_rank=True)  # below the bar
        return FAILED
    except Exception as error:
        if is_lost_peer(error):
            wait_for_the_end()
        log(f"\nerror: rank {ranks.rank} raised:\n{traceback.format_exc()}", every_rank=True)
        if is_lost_peer(error):
            log(
                "error: it has lost another rank, perhaps of another machine; that one says why",
                every_rank=True,
            )
        return FAILED
    finish()
    return status


if __name__ == "__main__":
    leave(main())
