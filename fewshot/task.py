"""What every sampler gives and every algorithm takes."""

from typing import NamedTuple

import torch


class Task(NamedTuple):
    """One few-shot task, or a batch of T of them with a leading dimension T. N ways, K shots, Q queries, S pixels."""

    support_x: torch.Tensor  # (N*K, 3, S, S) float32 in [0, 1]
    support_y: torch.Tensor  # (N*K,) int64: 0 .. N-1, K times each
    query_x: torch.Tensor  # (N*Q, 3, S, S)
    query_y: torch.Tensor  # (N*Q,)
    mode: torch.Tensor  # () int64: index of the task's mode. For reports only; no algorithm may look at it
