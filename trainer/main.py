"""The whole training run, from top to bottom: meant to be read and edited.

    torchrun --nproc_per_node 8 -m trainer.main --model_name_or_path MODEL --data_path data.txt

Input: a Hugging Face folder and a data.txt (trainer/config.py lists the flags). Output in `output_dir`: the
trained model as a Hugging Face folder, `checkpoint-<step>/`, `metrics.jsonl` (one line per logged step),
`run.json` and `report.html`. In a step on 2 ranks with 2 micro-batches of 4 samples each, every rank computes
8 of the step's 16 samples; the summed losses are divided once, by the number of supervised tokens in all 16;
gradients are summed over the ranks in the last micro-batch.

Exit status: 0 finished; 2 bad input, nothing trained; 75 stopped on request, resumable; 1 any other failure.
"""

import faulthandler
import functools
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("loading PyTorch and transformers", file=sys.stderr, flush=True)  # the imports take some seconds

import torch
from torch.profiler import record_function
from tqdm import tqdm

from data.errors import DataError
from trainer.check_model import check_model, problems_of
from trainer.checkpoint import Checkpoints, LoadError, SaveError, load, resumable
from trainer.config import Config, ConfigError, parse
from trainer.distributed import Ranks, device_mesh, finish, make_deterministic, start, step_seed
from trainer.evaluate import Evaluation
from trainer.job import (
    BAD_INPUT,
    FAILED,
    LOST_PEER,
    STOPPED,
    agree_on_problems,
    is_lost_peer,
    leave,
    log,
    no_bar,
    tell_failure,
)
from trainer.lock import Lock
from trainer.loss import chunked_cross_entropy
from trainer.metrics import MetricsFile, Window, sum_over_ranks, summary, write_capsule
from trainer.model_card import write_card
from trainer.model_files import load_model, save_model
from trainer.optim import adamw, clip_gradients, learning_rate_factor, parameter_groups, squared_norm
from trainer.parallelize import allocate, parallelize, set_communication
from trainer.prepare import log_plan, make_plan, open_loader
from trainer.rehearsal import bytes_of_a_save, largest_micro_batches, prepare_output_dir, rehearse
from trainer.report import write_own_report
from trainer.resume import choose_start, describe_run
from trainer.stopping import StopRequest, wait_for_the_end
from trainer.trackers import Trackers
from trainer.trainable import part_of


