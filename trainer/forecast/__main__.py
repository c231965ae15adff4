"""What a run will need: memory, time, traffic and disk, before machines are rented.

    python -m trainer.forecast --model_name_or_path MODEL --data_path data.txt --ranks 8 --memory 80 \\
        --per_device_train_batch_size 4 --gradient_accumulation_steps 4

Input: the flags of the training, and the machines to forecast for. Of the model only config.json, tokenizer
and processor are needed, of its weights at most the headers. Without a data.txt every row is full. Output: a
table on stdout, and all numbers as JSON in `--output`. LoRA of the 7B on one GPU of 27 GB:

    memory of a rank, GB   held  forward  backward  optimizer step
    parameters            17.94    17.94     17.94           17.94
    …
    activations            0.00     2.01      3.46            0.00
    all                   19.15    22.32     23.12           19.75

    it fits: 23.12 GB at the peak, of 24.30 GB; a tenth of 27 GB is left to CUDA, NCCL and fragmentation

One step of the trainer's own code runs on tensors without memory (fake_step.py), for every number of ranks
and every change that is tried: for a 7B half a minute of one core, and half a GB of memory.

Exit status: 0, also if the run does not fit; 2 for bad input.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data.errors import DataError
from data.flags import ConfigError, parse_flags
from trainer.config import REPLACED
from trainer.forecast.config import ForecastConfig
from trainer.forecast.report import as_text, report
from trainer.job import BAD_INPUT, log


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, forecast, and print the report; returns the exit status."""
    try:
        config = parse_flags(ForecastConfig, argv, "trainer.forecast", REPLACED)
        found = report(config)
    except (ConfigError, DataError) as error:
        log("\n".join(f"error: {problem}" for problem in str(error).splitlines()))
        return BAD_INPUT
    print(as_text(config, found))
    if config.output:
        Path(config.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
