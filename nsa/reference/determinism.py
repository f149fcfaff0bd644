"""Whether results of the reference have the same bits each time."""

import torch
from torch import Tensor

from nsa.validation import UnsupportedError


def check_deterministic_device(deterministic: bool, q: Tensor) -> None:
    """Raise if PyTorch would add in any order: on a GPU, unless it is told not to."""
    if deterministic and q.is_cuda and not torch.are_deterministic_algorithms_enabled():
        raise UnsupportedError(
            "deterministic=True on a GPU needs torch.use_deterministic_algorithms(True) with the "
            "reference, whose operations are PyTorch's"
        )
