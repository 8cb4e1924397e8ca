"""Files of weights: what fits is taken, what does not is counted and named, and nothing in a file is executed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dml_core import backbones


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return backbones.build("small", "none").network.state_dict()


def build(path: Path, name: str = "small") -> backbones.Backbone:
    torch.manual_seed(0)
    return backbones.build(name, str(path))


def refusal(path: Path, name: str = "small") -> str:
    with pytest.raises(ValueError, match=r"^backbone\.weights=") as refused:
        build(path, name)
    message = str(refused.value)
    assert message.startswith(f"backbone.weights={path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_state_dict_is_taken_whole_and_what_is_too_much_is_named(state, suffix: str, tmp_path: Path) -> None:
    path, given = tmp_path / f"weights.{suffix}", state | {"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}
    save_file(given, path) if suffix == "safetensors" else torch.save(given, path)
    backbone = build(path)
    assert same(backbone.network.state_dict(), state)
    assert sorted(backbone.unused) == ["fc.bias", "fc.weight"]


def test_of_a_learner_the_backbone_is_taken(state, tmp_path: Path) -> None:
    path = tmp_path / "learner.safetensors"
    learner = {f"backbone.network.{name}": tensor for name, tensor in state.items()}
    save_file(learner | {"head.1.weight": torch.zeros(8, 128)}, path)
    backbone = build(path)
    assert same(backbone.network.state_dict(), state) and backbone.unused == ()


def test_what_a_file_lacks_and_other_shapes_are_counted_and_named(state, tmp_path: Path) -> None:
    path, names = tmp_path / "weights.safetensors", [*state]
    given = {name: state[name] for name in names[5:]} | {"more": torch.zeros(1)}
    given[names[6]] = torch.zeros(7)
    save_file(given, path)
    message = refusal(path)
    assert f"lacks 5 tensors ({', '.join(names[:3])}, ...)" in message and "has 1 tensor (more) unknown" in message
    assert f"has other shapes in 1 tensor ({names[6]} ({tuple(state[names[6]].shape)} in the network" in message
    assert "(7,) given)" in message and "backbone.name=small" in message


def test_norms_of_another_kind_are_told(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(backbones.build("resnet18", "none").network.state_dict(), path)
    message = refusal(path, "resnet18")
    assert "lacks 40 tensors (bn1.running_mean" in message and "backbone.weights=none" in message


def test_a_file_need_not_count_the_batches_of_its_norms(tmp_path: Path) -> None:
    path, network = tmp_path / "weights.safetensors", backbones.build("resnet18", "imagenet", read=False).network
    save_file({n: t for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}, path)
    assert same(build(path, "resnet18").network.state_dict(), network.state_dict())


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (self.path.touch, ())


def test_what_is_no_state_dict_is_refused_in_one_line(state, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"epoch": 3, "state_dict": state}, path)
    assert "epoch, state_dict" in refusal(path) and "save what is under state_dict" in refusal(path)
    torch.save([1, 2], path)
    assert "holds a list, not tensors by name" in refusal(path)
    torch.save({"a": Evil(tmp_path / "ran")}, path)
    assert "more than tensors" in refusal(path) and not (tmp_path / "ran").exists()
    torch.save(state, path)
    for damaged in (path.read_bytes()[:-2000], b"", b"no weights"):
        path.write_bytes(damaged)
        refusal(path)
    torn = tmp_path / "weights.safetensors"
    save_file(state, torn)
    torn.write_bytes(torn.read_bytes()[:-1])
    assert "no file of safetensors" in refusal(torn)
    assert "not imagenet, none or a file" in refusal(tmp_path / "none.pt")
