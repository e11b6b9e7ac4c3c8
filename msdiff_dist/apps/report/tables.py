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
from msdiff_dist.apps.train.phases import Phase
from msdiff_dist.apps.train.plan import RunPlan, plan_phases, plan_run
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
    """Ranks x stages of the run's newest start, for each phase of the run, and its compute by stage and part.

    Raises:
        UserError: the recipe has no plan on as many ranks.
    """
    if run.recipe is None:
        return []
    planned = plan_phases(run.recipe, run.world_size or 1, ends=run.stage_ends)
    return [*(_placement(run, phase, plan) for phase, plan in planned), _compute(planned, run.last.get("step", 0))]


def _placement(run: RunData, phase: Phase, plan: RunPlan) -> Table:
    samples_WK = plan.placement.samples_WK
    cost = [sum(n * c for n, c in zip(row, plan.cost_K, strict=True)) for row in samples_WK.tolist()]
    groups: list[list[int]] = []
    for rank in range(plan.placement.world_size):
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
    parallel = phase.recipe.parallel
    notes = [
        f"Planned balance {balance:.3f}: mean over maximum of the ranks' work. ZeRO {parallel.zero_shared} for the "
        f"encoder, {parallel.zero_decoders} for decoders."
    ]
    if run.world_size is None:
        notes.append("There is no checkpoint that says on how many ranks: this is the plan of one.")
    if len(groups) > _MOST_GROUPS:
        notes.append(f"{len(groups) - _MOST_GROUPS} more rows are not shown.")
    steps = [line for line in run.steps if phase.first <= line["step"] <= phase.last]
    measured = [value for line in steps if (value := number(line, "balance")) is not None]
    if measured:
        notes.append(f"Measured: {sum(measured) / len(measured):.3f}, the mean over the steps.")
    about = f" of steps {phase.first:,} to {phase.last:,}: {phase.about}" if phase.about else ""
    return Table(
        title=f"Samples of each stage that a rank computes in a step{about}",
        head=["rank", *_names(phase), "work"],
        rows=rows,
        notes=notes,
    )


def _names(phase: Phase) -> list[str]:
    """What the stages of a phase are called; that of a model which has yet to grow is none of the recipe's."""
    stages = phase.recipe.stages.num_stages
    return ["unified"] if phase.about and stages == 1 else [f"stage {k}" for k in range(stages)]


def _compute(planned: Sequence[tuple[Phase, RunPlan]], done: int) -> Table:
    """Samples, and compute of encoder and decoder, of each stage in the first `done` steps."""
    of_stage: dict[str, tuple[int, float, float]] = {}
    for phase, plan in planned:
        steps = max(0, min(done, phase.last) - phase.first + 1)
        for name, quota, decoder in zip(_names(phase), plan.quotas.quotas_K.tolist(), plan.costs.decoders, strict=True):
            count = quota * steps
            taken = count, *(training_petaflops(count * p.step_macs) for p in (plan.costs.encoder, decoder))
            before = of_stage.get(name, (0, 0.0, 0.0))
            of_stage[name] = (before[0] + taken[0], before[1] + taken[1], before[2] + taken[2])
    all_samples, all_encoder, all_decoder = map(sum, zip(*of_stage.values(), strict=True))
    total = all_encoder + all_decoder

    def row(name: str, samples: int, encoder: float, decoder: float) -> list[str]:
        both = encoder + decoder
        return [
            name, f"{100 * samples / (all_samples or 1):.1f} %", f"{encoder:.4g}", f"{decoder:.4g}", f"{both:.4g}",
            f"{100 * both / (total or 1.0):.1f} %",
        ]  # fmt: skip

    rows = [row(name, *taken) for name, taken in of_stage.items()]
    rows.append(row("all", all_samples, all_encoder, all_decoder))
    return Table(
        title=f"Compute of {done:,} steps in PFLOP",
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
