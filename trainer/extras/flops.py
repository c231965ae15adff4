"""The speed of an accelerator's matrix products, of which a training reaches a share, its MFU.

    peak = matmul_peak(device, bf16=True)            # operations a second of all ranks; the whole of an MFU

The model's own operations are counted by its family (`trainer.models.family.Flops`).
"""

import time

import torch
import torch.nn.functional as F

from trainer.distributed import all_sum, barrier


def matmul_peak(device: torch.device, bf16: bool, seconds: float = 0.3) -> float:
    """Measure operations a second of matrix products in bfloat16 or float32, summed over all ranks.

    The fastest square product of each rank counts, over three sizes of `seconds` each. Every rank calls it.
    """
    on_cpu = device.type == "cpu"
    dtype = torch.bfloat16 if bf16 else torch.float32
    fastest, repeats = 0.0, 1 if on_cpu else 10
    for size in (512, 1024, 2048) if on_cpu else (2048, 4096, 8192):
        x, weight = torch.randn(2, size, size, device=device).to(dtype)  # zeros would need less power
        barrier()  # ranks that share a machine also share its clock rate and caches
        begun = time.perf_counter()
        while (now := time.perf_counter()) < begun + seconds:
            for _ in range(repeats):
                F.linear(x, weight)
            if not on_cpu:
                torch.accelerator.synchronize(device)
            fastest = max(fastest, repeats * 2 * size**3 / (time.perf_counter() - now))
    return all_sum(torch.tensor(fastest, device=device, dtype=torch.float64)).item()
