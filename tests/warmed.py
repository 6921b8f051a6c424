"""What the processes of warm.py have loaded, and measured, when they begin."""

import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.run
import torch.nn.parallel
import warm  # noqa: F401

import ablate  # noqa: F401
import eval  # noqa: F401
from distrogpt.hardware import peak_flops

peak_flops(torch.device("cpu"), torch.float32)
