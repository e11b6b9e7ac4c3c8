"""Cluster files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from msdiff_dist.errors import ConfigError
from msdiff_dist.launch.cluster import ClusterConfig, load_cluster, one_rank

SLURM = Path(__file__).parents[3] / "slurm"


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_cluster_file_loads(path: Path) -> None:
    assert load_cluster(str(path)).executor == "slurm"


def test_the_commented_file_has_every_field() -> None:
    written = yaml.safe_load((SLURM / "all_fields.yaml").read_text())
    assert set(written) == {f.name for f in dataclasses.fields(ClusterConfig)}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:05:00", 300),
        ("24:00:00", 86400),
        ("2-12:00", 216000),
        ("1-00:00:01", 86401),
        ("90:00", 5400),
        ("30", 1800),
        ("2-12", 216000),
    ],
)
def test_time_limits_in_seconds(text: str, seconds: int) -> None:
    assert ClusterConfig(shared="/", time=text, signal_delay_s=1).time_s == seconds


@pytest.mark.parametrize(("nodes", "per_node", "world_sizes"), [(3, 4, (12,)), ("2-4", 2, (4, 6, 8)), ("1", 8, (8,))])
def test_world_sizes_of_every_number_of_nodes(nodes: int | str, per_node: int, world_sizes: tuple[int, ...]) -> None:
    assert ClusterConfig(shared="/", nodes=nodes, gpus_per_node=per_node).world_sizes == world_sizes


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"shared": None}, "shared"),
        ({"nodes": "4-2"}, "nodes"),
        ({"nodes": 0}, "nodes"),
        ({"nodes": "two"}, "nodes"),
        ({"time": "tomorrow"}, "time"),
        ({"time": 86400}, "time"),
        ({"time": "0:02:00", "signal_delay_s": 120}, "time"),
        ({"gpus_per_node": -1}, "gpus_per_node"),
        ({"gpus_per_node": 4, "tasks_per_node": 2}, "tasks_per_node"),
        ({"gres": "gpu:4"}, "gres"),
        ({"gres": "gpu:a100:4", "gpus_per_node": 8}, "gres"),
        ({"gres": "lustre:1", "gpus_per_node": 1}, "gres"),
        ({"gres": "gpu::", "gpus_per_node": 1}, "gres"),
        ({"memory_gb": 0.0}, "memory_gb"),
        ({"max_restarts": 0}, "max_restarts"),
        ({"executor": "local", "nodes": 2}, "nodes"),
        ({"executor": "debug", "gpus_per_node": 2}, "gpus_per_node"),
    ],
)
def test_nonsense_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as e:
        ClusterConfig(**{"shared": "/", **changes})
    assert e.value.field == field


def test_options_go_before_the_file_and_are_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("shared: /\nnodes: 2\ntime: '1:00:00'\n")
    assert load_cluster(str(path), {"nodes": "3-4", "time": None}).node_range == (3, 4)
    with pytest.raises(ConfigError, match=r"^--nodes = 'x'"):
        load_cluster(str(path), {"nodes": "x"})
    path.write_text("shared: /\nnodez: 2\n")
    with pytest.raises(ConfigError, match=r"nodez.*Did you mean 'nodes'"):
        load_cluster(str(path))
    with pytest.raises(ConfigError, match="no such file"):
        load_cluster(str(tmp_path / "none.yaml"))


def test_one_rank_of_a_cluster_takes_its_share() -> None:
    cluster = ClusterConfig(shared="/", nodes="2-4", gpus_per_node=8, gres="gpu:a100:8", memory_gb=480, exclusive=True)
    one = one_rank(cluster)
    assert (one.world_sizes, one.gpus_per_node, one.gres, one.memory_gb) == ((1,), 1, "gpu:a100:1", 60)
    assert not one.exclusive
    assert one_rank(ClusterConfig(shared="/", tasks_per_node=4, memory_gb=8)).memory_gb == 2


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("environment: {X: 1}", "environment.X"),
        ("environment: {X: 0.5}", "environment.X"),
        ("environment: {X: yes}", "environment.X"),
        ("environment: {X: 0123}", "environment.X"),
        ("environment: {X: 16:30:00}", "environment.X"),
        ("account: 0123", "account"),
        ("account: 1234", "account"),
        ("qos: yes", "qos"),
        ("constraint: off", "constraint"),
        ("partition: 1e5", "partition"),
        ("interface: 1", "interface"),
        ("srun: [1]", "srun[0]"),
        ("setup: [true]", "setup[0]"),
        ("time: 24:00:00", "time"),
        ("time: 30", "time"),
        ("sbatch: {begin: 16:30}", "sbatch.begin"),
        ("sbatch: {reservation: 0123}", "sbatch.reservation"),
        ("sbatch: {priority: 1.5}", "sbatch.priority"),
    ],
)
def test_numbers_where_text_is_meant(text: str, field: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"shared: /\n{text}\n")
    with pytest.raises(ConfigError, match=r"in quotes") as e:
        load_cluster(str(path))
    assert (e.value.field, e.value.place) == (field, f"{path}:2")


def test_text_in_quotes_and_numbers_where_numbers_are_meant(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "{shared: /, environment: {X: '1', Y: 'yes'}, account: '0123', time: '30', memory_gb: 64,\n"
        "sbatch: {mem-per-cpu: 4000, begin: '16:30', spread-job: true, mail-type: FAIL}}\n"
    )
    cluster = load_cluster(str(path))
    assert (cluster.environment, cluster.account, cluster.time_s) == ({"X": "1", "Y": "yes"}, "0123", 1800)
    assert cluster.sbatch == {"mem-per-cpu": 4000, "begin": "16:30", "spread-job": True, "mail-type": "FAIL"}
