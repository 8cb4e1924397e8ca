"""Everything that a training needs before its first step."""

import torch


def global_generators(device: torch.device) -> list[torch.Generator]:
    """That miners of the library draw from. torch.manual_seed, which seeds them too, takes 2 ms."""
    if device.type == "cuda":
        torch.cuda.init()
        return [torch.default_generator, torch.cuda.default_generators[device.index or torch.cuda.current_device()]]
    return [torch.default_generator]
