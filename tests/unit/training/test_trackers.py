"""Trackers: what they are given, that a run goes on in them after a restart, and that none stops training."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from msdiff_dist.errors import ConfigError
from msdiff_dist.training.metric_sink import SinkContext
from msdiff_dist.training.mlflow_tracker import MlflowConfig
from msdiff_dist.training.run_folder import RunFolder
from msdiff_dist.training.sinks import MetricsConfig, Sinks, check_installed
from msdiff_dist.training.tracker import Tracker
from msdiff_dist.training.wandb_tracker import WandbConfig
from tests.unit.training.test_sinks import METRICS

RECIPE = {"name": "digits", "train": {"steps": 6, "precision": "fp32"}, "stages": {"boundaries": [0.4]}}
# A tracker's own warnings, which the suite makes errors, would end its connection.
pytestmark = pytest.mark.filterwarnings("default")


def context(path: Path, terminal: io.StringIO, first_step: int = 0) -> SinkContext:
    folder = RunFolder(path / "run")
    folder.path.mkdir(exist_ok=True)
    return SinkContext(folder=folder, first_step=first_step, total_steps=6, terminal=terminal, recipe=RECIPE)


def start(path: Path, config: MetricsConfig, first: int, last: int) -> str:
    """One start of a run, from step `first` to step `last`; what it printed."""
    terminal, grid = io.StringIO(), path / f"step_{last:08d}.png"
    Image.new("RGB", (4, 4), (200, 0, 0)).save(grid)
    with Sinks.of_run(config, context(path, terminal, first - 1)) as sinks:
        for step in range(first, last + 1):
            sinks.write(replace(METRICS, step=step, loss=1 / step))
        sinks.grid(last, grid)
    return terminal.getvalue()


class Gathering:
    """A connection that keeps what it is given."""

    place = "here"

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.grids: list[int] = []
        self.finished = False

    def log(self, steps: Any) -> None:
        time.sleep(0.01)  # a server takes longer than a step
        self.steps += [scalars["step"] for scalars in steps]

    def grid(self, step: int, path: Path) -> None:
        self.grids.append(step)

    def finish(self) -> None:
        self.finished = True


def test_all_is_sent_in_order_before_a_tracker_closes(tmp_path: Path) -> None:
    said: list[str] = []
    gathering = Gathering()
    tracker = Tracker("some", lambda: gathering, replace(context(tmp_path, io.StringIO()), say=said.append))
    for step in range(1, 31):
        tracker.write(replace(METRICS, step=step))
        if step % 10 == 0:
            tracker.grid(step, tmp_path / "x.png")
    tracker.close()
    assert gathering.steps == list(range(1, 31))
    assert gathering.grids == [10, 20, 30]
    assert gathering.finished
    assert said == ["some: here"]


def test_a_failing_tracker_is_told_of_once(tmp_path: Path) -> None:
    class Failing(Gathering):
        def log(self, steps: Any) -> None:
            raise ConnectionError("no route to host\nand more")

    said: list[str] = []
    tracker = Tracker("some", Failing, replace(context(tmp_path, io.StringIO()), say=said.append))
    for step in range(1, 31):
        tracker.write(replace(METRICS, step=step))
    tracker.close()
    assert said[0] == "some: here"
    assert len(said) == 2
    assert "some gets no more metrics from this start (ConnectionError: no route to host);" in said[1]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_training(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec(name):
        pytest.skip(f"{name} is installed")
    for made in (None, tmp_path / name):
        if made:  # W&B puts a folder of its own name into the working directory
            made.mkdir()
            monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ConfigError, match=rf"sinks = '{name}': .*`pip install {name}`"):
            check_installed(MetricsConfig(sinks=("tensorboard", name)))
    check_installed(MetricsConfig())


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """W&B without a network."""
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield wandb
    wandb.teardown()


def records(wandb_file: Path) -> Iterator[bytes]:
    """What W&B wrote: after 7 bytes of header, LevelDB's log, in blocks of 32 KiB.

    A piece of a record has a checksum (4 bytes), a length (2) and a kind (1): 1 whole, 2 first, 3 middle, 4 last.
    """
    data, at, record = wandb_file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no piece begins so late in a block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record = (b"" if kind in (1, 2) else record) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record


def history(wandb_file: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Id, configuration and rows of an offline run."""
    from wandb.proto import wandb_internal_pb2

    run_id, config, rows = "", {}, []
    for data in records(wandb_file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return run_id, config, rows


def test_a_run_goes_on_in_wandb(offline: Any, tmp_path: Path) -> None:
    config = MetricsConfig(sinks=("wandb",), wandb=WandbConfig(project="p", tags=("a", "b")))
    said = [start(tmp_path, config, 1, 4), start(tmp_path, config, 3, 6)]  # the checkpoint was that of step 2
    assert all("wandb: offline; `wandb sync " in text for text in said), said
    assert not any("warning" in text for text in said), said
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"), key=os.path.getmtime)
    first, second = (history(path) for path in files)
    kept = json.loads((tmp_path / "run/wandb_run.json").read_text())["id"]
    assert (first[0], second[0]) == (kept, kept)
    assert first[1]["train"] == RECIPE["train"]
    steps = [[row["step"] for row in found[2] if "loss" in row] for found in (first, second)]
    assert steps == [[1, 2, 3, 4], [3, 4, 5, 6]]
    assert [row["loss_per_stage/1"] for row in first[2] if "loss" in row] == [0.75] * 4
    assert [row["step"] for row in second[2] if any(key.startswith("samples") for key in row)] == [6]


def test_wandb_asks_for_no_key(offline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key may lie
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    said = start(tmp_path, MetricsConfig(sinks=("wandb",)), 1, 6)
    assert said.count("warning: wandb gets no more metrics") == 1
    assert "`wandb login`" in said
    assert "step 6/6" in said


def test_a_run_goes_on_in_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    config = MetricsConfig(sinks=("mlflow",), mlflow=MlflowConfig(tracking_uri=store, experiment="faces"))
    client = mlflow.MlflowClient(tracking_uri=store)
    client.create_experiment("faces", artifact_location=str(tmp_path / "artifacts"))
    said = [start(tmp_path, config, 1, 4), start(tmp_path, config, 3, 6)]
    assert not any("warning" in text for text in said), said
    experiment = client.get_experiment_by_name("faces")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "run/mlflow_run.json").read_text())["id"]
    assert (run.info.run_name, run.info.status) == ("digits", "FINISHED")
    assert run.data.params["train.precision"] == "fp32"
    assert run.data.params["stages.boundaries"] == "[0.4]"
    losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(losses) == sorted((step, 1 / step) for step in (1, 2, 3, 4, 3, 4, 5, 6))
    assert run.data.metrics["loss"] == 1 / 6
    assert run.data.metrics["loss_per_stage/1"] == 0.75
    grids = [each.path for each in client.list_artifacts(run.info.run_id, "samples")]
    assert grids == ["samples/step_00000004.png", "samples/step_00000006.png"]


def test_a_server_that_does_not_answer_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:  # bound, and refuses connections: it does not listen
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        said = start(tmp_path, MetricsConfig(sinks=("mlflow",), mlflow=MlflowConfig(tracking_uri=uri)), 1, 6)
    assert said.count("warning: mlflow gets no more metrics") == 1
    assert "step 6/6" in said
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 6
