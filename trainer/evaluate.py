"""Validation in the run: the mean loss, and scored answers, on samples that the training does not see.

Input: the model in training, and eval.txt (`--eval_data_path`). Output: a line of metrics.jsonl,

    {"kind": "eval", "step": 200, "epoch": 0.8, "loss": 1.21, "loss_by_source": {"ocr": 1.08, "pets": 1.31},
     "samples": 128, "supervised_tokens": 5120, "seconds": 3.2, "metrics": {"ocr": {"exact_match": 0.5}}}

and with `--eval_generate 32` the answers to 32 questions of each source, in eval/step-200.jsonl:

    {"source": "ocr", "record": 7, "id": "sign-7", "question": "What does it say?", "answer": "stop",
     "prediction": "Stop.", "images": ["/data/img/7.jpg"], "scores": {"exact_match": 1.0}}

The loss is a mean over all supervised tokens, packed and balanced over the ranks like training. Every
evaluation sees the same samples, and so does any number of ranks. It changes nothing in the training: no
dropout, no gradients, no random numbers, and the order of the data is a function of the step alone.
"""

import faulthandler
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from data.errors import DataError
from data.files import replace_file
from data.ledger import tally
from data.loader import SampleReader, StepLoader
from data.mixture import Source
from data.packing import Packing
from data.sample import Sample
from data.sampler import StepSampler, epoch_order
from trainer.atomic import MARKER
from trainer.config import Config
from trainer.distributed import Ranks, all_max, all_sum
from trainer.generate import answer_some
from trainer.job import is_main, log
from trainer.models import use_generation_defaults
from trainer.parallelize import gathered, reshard
from trainer.scores import closest, default_metrics, mean_scores, parse_metrics

PROMPTS_AT_ONCE = 8
"""Questions that a rank answers at a time."""

Question = tuple[int, int]
"""(source, record)"""


@dataclass(frozen=True)
class EvalPlan:
    """What is evaluated: known before any weight is read, and the same at every evaluation."""

    reader: SampleReader
    sampler: StepSampler
    """Its first epoch is evaluated."""
    packing: Packing | None
    questions: dict[Question, bool]
    """The samples that the model answers, source by source, and whether they have images."""
    metrics: dict[str, tuple[str, ...]]
    """The scores of each source's answers, by its name."""


def plan_evaluation(
    config: Config, reader: SampleReader, sources: Sequence[Source], global_batch: int
) -> EvalPlan:
    """What to evaluate, not yet packed; reader: of the training's samples; sources: those of eval.txt.

    The model answers the first `eval_generate` samples of each source, in the order of its first epoch.
    ValueError with everything that is wrong with these samples, unless bad ones are skipped, or the flags.
    """
    reader = replace(reader, sources=sources)
    questions: list[dict[Question, Sample]] = [{} for _ in sources]
    problems: list[str] = []
    for source, record in epoch_order(sources, config.seed, 0).tolist() if config.eval_generate else ():
        if len(questions[source]) < config.eval_generate:
            try:
                # With its pictures: one that cannot be decoded is told now, and not at the first evaluation.
                sample = reader.read_prompt(source, record)[0]
                if sample.answer is None:
                    raise DataError(
                        f"{sources[source].where(record)}: does not end with an assistant's turn, with which "
                        "the model's answer could be compared; add one or drop the record"
                    )
                questions[source][source, record] = sample
            except DataError as error:
                problems.append(str(error))
    if config.on_bad_sample == "skip":
        for problem in problems:
            log(f"warning: not among the questions of the evaluation: {problem}")
        problems = []
    metrics: dict[str, tuple[str, ...]] = {}
    try:
        chosen = parse_metrics(config.eval_metrics, [source.name for source in sources])
        for source, samples in zip(sources, questions, strict=True):
            answers = [[sample.answer] for sample in samples.values() if sample.answer is not None]
            if samples:
                metrics[source.name] = chosen.get(source.name) or default_metrics(answers)
        _check_metric_for_best(config, sources, metrics)
    except ValueError as error:
        problems += str(error).splitlines()
    if problems:
        raise ValueError("\n".join(problems))
    return EvalPlan(
        reader=reader,
        sampler=StepSampler(sources, config.seed, global_batch),
        packing=None,
        questions={q: bool(sample.images) for samples in questions for q, sample in samples.items()},
        metrics=metrics,
    )


