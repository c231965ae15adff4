"""Other trainers on the same model and our samples, as their users would run them. One process a rank:

    torchrun --nproc_per_node 2 -m tests.benchmarks.peers --peer hf_ddp --model M --data data.json \\
        --steps 8 --batch 4 --dtype bf16 --output run

Output, in the folder: metrics.jsonl, a line a step with the fields of our own trainer's that compare.py reads
(seconds_step, loss, tokens, supervised_tokens, memory_peak_bytes), and samples_seen, the sorted CRC-32 of the
token ids of every sample that the model was given in it.

The model is transformers' own class, or this project's through AutoModelForCausalLM. Samples are read and
pictures decoded in a map-style dataset, in worker processes, and padded on the right to the longest of a
batch. What trains is set as in our trainer: frozen vision tower, fused AdamW (HF Trainer's default), constant
rate.

    hf_ddp, hf_fsdp2                      HF Trainer; logits of all positions and transformers' cross-entropy
                                          on them, as in the model's official fine-tuning code
    hf_ddp_our_loss, hf_fsdp2_our_loss    HF Trainer; the loss of XComposer2's class: supervised positions
                                          only
    trl                                   TRL's SFTTrainer under DDP, with its fused output layer and loss
"""

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState  # type: ignore[import-not-found]
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from data.loader import SampleReader
from data.mixture import read_mixture
from data.sampler import StepSampler
from data.tokens import SLOT, SampleEncoder
from trainer.lora import resolve_targets
from trainer.models import (
    answering_class,
    load_config,
    load_conversation,
    load_image_processor,
    parts_of,
    prompt_arguments,
)

PEERS = ("hf_ddp", "hf_fsdp2", "hf_ddp_our_loss", "hf_fsdp2_our_loss", "trl")
SEED, MAX_LENGTH, LORA_RANK, LEARNING_RATE, NUM_WORKERS = 42, 2048, 16, 1e-4, 1


def open_data(model: str | Path, data: str | Path) -> SampleReader:
    """The samples of a .json file, as our trainer reads them."""
    config = load_config(model)
    encoder = SampleEncoder(load_conversation(model), MAX_LENGTH)
    return SampleReader(read_mixture(data, True, None), encoder, load_image_processor(config))


def crc(input_ids: np.ndarray) -> int:
    """Tells a sample by its token ids, int64 [T]."""
    return zlib.crc32(input_ids.tobytes())


class Samples(Dataset[dict[str, torch.Tensor]]):
    """The samples of all steps in our trainer's order: those of a step lie together."""

    def __init__(self, reader: SampleReader, steps: int, global_batch: int) -> None:
        sampler = StepSampler(reader.sources, SEED, global_batch)
        self.reader = reader
        self.order = [tuple(map(int, row)) for step in range(steps) for row in sampler.samples(step)]
        assert len(self.order) == steps * global_batch

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        encoded, pictures = self.reader.read(*self.order[index])
        arrays = {"input_ids": encoded.input_ids, "labels": encoded.labels, "im_mask": encoded.im_mask}
        arrays["attention_mask"] = np.ones_like(encoded.input_ids)
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"pictures": pictures}


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """[{"a": 1}, {"a": 2}] → {"a": [1, 2]}"""
    return {name: [row[name] for row in rows] for name in rows[0]}


def blank_picture(reader: SampleReader) -> tuple[Any, dict[str, torch.Tensor]]:
    """A small blank picture, and its tokens in the columns of a sample, all of them padding."""
    image = Image.new("RGB", (28, 28))
    ids = torch.from_numpy(reader.image_processor.tokens(*image.size))
    tokens = {
        "input_ids": ids.masked_fill(ids == SLOT, reader.encoder.conversation.slot_id),
        "labels": torch.full_like(ids, -100),
        "im_mask": ids == SLOT,
        "attention_mask": torch.zeros_like(ids),
    }
    return reader.image_processor(image), tokens


