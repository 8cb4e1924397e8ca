"""Weights from a file: read without running what is in it, and compared with what a network has."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

NAMED = 3  # tensors that a message names


class Fit(NamedTuple):
    """How well tensors by name fit a network.

    Attributes:
        missing: Names that the network alone has.
        unknown: Names that the network has no place for.
        reshaped: Those of other shapes, as "NAME (SHAPE in the network, SHAPE given)".
    """

    missing: list[str]
    unknown: list[str]
    reshaped: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether each tensor of the network is there, in its shape."""
        return not self.missing and not self.reshaped

    def describe(self) -> str:
        """Say what does not fit, with counts and the first names."""
        kinds = {"lacks {}": self.missing, "has other shapes in {}": self.reshaped, "has {} unknown": self.unknown}
        return ", ".join(kind.format(count(names)) for kind, names in kinds.items() if names)


def count(names: Sequence[str]) -> str:
    """Return how many tensors there are, and the names of the first: "5 tensors (a, b, c, ...)"."""
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:NAMED])}{more})"


def compare(network: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Fit:
    """Compare the state dict of a network with tensors that it might be given."""
    reshaped = [
        f"{name} ({tuple(tensor.shape)} in the network, {tuple(given[name].shape)} given)"
        for name, tensor in network.items()
        if name in given and given[name].shape != tensor.shape
    ]
    missing, unknown = [n for n in network if n not in given], [n for n in given if n not in network]
    return Fit(missing, unknown, reshaped)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a file: .safetensors, or what torch.save has written, of which only tensors are loaded.

    Raises:
        ValueError: It is damaged, or holds something else; the message does not name the file.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"damaged, or no file of safetensors ({error})") from error
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError("damaged, or holds more than tensors; save the network's state_dict() alone") from error
    except Exception as error:  # a damaged file makes torch raise whatever its bytes happen to lead to
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise ValueError(f"damaged, or not written by torch.save ({reason})") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"holds a {type(state).__name__}, not tensors by name; save the network's state_dict()")
    if others := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        nested = next((name for name in others if isinstance(state[name], Mapping)), None)
        way = f"save what is under {nested}" if nested else "save the network's state_dict()"
        raise ValueError(f"holds not tensors alone, but {', '.join(others[:NAMED])}, too; {way} in a file of its own")
    return dict(state)
