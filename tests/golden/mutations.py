"""Do the golden records notice a change? Makes records with copies of the package that have one change each:

    python -m tests.golden.mutations [NAME ...]

The changes are one for every purpose given to `randomness.generator` in the package, and those of `CHANGES`. Names
select some of them. Each is tried in a fork of this process, which has imported torch and the other heavy libraries but
nothing of the package. The printed table says what differed for each change; the exit status is 1 if a change went
unseen.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PACKAGE = "msdiff_dist"
ROOT = Path(__file__).parents[2]
CONTROL = "no change"  # a copy without a change, which must equal the records
_HEAVY = (
    *(
        "torch",
        "torch._dynamo",
        "torch._refs",
        "torch.utils.tensorboard",
        "torch.utils.data",
        "deepspeed",
        "webdataset",
    ),
    *("sklearn.datasets", "PIL.Image", "omegaconf", "rich.progress", "safetensors.torch", "fsspec", "typer"),
)
_context = multiprocessing.get_context("fork")

# The record that notices a change of the purpose. Every purpose in the package must be here or in UNRECORDED.
PURPOSES = {
    "augmentation": "batches_edm_images",
    "bootstrap": "draws",
    "condition dropout": "batches_edm_images",
    "crop": "draws",
    "dropout": "training_vp_latents",
    "encode": "draws",
    "encode flipped": "draws",
    "flip": "batches_discrete_images",
    "fourier frequencies": "training_edm_images",
    "held out": "draws",
    "held out noise": "draws",
    "held out samples": "draws",
    "held out times": "draws",
    "mind directions": "draws",
    "noise": "batches_edm_images",
    "optimal denoiser": "draws",
    "optimal denoiser times": "draws",
    "pack order": "draws",
    "posterior": "batches_vp_latents",
    "sampling": "draws",
    "shard order": "batches_edm_images",
    "source": "batches_mixed_text_latents",
    "stage": "batches_edm_images",
    "stage of batch": "draws",
    "synthetic sample": "batches_synthetic_latents",
    "test split": "draws",
    "time": "batches_edm_images",
    "window order": "batches_edm_images",
}
UNRECORDED = {"feature classifier": "trains the network that scores images, and that alone"}

# (name, the record that notices, source text, what stands there instead). The text occurs once in the package.
CHANGES = [
    ("shard order", "batches_edm_images",
     ".permutation(len(counts)).tolist()", ".permutation(len(counts)).tolist()[::-1]"),
    ("dealing of shards to lanes", "batches_edm_images", "(size + counts[shard], lane)", "(size + 1, lane)"),
    ("window order", "batches_edm_images",
     '"window order", epoch, lane, number)', '"window order", epoch, lane, number + 1)'),
    ("window size", "batches_edm_images", "lanes, max(shuffle, 1), seed", "lanes, max(shuffle, 1) + 1, seed"),
    ("mixing of sources", "batches_mixed_text_latents",
     "(np.arange(quota) + 0.5) / quota", "(np.arange(quota) + 1) / quota"),
    ("share of flipped samples", "batches_discrete_images", ".random(_FLIPS) < 0.5", ".random(_FLIPS) < 0.4"),
    ("posterior's deviation", "batches_vp_latents", "np.exp(stored[:, C:] / 2)", "np.exp(stored[:, C:])"),
    ("rounding of quotas", "batches_edm_images", "np.argsort(quotas - exact,", "np.argsort(exact - quotas,"),
    ("micro batches", "batches_edm_images",
     "(bounds[1:], np.arange(quotas[k]),", "(bounds[1:], np.arange(quotas[k])[::-1],"),
    ("importance weights", "batches_vp_latents",
     "probability_K * quotas_K.sum() / quotas_K", "np.ones_like(probability_K)"),
    ("importance in the loss", "training_edm_images",
     "loss_n.sum() * (float(importance_K[k])", "loss_n.sum() * (1.0"),
    ("weights of times in the loss", "training_vp_latents",
     "return batch.weight_n[rows] * sample_losses(", "return sample_losses("),
    ("alignment of routed rows", "batches_edm_images",
     "index_n=in_n[order_n],", "index_n=np.sort(in_n),"),
    ("alignment of packed rows", "batches_edm_images", "= rows[row_n]", "= rows[row_n[::-1]]"),
    ("alignment of times", "batches_edm_images",
     "draw.t_B[index_n]", "draw.t_B[: len(index_n)]"),
    ("alignment of noise", "training_edm_images",
     "noise(self._seed, batch, index_n,", "noise(self._seed, batch, np.sort(index_n),"),
    ("alignment of dropped conditions", "training_discrete_images",
     "dropped_conditions(self._seed, batch, index_n,", "dropped_conditions(self._seed, batch, np.sort(index_n),"),
    ("alignment of augmentations", "training_edm_images",
     "self._augmentation, self._seed, batch, index_n)", "self._augmentation, self._seed, batch, np.sort(index_n))"),
    ("warm-up of the learning rate", "training_discrete_images",
     "return number / self.warmup_steps", "return (number + 1) / self.warmup_steps"),
    ("decay of the average", "training_discrete_images",
     "self._config.decay_at(step, self._batch_size)", "self._config.decay_at(step + 1, self._batch_size)"),
    ("decay without warm-up", "training_vp_latents", "if self.warmup else decay", "if self.warmup else decay**2"),
    ("warm-up of the decay", "training_discrete_images",
     "(1 + update) / (10 + update)", "(1 + update) / (11 + update)"),
    ("limit of the decay", "training_discrete_images", "min(decay, (1 + update)", "min(decay**2, (1 + update)"),
    ("half-life of the average", "training_edm_images",
     "0.5 ** (batch_size / halflife)", "0.6 ** (batch_size / halflife)"),
    ("warm-up of the half-life", "training_edm_images",
     "self.warmup_ratio * (update - 1) * batch_size", "self.warmup_ratio * update * batch_size"),
    ("power averages", "training_discrete_images", "(1 - since / step) ** (gamma + 1)", "(1 - since / step) ** gamma"),
    ("exponents of power averages", "training_discrete_images",
     "np.roots([1, 7, 16 - ratio", "np.roots([1, 7, 15 - ratio"),
    ("post-hoc average", "training_discrete_images",
     "(gamma_b + 1) / (gamma_a + gamma_b + 1)", "(gamma_b + 1) / (gamma_a + gamma_b + 2)"),
]  # fmt: skip


class MutationError(Exception):
    """The check itself failed: the package does not fit the tables here, or a process died."""


@dataclass(frozen=True)
class Change:
    """One change of the package.

    Attributes:
        name: what it is a change of.
        records: the records that must notice it.
        file: the changed file, relative to the package.
        text: its changed text.
    """

    name: str
    records: tuple[str, ...]
    file: Path
    text: str


@dataclass(frozen=True)
class Outcome:
    """Whether a change was noticed.

    Attributes:
        name: name of the change.
        seen: the first difference from the records; None if there was none.
        seconds: wall time of the check.
    """

    name: str
    seen: str | None
    seconds: float


def all_changes(package: Path) -> list[Change]:
    """The changes of every purpose, and those of `CHANGES`.

    Raises:
        MutationError: a purpose has no record or no longer exists, or a text of `CHANGES` does not occur exactly once.
    """
    sources = {path.relative_to(package): path.read_text() for path in sorted(package.rglob("*.py"))}
    drawn = {file: purposes(text) for file, text in sources.items()}
    occurring = {purpose for found in drawn.values() for purpose, _ in found}
    for purpose in sorted(occurring ^ {*PURPOSES, *UNRECORDED}):
        problem = "has no golden record; make one and add it to" if purpose in occurring else "is gone; remove it from"
        raise MutationError(f"the purpose {purpose!r} {problem} PURPOSES in tests/golden/mutations.py")
    changes = []
    for purpose, record in PURPOSES.items():
        for file, found in drawn.items():
            if nodes := [node for p, node in found if p == purpose]:
                text = _with_other_strings(sources[file], nodes)
                changes.append(Change(f"purpose {purpose!r}", (record,), file, text))
    for name, record, old, new in CHANGES:
        files = [file for file, text in sources.items() for _ in range(text.count(old))]
        if len(files) != 1:
            problem = f"{old!r} occurs {len(files)} times in {PACKAGE}, not once"
            raise MutationError(f"{name}: {problem}; correct CHANGES in tests/golden/mutations.py")
        changes.append(Change(name, (record,), files[0], sources[files[0]].replace(old, new)))
    for change in changes:
        compile(change.text, str(change.file), "exec")
    return changes


def purposes(text: str) -> list[tuple[str, ast.Constant]]:
    """Every purpose given to `randomness.generator` in a source file, and the string constant that holds it.

    A purpose may be a parameter of the function around the call. Then the purposes are the arguments that calls of that
    function in the same file pass for it.

    Raises:
        MutationError: a purpose is neither a string constant nor such a parameter.
    """
    tree = ast.parse(text)
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1] == "randomness"
        for alias in node.names
        if alias.name == "generator"
    } | {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "generator"}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found: list[tuple[str, ast.Constant]] = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        if called not in names and not called.endswith("randomness.generator"):
            continue
        purpose = _argument(call, 1, "purpose")
        given: list[ast.expr | None] = [purpose]
        if isinstance(purpose, ast.Name):
            given = _given_for(tree, [f for f in functions if call in ast.walk(f)], purpose.id)
        for node in given:
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                raise MutationError(f"the purpose in {ast.unparse(call)!r} is not plain text")
            found.append((node.value, node))
    return found


def _given_for(tree: ast.Module, around: Sequence[ast.FunctionDef], parameter: str) -> list[ast.expr | None]:
    """The arguments for `parameter` in calls of one of the functions `around`, in the same file."""
    for function in around:
        parameters = [a.arg for a in function.args.args if a.arg != "self"]
        calls = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == function.name
        ]
        if parameter in parameters and calls:
            return [_argument(call, parameters.index(parameter), parameter) for call in calls]
    raise MutationError(f"the purpose {parameter!r} comes from nowhere in its file")


def _argument(call: ast.Call, position: int, name: str) -> ast.expr | None:
    if len(call.args) > position:
        return call.args[position]
    return next((k.value for k in call.keywords if k.arg == name), None)


def _with_other_strings(text: str, nodes: Sequence[ast.Constant]) -> str:
    lines = text.encode().splitlines(keepends=True)
    for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset), reverse=True):
        if node.lineno != node.end_lineno:
            raise MutationError(f"the purpose {node.value!r} is not on one line")
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line[: node.col_offset] + b"'changed'" + line[node.end_col_offset :]
    return b"".join(lines).decode()


def check(changes: Sequence[Change], processes: int) -> Iterator[Outcome]:
    """Try the changes, up to `processes` at a time; their outcomes in the order in which they end."""
    waiting = list(changes)
    running: dict[Connection, tuple[Change, float]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            change = waiting.pop(0)
            running[_start(_first_difference, change)] = change, time.monotonic()
        for receive in wait(list(running)):
            assert isinstance(receive, Connection)
            change, start = running.pop(receive)
            yield Outcome(change.name, _result(receive), time.monotonic() - start)


def _first_difference(change: Change) -> str | None:
    """The first difference when the changed package makes the change's records; None if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        # `copytree` keeps modification times, so the compiled files that are copied too are valid for all but the
        # changed file.
        shutil.copytree(ROOT / PACKAGE, Path(folder) / PACKAGE)
        (Path(folder) / PACKAGE / change.file).write_text(change.text)
        sys.path.insert(0, folder)
        found = importlib.import_module(PACKAGE).__file__
        if not found or not found.startswith(folder):
            raise MutationError(f"{found} was imported, not the changed copy")
        importlib.import_module("tests.golden.record")
        # DeepSpeed keeps process groups in globals, so every training needs a process of its own.
        return next(filter(None, (_result(_start(_difference, name)) for name in change.records)), None)