class PadRight:
    """Samples → a batch, padded on the right. Where data has images, a batch without any gets a blank one
    behind its shortest sample: FSDP would wait for ever for a rank that skips the tower; DDP refuses it."""

    def __init__(self, reader: SampleReader, config: PreTrainedConfig, has_images: bool) -> None:
        self.config, self.image_processor = config, reader.image_processor
        self.fillers = {"input_ids": reader.encoder.pad_id, "labels": -100, "im_mask": 0, "attention_mask": 0}
        self.blank = blank_picture(reader) if has_images else None

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = {name: [sample[name] for sample in samples] for name in self.fillers}
        pictures = [picture for sample in samples for picture in sample["pictures"]]
        if not pictures and self.blank:
            picture, padding = self.blank
            pictures.append(picture)
            lengths = [len(ids) for ids in rows["input_ids"]]
            shortest = lengths.index(min(lengths))
            for name, values in rows.items():
                values[shortest] = torch.cat([values[shortest], padding[name]])
        batch = {
            name: pad_sequence(values, batch_first=True, padding_value=self.fillers[name])
            for name, values in rows.items()
        }
        batch |= prompt_arguments(self.config, batch.pop("im_mask"))
        return batch | (self.image_processor.batch(pictures) if pictures else {})


class Notes(TrainerCallback):
    """Writes metrics.jsonl: what each training step was given, and the loss that the trainer logs."""

    def __init__(self, output: Path) -> None:
        self.file = (output / "metrics.jsonl").open("w")
        self.given: list[tuple[int, int, list[int]]] = []
        self.last = 0.0

    def watch(self, trainer: Trainer) -> None:
        training_step = trainer.training_step

        def noted(model: Any, inputs: dict[str, Any], *others: Any) -> torch.Tensor:
            self.note(inputs)
            return training_step(model, inputs, *others)

        trainer.training_step = noted  # type: ignore[method-assign]

    def note(self, inputs: dict[str, Any]) -> None:
        ids, real = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu().bool()
        samples = [crc(row[kept].numpy()) for row, kept in zip(ids, real, strict=True)]
        self.given.append((int(real.sum()), int((inputs["labels"] != -100).sum()), samples))

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.last = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """After every step; the loss has been read, so the device has finished. All ranks come here."""
        if "loss" not in logs:
            return
        peak = torch.accelerator.max_memory_allocated() if torch.accelerator.is_available() else 0
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (self.given, peak))
        self.given = []
        given = [batch for batches, _ in ranks for batch in batches]
        now = time.perf_counter()
        line = {
            "kind": "train",
            "step": state.global_step,
            "loss": logs["loss"],
            "seconds_step": now - self.last,
            "tokens": sum(tokens for tokens, *_ in given),
            "supervised_tokens": sum(supervised for _, supervised, _ in given),
            "samples_seen": sorted(sample for *_, samples in given for sample in samples),
            "memory_peak_bytes": max(peak for _, peak in ranks),
        }
        self.last = now
        if state.is_world_process_zero:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()


def all_logits_loss(vocab_size: int) -> Callable[..., torch.Tensor]:
    """transformers' own cross-entropy on the logits of every position."""

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return ForCausalLMLoss(outputs.logits, labels, vocab_size, num_items_in_batch)

    return loss


def with_backbone(model: Any) -> Any:
    """What TRL's fused output layer needs of a model: a `base_model` that gives hidden states.

    XComposer2's class has vision and language side by side and no single backbone, so it is the whole
    forward, but for all logits other than the last position's.
    """
    own_class = type(model)

    def backbone(**inputs: Any) -> SimpleNamespace:
        inputs |= {"logits_to_keep": 1, "output_hidden_states": True}
        outputs = own_class.forward(model, **inputs)
        return SimpleNamespace(last_hidden_state=outputs.hidden_states[-1])

    model.__class__ = type(own_class.__name__, (own_class,), {"base_model": property(lambda self: backbone)})
    return model


