"""The tables of a report: what a run is, how it is spread over ranks, where its compute went, how good it is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from msdiff_dist.apps.report.run_data import RunData, items, number
from msdiff_dist.apps.train.costs import training_petaflops
from msdiff_dist.apps.train.plan import plan_run
from msdiff_dist.config import differences
from msdiff_dist.errors import UserError
from msdiff_dist.files.json_text import parse_mapping
from msdiff_dist.terminal import duration

_MOST_GROUPS = 64  # rows of ranks that hold the same


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts; `notes` are sentences under it. The first column is a heading."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def summary(run: RunData) -> list[tuple[str, str]]:
    """What a run is, as (name, value)."""
    found: list[tuple[str, str]] = [("folder", str(run.folder.absolute()))]
    last = run.last
    if run.recipe:
        recipe, partition = run.recipe, run.recipe.partition()
        edges = " | ".join(f"{edge:g}" for edge in partition.boundaries)
        found += [
            ("recipe", recipe.name),
            ("model", _model(run)),
            ("stages", f"{partition.num_stages}" + (f", boundaries {edges}" if edges else "")),
            ("process", f"{recipe.diffusion.process}, samples of stages drawn {recipe.stages.sampling}"),
            ("data", str(recipe.data.shards or [source.shards for source in recipe.data.sources] or recipe.data.kind)),
            ("batch", _batch(last) or f"{recipe.train.global_batch_size}"),
            ("precision", recipe.train.precision),
        ]
    found.append(("ranks", "unknown: there is no checkpoint" if run.world_size is None else str(run.world_size)))
    if last:
        steps = f"{last['step']:,}" + (f" of {run.recipe.train.steps:,}" if run.recipe else "")
        found.append(("steps", steps))
        for name, key, form in (
            ("images", "images_seen", ",.0f"), ("compute", "petaflops", ".4g"), ("training loss", "loss", ".4g"),
        ):  # fmt: skip
            value = number(last, key)
            found.append((name, "no number" if value is None else f"{value:{form}}" + " PFLOP" * (name == "compute")))
    if run.validations and (held := number(run.validations[-1], "validation", "loss")) is not None:
        found.append(("held-out loss", f"{held:.4g} at step {run.validations[-1]['step']:,}"))
    found += list(_when(run))
    return found


def _model(run: RunData) -> str:
    assert run.recipe
    model = run.recipe.model
    try:
        costs = plan_run(run.recipe, run.world_size or 1).costs
    except UserError:
        return model.family
    return f"{model.family}, {costs.total_params / 1e6:,.3g} million parameters"


def _batch(last: dict[str, Any]) -> str | None:
    seen, step = number(last, "images_seen"), number(last, "step")
    return f"{seen / step:,.0f} samples a step" if seen and step else None


def _when(run: RunData) -> Iterator[tuple[str, str]]:
    metrics = run.folder / "metrics.jsonl"
    if run.starts:
        began = f"{_date(run.starts[0][0])} on {run.starts[0][1]}"
        again = len(run.starts) - 1
        hosts = sorted({host for _, host in run.starts})
        yield "started", began + (f", and {again} more times on {', '.join(hosts)}" if again else "")
    if metrics.is_file():
        yield "last step", _date(metrics.stat().st_mtime)
    seconds = [number(line, "images_seen") for line in run.steps[-1:]]
    rates = [rate for line in run.steps if (rate := number(line, "images_per_second"))]
    if seconds and seconds[0] and rates:
        mean = len(rates) / sum(1 / rate for rate in rates)  # of equal batches: harmonic
        yield "time in steps", f"{duration(seconds[0] / mean)}, {mean:,.4g} images/s"
    job = run.folder / "launch" / "job.json"
    if job.is_file():
        record = parse_mapping(job.read_bytes())
        submitted = number(record, "submitted")
        when = f", submitted {_date(submitted)}" if submitted else ""
        yield "job", f"{', '.join(map(str, items(record, 'job_ids')))} ({record.get('executor')}){when}"


def versions() -> str:
    """The versions of what wrote the report."""
    found = []
    for package in ("msdiff-dist", "torch", "deepspeed"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def plan_tables(run: RunData) -> list[Table]:
    """Ranks x stages of the run's newest start, and its compute by stage and part.

    Raises:
        UserError: the recipe has no plan on as many ranks.
    """
    if run.recipe is None:
        return []
    world = run.world_size or 1
    plan = plan_run(run.recipe, world)
    stages, samples_WK = plan.placement.num_stages, plan.placement.samples_WK
    cost = [sum(n * c for n, c in zip(row, plan.cost_K, strict=True)) for row in samples_WK.tolist()]
    groups: list[list[int]] = []
    for rank in range(world):
        if groups and samples_WK[groups[-1][0]].tolist() == samples_WK[rank].tolist():
            groups[-1].append(rank)
        else:
            groups.append([rank])
    rows = [
        [
            f"{group[0]}" if len(group) == 1 else f"{group[0]} to {group[-1]}",
            *(f"{n}" if n else "" for n in samples_WK[group[0]].tolist()),
            f"{100 * cost[group[0]] / max(cost):.0f} %",
        ]
        for group in groups[:_MOST_GROUPS]
    ]
    balance = plan.placement.balance(plan.cost_K)
    notes = [f"Planned balance {balance:.3f}: mean over maximum of the ranks' work. ZeRO {_zero(run)}."]
    if run.world_size is None:
        notes.append("There is no checkpoint that says on how many ranks: this is the plan of one.")
    if len(groups) > _MOST_GROUPS:
        notes.append(f"{len(groups) - _MOST_GROUPS} more rows are not shown.")
    measured = [value for line in run.steps if (value := number(line, "balance")) is not None]
    if measured:
        notes.append(f"Measured: {sum(measured) / len(measured):.3f}, the mean over the steps.")
    placement = Table(
        title="Samples of each stage that a rank computes in a step",
        head=["rank", *(f"stage {k}" for k in range(stages)), "work"],
        rows=rows,
        notes=notes,
    )
    return [placement, _compute(run, plan.quotas.quotas_K, plan.costs)]


def _zero(run: RunData) -> str:
    assert run.recipe
    return f"{run.recipe.parallel.zero_shared} for the encoder, {run.recipe.parallel.zero_decoders} for decoders"


def _compute(run: RunData, quotas_K: Any, costs: Any) -> Table:
    steps = run.last.get("step", 0)
    parts = [
        (
            training_petaflops(float(quota) * steps * costs.encoder.step_macs),
            training_petaflops(float(quota) * steps * decoder.step_macs),
        )
        for quota, decoder in zip(quotas_K, costs.decoders, strict=True)
    ]
    total = sum(map(sum, parts)) or 1.0
    samples = sum(int(quota) for quota in quotas_K) or 1

    def row(name: str, quota: int, encoder: float, decoder: float) -> list[str]:
        both = encoder + decoder
        return [
            name, f"{100 * quota / samples:.1f} %", f"{encoder:.4g}", f"{decoder:.4g}", f"{both:.4g}",
            f"{100 * both / total:.1f} %",
        ]  # fmt: skip

    rows = [row(f"stage {k}", int(quotas_K[k]), *parts[k]) for k in range(len(parts))]
    rows.append(row("all", samples, sum(p[0] for p in parts), sum(p[1] for p in parts)))
    return Table(
        title=f"Compute of {steps:,} steps in PFLOP",
        head=["", "samples", "encoder", "decoder", "both", "share"],
        rows=rows,
        notes=["Counted from the network's products and convolutions, forward and backward."],
    )


def evaluation_table(run: RunData) -> Table | None:
    """The run's evaluations with their 95 % intervals, newest last; None where there are none."""
    if not run.evaluations:
        return None
    rows = []
    for record in run.evaluations:
        metrics = record.get("metrics")
        for name in metrics if isinstance(metrics, dict) else {}:
            value, ends = number(metrics, name), items(record, "intervals", name)
            low, high = number(ends, 0), number(ends, 1)
            interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
            rows.append([
                name, "no number" if value is None else f"{value:.5g}", interval, str(record.get("step", "")),
                str(record.get("weights", "")), _over_what(record), str(record.get("time", "")),
            ])  # fmt: skip
    notes = [note for record in run.evaluations for note in items(record, "notes")]
    head = ["metric", "value", "95 % interval", "step", "weights", "of", "when"]
    return Table(title="", head=head, rows=rows, notes=[str(note) for note in dict.fromkeys(map(str, notes))])


