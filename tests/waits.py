"""Find where a computation makes the host wait for a GPU, without a GPU."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


def forbid_waits(step: Callable[..., Tensor], module: torch.nn.Module, inputs: Iterable[Any]) -> None:
    """Run a step forward and backward on tensors that have shapes and no numbers.

    Whatever reads a number, or makes a shape of one, raises: `.item()`, `if tensor`, boolean indices, `nonzero`,
    `unique`, `.cpu()`. (Checks within `torch.linalg` and copies from the host do not; tests/cuda finds those.)

    Args:
        step: Called with the inputs; returns a scalar.
        module: Whose parameters and buffers the step uses. They lose their numbers.
        inputs: What the step is called with. Of tensors, another without numbers takes the place.

    Raises:
        RuntimeError: The step waits; or NotImplementedError, which is one.
    """
    module.to("meta")
    emptied = [x.detach().to("meta").requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    with patch("torch.autocast", lambda *_, **__: nullcontext()):  # it refuses a device without numbers
        loss = step(*emptied)
        loss.backward()
    assert loss.shape == () and any(isinstance(x, Tensor) and x.grad is not None for x in emptied)