def load_model(folder: str, lora: bool, bf16: bool, has_images: bool) -> Any:
    """The model in float32 master weights; under adapters a frozen base in the compute dtype.

    The vision tower is frozen, and so is the projector where no image would reach it.
    """
    base = torch.bfloat16 if lora and bf16 else torch.float32
    model = answering_class(load_config(folder)).from_pretrained(folder, dtype=base)
    # Checkpointing by FSDP, unlike transformers' own, leaves the cache on: recomputing would fill it again.
    model.config.get_text_config().use_cache = False
    parts = parts_of(model.config)
    for name, parameter in model.named_parameters():
        if name.startswith(parts.vision if has_images else (*parts.vision, *parts.projector)):
            parameter.requires_grad_(False)
    return model


def arguments(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """TrainingArguments: what our trainer is told too, and how the peer spreads over ranks."""
    checkpointing = options.gradient_checkpointing
    chosen: dict[str, Any] = {
        "output_dir": options.output,
        "per_device_train_batch_size": options.batch,
        "max_steps": options.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "bf16": options.dtype == "bf16",
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "dataloader_num_workers": NUM_WORKERS,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
        "use_cpu": not torch.accelerator.is_available(),
        "ddp_find_unused_parameters": False,
    }
    if "fsdp2" in options.peer:
        # transformers advises activation checkpointing by FSDP in place of its own: a gather less.
        chosen |= {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": None, "fsdp": True}
        blocks = [block for blocks in parts_of(model.config).blocks(model) for block in blocks]
        chosen["fsdp_config"] = {
            "version": 2,
            "transformer_layer_cls_to_wrap": list(dict.fromkeys(type(block).__name__ for block in blocks)),
            "activation_checkpointing": checkpointing,
        }
    return chosen


def train(options: argparse.Namespace) -> None:
    reader = open_data(options.model, options.data)
    has_images = any(source.records.num_images for source in reader.sources)
    dataset = Samples(reader, options.steps, options.batch * int(os.environ["WORLD_SIZE"]))
    model = load_model(options.model, options.lora, options.dtype == "bf16", has_images)
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        target_modules=resolve_targets(model, parts_of(model.config).lora_targets),
    )
    # Else Trainer takes a mean of means over ranks: our loss function does take num_items_in_batch.
    model.accepts_loss_kwargs = True
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    notes = Notes(output)
    collate = PadRight(reader, model.config, has_images)
    shared: dict[str, Any] = {"data_collator": collate, "train_dataset": dataset, "callbacks": [notes]}
    if options.peer == "trl":
        import datasets  # type: ignore[import-not-found]
        from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

        # It takes no other dataset than that of the package datasets; this one reads a sample when it is due.
        rows = datasets.Dataset.from_dict({"number": list(range(len(dataset)))})
        shared["train_dataset"] = rows.with_transform(
            lambda batch: columns([dataset[number] for number in batch["number"]])
        )
        kwargs = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        sft = SFTConfig(**arguments(options, model), **kwargs)
        trainer: Any = SFTTrainer(
            with_backbone(model) if model.base_model is model else model,
            sft,
            processing_class=reader.encoder.tokenizer,
            peft_config=adapters if options.lora else None,
            **shared,
        )
    else:
        vocab_size = model.config.get_text_config().vocab_size
        loss = None if options.peer.endswith("our_loss") else all_logits_loss(vocab_size)
        chosen = TrainingArguments(**arguments(options, model))
        if chosen.fsdp and chosen.use_cpu:
            # accelerate forgets about FSDP without a word where ranks have no accelerator.
            PartialState().distributed_type = DistributedType.MULTI_GPU
        trainer = Trainer(
            get_peft_model(model, adapters) if options.lora else model,
            chosen,
            compute_loss_func=loss,
            **shared,
        )
    notes.watch(trainer)
    assert trainer.accelerator.state.is_fsdp2 == ("fsdp2" in options.peer)
    trainer.train()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="samples a rank")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), required=True)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    train(parser.parse_args())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # now and then a thread that HF Trainer leaves behind aborts the interpreter's end


if __name__ == "__main__":
    main()
