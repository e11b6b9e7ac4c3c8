"""Metrics for MLflow. The package is imported when a run begins that asks for it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from msdiff_dist.training.metric_sink import SinkContext
from msdiff_dist.training.tracker import Scalars, Tracker, known_run, remember_run

_METRICS, _PARAMS = 1000, 100  # that MLflow takes in one request
_PARAM_CHARACTERS = 500  # of a value, in every version of its server


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """MLflow, for `mlflow` in `metrics.sinks`. What is null, and all else (user and password), is as its environment
    variables say."""

    tracking_uri: str | None = None
    """Server or store: `https://...`, `sqlite:////data/mlflow.db`; null: `MLFLOW_TRACKING_URI`, or else MLflow's
    default, which is a store in the working directory."""
    experiment: str | None = None
    """Experiment, made if there is none of this name; null: `MLFLOW_EXPERIMENT_NAME`, or else `Default`."""
    name: str | None = None
    """Name of the run; null: the recipe's `name`."""


class MlflowRun:
    """A run of MLflow.

    A run that resumes trains the steps past its checkpoint again; MLflow then has two values of such a step.
    """

    def __init__(self, context: SinkContext) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        assert isinstance(context.settings, MlflowConfig)
        settings = context.settings
        self._metric, self._client = Metric, MlflowClient(tracking_uri=settings.tracking_uri)
        uri, known = self._client.tracking_uri, known_run(context, "mlflow")
        if known.get("tracking_uri") == uri:
            self._id = str(known["id"])
            self._client.update_run(self._id, status="RUNNING")
        else:
            experiment = settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
            try:
                experiment_id = self._client.create_experiment(experiment)
            except MlflowException:  # it exists, perhaps since a moment ago
                found = self._client.get_experiment_by_name(experiment)
                if found is None:
                    raise
                experiment_id = found.experiment_id
            name = settings.name or context.recipe.get("name")
            self._id = self._client.create_run(experiment_id, run_name=name).info.run_id
            remember_run(context, "mlflow", {"id": self._id, "tracking_uri": uri})
            # Parameters of a run cannot change, as fields of a recipe may. So these are those of the first start.
            fields = iter(_flat(context.recipe))
            while some := list(islice(fields, _PARAMS)):
                params = [Param(key, value[:_PARAM_CHARACTERS]) for key, value in some]
                self._client.log_batch(self._id, params=params)
        self._client.log_dict(self._id, dict(context.recipe), "recipe.yaml")
        self.place = f"run {self._id} in {uri}"

    def log(self, steps: Sequence[Scalars]) -> None:
        """Every number of every step, under its own name."""
        now = int(time.time() * 1000)
        metrics = (
            self._metric(name, value, now, int(scalars["step"]))
            for scalars in steps
            for name, value in scalars.items()
            if name != "step"
        )
        while some := list(islice(metrics, _METRICS)):
            self._client.log_batch(self._id, metrics=some)

    def grid(self, step: int, path: Path) -> None:
        """The file, among the artifacts in `samples`."""
        self._client.log_artifact(self._id, str(path), "samples")

    def finish(self) -> None:
        """Say that the run has ended, for now."""
        self._client.set_terminated(self._id)


def _flat(mapping: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Fields by their dotted names, values as text."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", str(value)


def mlflow_tracker(context: SinkContext) -> Tracker:
    """The sink `mlflow`."""
    return Tracker("mlflow", lambda: MlflowRun(context), context)
