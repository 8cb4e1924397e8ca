"""What a learner takes over from an earlier one: all that belongs to no class, and what it knows of classes by name."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dml_core.data.datasets import SetIdentity
from dml_core.learner import Learner
from pipelines.config.recipe import load_recipe
from pipelines.config.schema import Config
from pipelines.models import checkpoint
from pipelines.models.build import build_learner
from pipelines.models.checkpoint import TrainingState
from pipelines.models.start import class_axes, take_over

BEFORE, NOW = ("a", "b", "c", "d"), ("e", "d", "b", "a", "f")
KNOWN = {1: 3, 2: 1, 3: 0}  # number now -> number before


def config_of(*assignments: str) -> Config:
    return load_recipe("glyphs", ["embedding_dim=8", "method=[]", *assignments])


def store(folder: Path, config: Config, names: tuple[str, ...] = BEFORE) -> Learner:
    """A checkpoint of a learner of which no tensor is as it was initialised."""
    learner = build_learner(config, len(names))
    torch.manual_seed(9)
    learner.load_state_dict({n: torch.rand_like(t.float()).to(t.dtype) for n, t in learner.state_dict().items()})
    nothing: Any = SimpleNamespace(state_dict=dict)
    rest = nothing, nothing, TrainingState(1, 1), [], {}, torch.zeros(0, 7)
    checkpoint.save(folder, config, SetIdentity("d", "p", "l", 4, 9), names, learner, *rest)
    return learner


LOSSES = ["loss.name=proxy_anchor", "loss.name=ArcFaceLoss", "loss.name=SoftTripleLoss", "loss.name=margin"]
LOSSES += ["loss.name=SubCenterArcFaceLoss", "loss.name=ProxyNCALoss", "loss.name=triplet"]


@pytest.mark.parametrize("loss", LOSSES)
def test_what_belongs_to_a_class_follows_its_name(loss: str, tmp_path: Path) -> None:
    config = config_of(loss, "method=[iaa,sgar,namr]", "start_from=earlier")
    before, learner = store(tmp_path, config).state_dict(), build_learner(config, len(NOW))
    fresh = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    taken = take_over(learner, tmp_path, config, NOW)
    axes = class_axes(config)
    assert {name.partition(".")[0] for name in axes} >= {"iaa"}
    assert ("base_loss" in {name.partition(".")[0] for name in axes}) == (loss != "loss.name=triplet")
    for name, tensor in learner.state_dict().items():
        if name not in axes:
            assert torch.equal(tensor, before[name]), name
            continue
        axis, each = axes[name]
        parts, parts_before, parts_fresh = (
            state.movedim(axis, 0).unflatten(0, (-1, each)) for state in (tensor, before[name], fresh[name])
        )
        for number in range(len(NOW)):
            expected = parts_before[KNOWN[number]] if number in KNOWN else parts_fresh[number]
            assert torch.equal(parts[number], expected), (name, number)
    has_loss = [] if loss == "loss.name=triplet" else ["loss"]
    assert taken.parts == ["backbone", "head", *has_loss, "iaa", "sgar", "namr"] and taken.new == []
    assert (taken.known_classes, taken.classes) == (3, 5)


def test_the_vectors_of_a_class_with_several_centres_stay_together(tmp_path: Path) -> None:
    config = config_of("loss.name=SoftTripleLoss", "loss.centers_per_class=3", "start_from=earlier")
    before, learner = store(tmp_path, config), build_learner(config, len(NOW))
    take_over(learner, tmp_path, config, NOW)
    assert before.base_loss and learner.base_loss
    assert torch.equal(learner.base_loss.loss.fc[:, 3:6], before.base_loss.loss.fc[:, 9:12])  # of "d"


def test_another_loss_and_another_method_begin_anew(tmp_path: Path) -> None:
    store(tmp_path, config_of("loss.name=ArcFaceLoss", "method=[sgar]"))
    config = config_of("loss.name=CosFaceLoss", "method=[namr]", "start_from=earlier")
    learner = build_learner(config, len(BEFORE))
    fresh = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    taken = take_over(learner, tmp_path, config, BEFORE)
    assert (taken.parts, taken.new, taken.known_classes) == (["backbone", "head"], ["loss", "namr"], None)
    for name, tensor in learner.state_dict().items():
        is_network = name.startswith(("backbone.", "head."))
        assert torch.equal(tensor, fresh[name]) != (is_network and tensor.numel() > 0), name


def test_statistics_of_another_shape_begin_anew(tmp_path: Path) -> None:
    store(tmp_path, config_of("method=[iaa]"))
    config = config_of("method=[iaa]", "iaa.covariance=full", "start_from=earlier")
    learner = build_learner(config, len(BEFORE))
    take_over(learner, tmp_path, config, BEFORE)
    assert learner.iaa and not learner.iaa.variation.variance.any() and not learner.iaa.corrected.any()


def test_backbone_weights_take_the_backbone_alone_into_any_precision(tmp_path: Path) -> None:
    before = store(tmp_path, config_of())
    config = config_of("embedding_dim=4", "backbone.weights=earlier", "method=[namr]", "loss.name=proxy_anchor")
    learner = build_learner(config, len(NOW), read_weights=False).double()
    fresh = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    taken = take_over(learner, tmp_path, config, NOW)
    assert taken.parts == ["backbone"] and taken.new == ["head", "loss", "namr"]
    for name, tensor in learner.state_dict().items():
        assert tensor.dtype == fresh[name].dtype
        expected = before.state_dict()[name].double() if name.startswith("backbone.") else fresh[name]
        assert torch.equal(tensor, expected), name


def test_norms_that_do_not_fit_are_told(tmp_path: Path) -> None:
    network = "backbone.name=resnet18"
    store(tmp_path, config_of(network, "backbone.weights=none", "name=scratch"))
    config = config_of(network, "backbone.weights=earlier")
    learner = build_learner(config, 4, read_weights=False)
    with pytest.raises(ValueError, match=r"scratch: its network does not fit .* lacks 60 tensors .*group norms"):
        take_over(learner, tmp_path, config, BEFORE)