def _check_metric_for_best(
    config: Config, sources: Sequence[Source], metrics: Mapping[str, Sequence[str]]
) -> None:
    """ValueError if no evaluation has the value of `metric_for_best_model`."""
    known = ["loss", *(f"loss/{source.name}" for source in sources)]
    for source, names in metrics.items():
        known += [*names, *(f"{name}/{source}" for name in names)]
    if (wanted := config.metric_for_best_model.removeprefix("eval_")) not in known:
        hint = closest(wanted, list(dict.fromkeys(known)))
        raise ValueError(f"--metric_for_best_model {wanted}: no evaluation gives this; {hint}")


class Evaluation:
    """The evaluations of one run, and which of them was the best. All ranks call all methods together."""

    def __init__(
        self,
        model: Any,
        plan: EvalPlan | None,
        config: Config,
        ranks: Ranks,
        steps_per_epoch: int,
        last_step: int,
        notes: Mapping[str, Any],
    ) -> None:
        """plan: None never evaluates; notes: of the checkpoint that the run goes on from, with `state()`."""
        self.model, self.config, self.ranks = model, config, ranks
        if plan:
            self.plan = plan
            use_generation_defaults(model, config.model_name_or_path)
        self.every: float = {"no": math.inf, "steps": config.eval_steps, "epoch": steps_per_epoch}[
            config.eval_strategy if plan else "no"
        ]
        self.steps_per_epoch, self.last_step = steps_per_epoch, last_step
        state = notes.get("evaluation", {})
        self.output_dir = Path(config.output_dir)
        self.name = config.metric_for_best_model.removeprefix("eval_")
        self.greater_is_better = config.greater_is_better
        if self.greater_is_better is None:
            self.greater_is_better = self.name.partition("/")[0] != "loss"
        self.best_step: int | None = state.get("best_step")
        self.best: float | None = state.get("best")
        self.since_best: int = state.get("since_best", 0)
        """Evaluations since the best one."""
        checkpoint = self.output_dir / f"checkpoint-{self.best_step}"
        if config.load_best_model_at_end and self.best_step and not (checkpoint / MARKER).is_file():
            log(f"warning: {checkpoint}, the best so far, is gone; the next evaluation begins anew")
            self.best_step, self.best, self.since_best = None, None, 0

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint, as JSON values."""
        state = {"best_step": self.best_step, "best": self.best, "since_best": self.since_best}
        return {"evaluation": state}

    @property
    def step_to_load(self) -> int | None:
        """The step whose model is the trained one, so far, by `load_best_model_at_end`; None: the last."""
        return self.best_step if self.config.load_best_model_at_end else None

    @property
    def has_stalled(self) -> bool:
        """Whether `early_stopping_patience` ends the training."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.since_best >= patience

    def is_due(self, step: int) -> bool:
        """Whether `eval_strategy` asks for an evaluation after this step."""
        return step % self.every == 0 or (step == self.last_step and self.every < math.inf)

    @torch.no_grad()
    def run(self, step: int) -> dict[str, Any]:
        """Evaluate the model after `step` steps (0: before training); returns the line for metrics.jsonl."""
        begun = time.perf_counter()
        with without_dropout(self.model):
            line = self._losses()
            if self.plan.questions:
                line["metrics"] = self._answer(step)
        reshard(self.model)
        line |= {"epoch": step / self.steps_per_epoch, "seconds": time.perf_counter() - begun}
        values = values_of(line)
        if step > 0:  # what training starts from is there for comparison
            self._compare(step, values.get(self.name, math.nan))
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if "/" not in name)
        best = f"; the best by {self.name} is that of step {self.best_step}" if self.best_step else ""
        log(f"\nevaluation after step {step}: {shown}{best}")
        return line

    def _compare(self, step: int, value: float) -> None:
        is_better = self.best is None or (value > self.best if self.greater_is_better else value < self.best)
        if is_better and math.isfinite(value):
            self.best, self.best_step, self.since_best = value, step, 0
        else:
            self.since_best += 1

    def _losses(self) -> dict[str, Any]:
        sources = self.plan.reader.sources
        sums = torch.zeros(4, len(sources), dtype=torch.float64, device=self.ranks.device)
        loader = StepLoader(
            self.plan.reader,
            self.plan.sampler,
            rank=self.ranks.rank,
            num_ranks=self.ranks.world,
            samples_per_micro_batch=self.config.per_device_train_batch_size,
            num_steps=self.plan.sampler.steps_per_epoch,
            num_workers=self.config.dataloader_num_workers,
            on_bad_sample="skip" if self.config.on_bad_sample == "skip" else "error",
            packing=self.plan.packing,
        )
        for micro_batches in loader:
            self._still_alive()
            for micro_batch in micro_batches:
                batch = micro_batch.to(self.ranks.device)
                sums += tally(batch, self.model(**batch.inputs).token_losses, len(sources))
        samples, _, tokens, losses = all_sum(sums).tolist()
        return {
            "loss": sum(losses) / sum(tokens) if sum(tokens) else math.nan,
            "loss_by_source": {
                source.name: loss / count
                for source, count, loss in zip(sources, tokens, losses, strict=True)
                if count
            },
            "samples": int(sum(samples)),
            "supervised_tokens": int(sum(tokens)),
        }

    def _answer(self, step: int) -> dict[str, dict[str, float]]:
        """Answer the questions, write the answers, and return the mean scores by source."""
        plan, world = self.plan, self.ranks.world
        whole = fits_whole(self.model, self.ranks)
        options = {
            "max_new_tokens": self.config.eval_max_new_tokens,
            "do_sample": False,
            "synced_gpus": world > 1 and not whole,  # ranks that are done go on with the others' collectives
        }
        metrics = [plan.metrics.get(source.name, ()) for source in plan.reader.sources]
        rows: dict[Question, dict[str, Any]] = {}
        with gathered(self.model, whole):
            for questions in self._rounds():
                self._still_alive()
                mine = questions[self.ranks.rank :: world]
                # A rank without a question repeats one, for the collectives.
                asked = mine or questions[:1]
                answers = answer_some(plan.reader, self.model, asked, metrics, self.ranks.device, **options)
                rows |= dict(zip(mine, answers, strict=False))
        shares: list[Any] = [rows] * world
        if world > 1:
            dist.all_gather_object(shares, rows)
        found = {question: row for share in shares for question, row in share.items()}
        ordered = []
        for number, record in plan.questions:
            source, row = plan.reader.sources[number], found[number, record]
            if "error" in row:  # it could be read at the start
                raise DataError(row["error"])
            # Absolute, for the report may be written again from another folder.
            images = [str((source.image_root / name).absolute()) for name in source.sample(record).images]
            ordered.append({"source": source.name, "record": record, **row, "images": images})
        if is_main():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ordered]
            path = self.output_dir / "eval" / f"step-{step}.jsonl"
            try:
                path.parent.mkdir(exist_ok=True)
                replace_file(path, "".join(lines).encode())
            except OSError as error:
                log(f"\nwarning: {path} cannot be written: {error}")
        return mean_scores((row["source"], row["scores"]) for row in ordered)

    def _rounds(self) -> Iterator[list[Question]]:
        """What all ranks answer at a time: only questions with images, or only ones without, as every rank's
        tower takes part in its collectives, or none does."""
        at_once = PROMPTS_AT_ONCE * self.ranks.world
        for has_images in (True, False):
            alike = [question for question, has in self.plan.questions.items() if has == has_images]
            for begin in range(0, len(alike), at_once):
                yield alike[begin : begin + at_once]

    def _still_alive(self) -> None:
        """Begin the time limit again: `hang_minutes` are for a batch here, not for the whole evaluation."""
        faulthandler.dump_traceback_later(60 * self.config.hang_minutes, exit=True)