def _difference(name: str) -> str | None:
    from tests.golden import record, records, training

    case = name.removeprefix("training_")
    make = record.MAKERS[name] if case == name else partial(training.single_process_record, case)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        try:
            now = make(Path(folder))
        except Exception as e:
            return f"{name}: {type(e).__name__}: {e}"
    found = records.differences(records.load(name), now)
    return f"{name}, {len(found)} differences: {found[0]}" if found else None


def _start(function: Callable[..., str | None], *args: Any) -> Connection:
    """Call `function` in a fork. `_result` waits for its result on the connection that this returns."""
    receive, send = _context.Pipe(duplex=False)
    _context.Process(target=_reporting, args=(send, function, args)).start()
    send.close()
    return receive


def _reporting(send: Connection, function: Callable[..., str | None], args: tuple[Any, ...]) -> None:
    try:
        send.send((function(*args), None))
    except BaseException:
        send.send((None, traceback.format_exc()))


def _result(receive: Connection) -> str | None:
    try:
        result, error = receive.recv()
    except EOFError:
        result, error = None, "a process of the check died"
    if error:
        raise MutationError(error)
    return result


def main() -> int:
    for name in _HEAVY:
        importlib.import_module(name)
    names, start = set(sys.argv[1:]), time.monotonic()
    changes = [c for c in all_changes(ROOT / PACKAGE) if not names or c.name in names]
    if unknown := names - {c.name for c in changes}:
        raise MutationError(f"no such changes: {', '.join(sorted(unknown))}")
    needed, unchanged = dict.fromkeys(r for c in changes for r in c.records), Path("__init__.py")
    control = Change(CONTROL, tuple(needed), unchanged, (ROOT / PACKAGE / unchanged).read_text())
    unseen, false_alarm = 0, False
    for outcome in check([control, *changes], processes=min(2, len(os.sched_getaffinity(0)))):
        mark = "seen" if outcome.seen else "unseen"
        print(f"{mark:7}{outcome.seconds:5.1f} s  {outcome.name:34}{outcome.seen or ''}"[:160], flush=True)
        if outcome.name == CONTROL:
            false_alarm = outcome.seen is not None
        elif outcome.seen is None:
            unseen += 1
    for purpose, reason in UNRECORDED.items():
        print(f"not recorded: {purpose!r} {reason}")
    print(f"{len(changes)} changes tried, {len(changes) - unseen} seen, in {time.monotonic() - start:.0f} s")
    if false_alarm:
        print("the package as it is differs from its records already")
    return 1 if unseen or false_alarm else 0


if __name__ == "__main__":
    sys.exit(main())
