"""The `data` section of a recipe."""

from __future__ import annotations

import pytest

from msdiff_dist.config import from_mapping
from msdiff_dist.data.config import DataConfig
from msdiff_dist.errors import ConfigError


def test_a_shard_list_may_be_text_or_a_list():
    assert from_mapping(DataConfig, {"shards": "a", "image_size": 8}).shards == "a"
    assert from_mapping(DataConfig, {"shards": ["a", "b"], "image_size": 8}).shards == ("a", "b")


def test_shape_and_type_of_what_the_loader_gives():
    image = DataConfig(shards="a", image_size=8, channels=1)
    assert (image.x_shape, image.x_dtype) == ((1, 8, 8), "uint8")
    latent = DataConfig(shards="a", kind="latent", latent_shape=(4, 2, 2))
    assert (latent.x_shape, latent.x_dtype) == ((4, 2, 2), "float16")


@pytest.mark.parametrize(
    ("mapping", "field"),
    [
        ({"image_size": 8}, "data.shards"),
        ({"shards": "a"}, "data.image_size"),
        ({"shards": "a", "sources": [{"shards": "b"}], "image_size": 8}, "data.sources"),
        ({"sources": [{"shards": "b", "weight": 0}], "image_size": 8}, "data.sources[0].weight"),
        ({"sources": [{"shards": ""}], "image_size": 8}, "data.sources[0].shards"),
        ({"sources": [{"shards": "a"}], "kind": "synthetic", "latent_shape": [3, 8, 8]}, "data.sources"),
        ({"shards": "a", "image_size": 8, "retries": -1}, "data.retries"),
        ({"shards": "a", "image_size": 0}, "data.image_size"),
        ({"shards": "a", "image_size": 8, "lanes": 0}, "data.lanes"),
        ({"shards": "a", "image_size": 8, "workers": -1}, "data.workers"),
        ({"shards": "a", "image_size": 8, "shuffle": -1}, "data.shuffle"),
        ({"shards": "a", "image_size": 8, "channels": 2}, "data.channels"),
        ({"shards": "a", "image_size": 8, "num_classes": 0}, "data.num_classes"),
        ({"shards": "a", "image_size": 8, "latent_shape": [3, 8, 8]}, "data.latent_shape"),
        ({"shards": "a", "image_size": 8, "latent_moments": True}, "data.latent_moments"),
        ({"shards": "a", "kind": "latent"}, "data.latent_shape"),
        ({"shards": "a", "kind": "latent", "latent_shape": [3, 0, 8]}, "data.latent_shape"),
        ({"shards": "a", "kind": "latent", "latent_shape": [3, 8, 8], "image_size": 8}, "data.image_size"),
        ({"kind": "synthetic", "latent_shape": [3, 8, 8], "flip": True}, "data.flip"),
        ({"shards": "a", "kind": "synthetic", "latent_shape": [3, 8, 8]}, "data.shards"),
        ({"captions": True, "kind": "synthetic", "latent_shape": [3, 8, 8]}, "data.captions"),
        ({"shards": "a", "image_size": 8, "kind": "images"}, "data.kind"),
    ],
)
def test_contradictions_name_their_field(mapping, field):
    with pytest.raises(ConfigError) as caught:
        from_mapping(DataConfig, mapping, "data")
    assert caught.value.field == field