def train(config: Config, ranks: Ranks, lock: Lock, trackers: Trackers) -> int:
    """Run a checked configuration, with the lock of its output_dir; returns the exit status."""
    device, output_dir = ranks.device, Path(config.output_dir)

    # --- the plan: problems with the files are reported here, before any weight is read ------------------
    plan = make_plan(config, ranks)
    if plan is None:
        return BAD_INPUT
    sources, total_steps, steps_per_epoch = plan.sources, plan.total_steps, plan.sampler.steps_per_epoch
    run = describe_run(config, plan, ranks)
    if agree_on_problems(lock.take() if ranks.rank == 0 else []):
        return BAD_INPUT
    start_point, problems = None, []
    try:
        start_point = choose_start(config, run)
    except ValueError as error:
        problems = str(error).splitlines()
    if agree_on_problems(problems) or start_point is None:
        return BAD_INPUT
    if start_point.finished:
        return 0
    forecaster = None
    if config.forecast and ranks.rank == 0:
        from trainer.forecast.at_start import Forecaster

        forecaster = Forecaster(config, ranks)

    # --- the model: sharded on the meta device, then every rank reads its own shards ---------------------
    mesh = device_mesh(ranks, hybrid=config.sharding == "hybrid")
    model: Any = parallelize(plan.model, mesh, plan.parts, config)
    allocate(model, device, config.cpu_offload)
    loaded = load_model(model, plan, config)
    model.loss_function = chunked_cross_entropy(config.loss_chunk_tokens)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts_by_name = {name: part_of(name, plan.parts) for name in trained}
    groups = parameter_groups(
        trained, parts_by_name, config.learning_rates, config.weight_decay, config.original_weight_decay
    )
    optimizer = adamw(groups, config.adam_betas, config.adam_epsilon, device, config.optim_state)

    # --- log the plan, restore the state, check the model, prepare output_dir ----------------------------
    log_plan(plan, config, ranks, loaded)
    if start_point.folder:
        load(start_point.folder, resumable(trained, optimizer))
    checks = check_model(model, plan, config, device) if config.check_model else []
    if agree_on_problems(problems_of(checks)):
        return BAD_INPUT
    space = bytes_of_a_save(model, trained, resumable(trained, optimizer), plan.save_dtype, config)
    if agree_on_problems(prepare_output_dir(output_dir, run, start_point, space) if ranks.rank == 0 else []):
        return BAD_INPUT
    if forecaster:
        forecaster.tell(output_dir)
    metrics = MetricsFile(output_dir if ranks.rank == 0 else None, trackers)
    write_model = functools.partial(save_model, model, plan, loaded)

    # --- the loop ----------------------------------------------------------------------------------------
    loader = open_loader(plan, config, ranks, start_point.step)
    checkpoints = Checkpoints(run, config, lock, steps_per_epoch, total_steps)
    log(checkpoints.first_save(start_point.step))
    stop = StopRequest(output_dir)
    evaluation = Evaluation(
        model, plan.evaluation, config, ranks, steps_per_epoch, total_steps, start_point.notes
    )
    if evaluation.has_stalled:
        total_steps = start_point.step
    flops, peak, tracer = plan.flops, None, None
    if config.measure_mfu:
        from trainer.extras.flops import matmul_peak

        peak = matmul_peak(device, config.bf16)
    if config.profile:
        from trainer.extras.profile import Tracer

        tracer = Tracer(config, ranks)
    if config.rehearse:
        for largest in largest_micro_batches(plan.reader, config.per_device_train_batch_size, plan.packing):
            rehearse(model, largest, device, config)
    if config.eval_on_start and start_point.step == 0:
        metrics.write("eval", 0, **evaluation.run(0))
    batches = iter(loader)
    # leave=False: the last output of a run that ends early is the reason, not the bar.
    options = {"unit": "step", "dynamic_ncols": True, "leave": False}
    bar = tqdm(total=total_steps, initial=start_point.step, disable=no_bar(), **options)
    window = Window(sources, device, start_point.notes)
    for step in range(start_point.step + 1, total_steps + 1):
        faulthandler.dump_traceback_later(60 * config.hang_minutes, exit=True)
        if tracer:
            tracer.begin(step)
        with window.timed("data_wait"):
            micro_batches = next(batches)
        torch.manual_seed(step_seed(config.seed, step, ranks.rank))  # dropout
        # The global batch's supervised tokens, and requests to stop or save, which all ranks need at once.
        totals = sum_over_ranks(micro_batches, flops, stop.asked(), checkpoints.minutes_are_over(), device)

        for i, micro_batch in enumerate(micro_batches):
            set_communication(model, config, is_last=i == len(micro_batches) - 1)
            with record_function("host_to_device"):
                batch = micro_batch.to(device)
            with record_function("forward"):
                outputs = model(**batch.inputs)  # outputs.loss: a sum, float32
            # One mean over the global batch's supervised tokens, whichever rank or micro-batch they are in.
            divisor = totals[0].clamp(min=1.0)
            if config.loss_average == "micro_batch":
                divisor = max(1, batch.num_supervised) * len(micro_batches) * ranks.world
            with record_function("backward"):
                (outputs.loss / divisor).backward()
            window.add(batch, outputs.token_losses)

        # --- optimizer step, skipped if loss or gradient is not finite; all ranks decide alike -----------
        with record_function("optimizer"):
            gradients = [p.grad for p in trained.values() if p.grad is not None]
            loss_sum = window.loss_sum
            result = window.close_step(totals, squared_norm(gradients))  # the step's only device sync
            rate = learning_rate_factor(config.lr_scheduler_type, step - 1, total_steps, plan.warmup_steps)
            if result.is_finite:
                clip_gradients(gradients, result.grad_norm, config.max_grad_norm)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * rate
                optimizer.step()
            else:
                norm = result.grad_norm
                capsule = write_capsule(step, run, sources, micro_batches, loss_sum, trained, norm)
                log(f"\nwarning: step {step} is skipped: its loss or gradient is not finite; see {capsule}")
            del gradients  # or they would stay through the next step
            optimizer.zero_grad(set_to_none=True)
        bar.update()

        # --- log ------------------------------------------------------------------------------------------
        if step % config.logging_steps == 0 or step == total_steps:
            line = window.flush(peak)
            metrics.write(
                "train",
                step,
                epoch=step / steps_per_epoch,
                learning_rate=config.learning_rate * rate,
                planned_idle_share=micro_batches[0].planned_idle_share,
                **line,
            )
            text = summary(line, config.learning_rate * rate)
            bar.set_postfix_str(text)
            if no_bar():
                log(f"step {step} of {total_steps}: {text}")
        if step % steps_per_epoch == 0:
            epoch = step // steps_per_epoch - 1
            log(metrics.write_epoch(step, epoch, sources, window.flush_epoch()))
        if window.bad_steps >= config.max_bad_steps:
            log(f"\nerror: {window.bad_steps} steps in a row were not finite: see trainer/extras/replay.py")
            checkpoints.wait()
            return FAILED

        # --- evaluate, save, or stop ----------------------------------------------------------------------
        if evaluation.is_due(step):
            with window.timed("evaluating"):
                metrics.write("eval", step, **evaluation.run(step))
                write_own_report(config)
            if evaluation.has_stalled and step < total_steps:
                log(f"early stopping after step {step} of {total_steps}")
                total_steps = checkpoints.last_step = step
        stopping = result.stop and step < total_steps
        due = checkpoints.is_due(step) or stopping
        if due or evaluation.step_to_load == step or (result.save and step < total_steps):
            with window.timed("saving"):
                tensors, state = resumable(trained, optimizer), window.state() | evaluation.state()
                checkpoints.save(step, write_model, tensors, state, not due, evaluation.best_step)
        if tracer:
            tracer.end(step, is_last=stopping or step == total_steps)
        if stopping:
            checkpoints.wait()
            stop.honoured()
            log(f"\nstopped after step {step} of {total_steps}, as asked; {checkpoints.resume_hint()}")
            return FAILED if checkpoints.failed else STOPPED
        if step == total_steps:
            break
    bar.leave = True
    bar.close()

    # --- the final model, in output_dir itself -----------------------------------------------------------
    faulthandler.cancel_dump_traceback_later()
    best_step = evaluation.step_to_load
    checkpoints.save_final_model(total_steps, write_model, evaluation.state(), best_step)
    if ranks.rank == 0:
        write_card(output_dir, run, best_step or total_steps, plan.model_config, plan.parts)
    stop.honoured()
    which = f", that of step {best_step}," if best_step else ""
    log(f"the trained {'adapter' if plan.adapters else 'model'}{which} is in {output_dir}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, join the process group and train; a failure is one message or traceback, and a status."""
    rank = os.environ.get("RANK", "0")
    try:
        config, problems = None, []
        try:
            config = parse(argv)
        except ConfigError as error:
            problems = str(error).splitlines()
        if agree_on_problems(problems) or config is None:  # files may be missing on one machine alone
            return BAD_INPUT
        if config.deterministic:
            make_deterministic()
        # Collectives end after the watchdog.
        ranks = start(60 * config.hang_minutes + 60, host_collectives=config.cpu_offload)
        output_dir = Path(config.output_dir)
        with Lock(output_dir) as lock, Trackers(config.report_to, output_dir, vars(config)) as trackers:
            status = train(config, ranks, lock, trackers)
            if status != BAD_INPUT:
                write_own_report(config)
        finish()
        return status
    except (SaveError, LoadError) as error:  # the same on every rank
        log(f"\nerror: {error}", every_machine=True)
        return FAILED
    except DataError as error:
        log(f"\nerror: rank {rank}: {error}", every_rank=True)  # the newline ends the bar's line
        return FAILED
    except Exception as error:
        if is_lost_peer(error):
            wait_for_the_end()
        log(f"\nerror: rank {rank} raised:\n{traceback.format_exc()}", every_rank=True)
        if is_lost_peer(error):
            log(LOST_PEER, every_rank=True)
        return FAILED
    except BaseException:  # SystemExit or KeyboardInterrupt
        tell_failure()
        raise


if __name__ == "__main__":
    leave(main())