def values_of(line: Mapping[str, Any]) -> dict[str, float]:
    """A line's values by name: loss, loss/<source>, <score> (the mean over its sources), <score>/<source>."""
    values = {"loss": line["loss"]}
    values |= {f"loss/{source}": loss for source, loss in line["loss_by_source"].items()}
    by_name: dict[str, list[float]] = {}
    for source, means in line.get("metrics", {}).items():
        for name, score in means.items():
            values[f"{name}/{source}"] = score
            by_name.setdefault(name, []).append(score)
    return values | {name: sum(found) / len(found) for name, found in by_name.items()}


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within it the model computes as in evaluation, but forms no logits beside the loss, as in training."""
    model.eval()
    model.training = True  # the outermost module's alone, which decides about the logits
    try:
        yield
    finally:
        model.train()


def fits_whole(model: nn.Module, ranks: Ranks) -> bool:
    """Whether the gathered model takes less than half of what is free on every rank's device.

    Block by block, every token of an answer would gather all parameters again.
    """
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if ranks.device.type == "cpu":
        pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
        free = pages * os.sysconf("SC_PAGE_SIZE") // ranks.local_world
    else:
        free, _ = torch.accelerator.get_memory_info(ranks.device)
        free += torch.accelerator.memory_reserved(ranks.device)  # what torch keeps for itself,
        free -= torch.accelerator.memory_allocated(ranks.device)  # and does not use
    return all_max(needed - free / 2, ranks.device).item() < 0