def _over_what(record: dict[str, Any]) -> str:
    features, held = record.get("features"), record.get("held_out")
    if isinstance(held, dict):
        return f"{held.get('samples', held.get('num', '?'))} held-out samples"
    name = features.get("name", "?") if isinstance(features, dict) else "?"
    return f"{record.get('num', '?')} images, {name}"


def differing(runs: Sequence[RunData]) -> Table | None:
    """Recipe fields in which runs differ; None for a single run."""
    known = [run for run in runs if run.mapping]
    if len(known) < 2:
        return None
    fields = dict.fromkeys(f for run in known[1:] for f, _, _ in differences(known[0].mapping, run.mapping))
    rows = [[field, *(_shown(_at(run.mapping, field)) for run in known)] for field in fields if field != "name"]
    notes = [] if rows else ["The recipes are the same but for their names."]
    return Table(title="", head=["field", *(run.name for run in known)], rows=rows, notes=notes)


def history(run: RunData) -> list[str]:
    """Where a run came from, and what changed in its recipe when it was resumed, as sentences."""
    told = []
    if run.origin:
        told.append(f"Branched from {run.origin.get('run')} at step {run.origin.get('step')}.")
        for change in items(run.origin, "changed"):
            if isinstance(change, list) and len(change) == 3:
                told.append(f"There: {change[0]} {_shown(change[1])} → {_shown(change[2])}.")
    told += [f"After step {change.step:,} ({_date(change.time)}): {change}." for change in run.changes]
    return told


def _at(mapping: Any, field: str) -> Any:
    for key in field.split("."):
        mapping = mapping.get(key) if isinstance(mapping, dict) else None
    return mapping


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
