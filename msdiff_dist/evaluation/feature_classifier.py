"""A small image classifier, in whose features sets of images are compared (`frechet.py`).

It trains in about a minute on a CPU, and takes the place of an Inception network that would have to be downloaded.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from msdiff_dist.bounds import check_between, check_seed
from msdiff_dist.config import from_mapping
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.make.images import read_images
from msdiff_dist.errors import CheckpointError, ConfigError, DataError
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.files.json_text import parse_mapping
from msdiff_dist.pixels import to_model_range
from msdiff_dist.randomness import generator
from msdiff_dist.terminal import track

_KEY = "feature_classifier"
_HELD_OUT = 10  # one image in ten measures the accuracy


@dataclass(frozen=True, kw_only=True)
class ClassifierInfo:
    """Architecture and training of a classifier: the metadata of its file.

    Attributes:
        image_shape: [C, H, W] of its images.
        channels: output channels of each convolution; each halves height and width.
        features: width of the layer before the classes.
        steps, batch_size, seed: settings that it was trained with.
        accuracy: fraction of right classes, on the tenth of the images that it was not trained on.
    """

    image_shape: tuple[int, int, int]
    classes: int
    channels: tuple[int, ...] = (32, 64, 128)
    features: int = 64
    steps: int = 0
    batch_size: int = 128
    seed: int = 0
    accuracy: float = 0.0


class FeatureClassifier(nn.Module):
    """Strided convolutions, a linear layer of features and a linear layer of classes."""

    def __init__(self, info: ClassifierInfo) -> None:
        super().__init__()
        self.info = info
        channels, height, width = info.image_shape
        layers: list[nn.Module] = []
        for out in info.channels:
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.ReLU()]
            # A stride of two rounds odd sizes up.
            channels, height, width = out, -(-height // 2), -(-width // 2)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, info.features))
        self.head = nn.Linear(info.features, info.classes)

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Features [N, D] of uint8 images: the output of the layer before the classes, without its ReLU."""
        out: Tensor = self.body(to_model_range(images_NCHW))
        return out

    def places(self, images_NCHW: Tensor) -> Tensor:
        """Features [N, D, h, w] of the places of uint8 images: the last convolution's output."""
        out: Tensor = self.body[:-2](to_model_range(images_NCHW))
        return out

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, classes] of uint8 images."""
        out: Tensor = self.head(F.relu(self.features(images_NCHW)))
        return out


def train_classifier(data: DataConfig, steps: int, batch_size: int = 128, seed: int = 0) -> FeatureClassifier:
    """Train on nine tenths of the labelled images of `data`, and measure the accuracy on the rest.

    Raises:
        ConfigError: the data has no classes or no images.
        DataError: there are too few images, or shards are corrupt.
    """
    check_between("--steps", steps, 1, 10**9)
    check_seed("--seed", seed)
    if data.num_classes is None:
        raise ConfigError("data.num_classes", None, "a classifier needs labelled images", "Give the recipe classes.")
    batches = list(read_images(data))
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches if y is not None])
    if len(x) < 10 * _HELD_OUT:
        problem = f"holds {len(x)} images"
        raise DataError("data.shards", data.shards, problem, f"Use at least {10 * _HELD_OUT}.")
    rng = generator(seed, "feature classifier")
    order = torch.from_numpy(rng.permutation(len(x)))
    test, train = order[: len(x) // _HELD_OUT], order[len(x) // _HELD_OUT :]
    # The first weights depend only on the seed, and the state of torch's generator does not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FeatureClassifier(ClassifierInfo(image_shape=data.x_shape, classes=data.num_classes))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in track(range(steps), "training the classifier", "steps"):
        rows = train[torch.from_numpy(rng.integers(len(train), size=batch_size))]
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = sum(int((model(x[rows]).argmax(1) == y[rows]).sum()) for rows in test.split(1000))
    model.info = ClassifierInfo(
        image_shape=data.x_shape,
        classes=data.num_classes,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        accuracy=right / len(test),
    )
    return model.eval()


def save_classifier(model: FeatureClassifier, path: Path) -> None:
    """Write weights and `ClassifierInfo` to one safetensors file. Its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save(model.state_dict(), {_KEY: json.dumps(asdict(model.info))}))


def load_classifier(path: Path) -> FeatureClassifier:
    """Read a classifier that `save_classifier` wrote.

    Raises:
        CheckpointError: the file does not exist or holds no classifier.
    """
    try:
        with safe_open(path, "pt") as file:
            about = from_mapping(ClassifierInfo, parse_mapping((file.metadata() or {})[_KEY]))
            with torch.device("meta"):  # a size that was written wrong must not take memory
                shapes = {name: p.shape for name, p in FeatureClassifier(about).state_dict().items()}
            if {name: tuple(file.get_slice(name).get_shape()) for name in shapes} != {
                n: tuple(s) for n, s in shapes.items()
            }:
                raise ValueError("its tensors are not those of its layers")
            model = FeatureClassifier(about)
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, ConfigError, KeyError, TypeError, ValueError, RuntimeError) as e:
        problem = f"is no feature classifier ({' '.join(str(e).split())[:200]})" if path.is_file() else "no such file"
        remedy = "Make one with `msdiff classifier train`."
        raise CheckpointError("classifier", str(path), problem, remedy) from None
    return model.eval()
