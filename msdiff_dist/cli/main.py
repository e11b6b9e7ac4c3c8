"""The `msdiff` command: its verbs, and how its errors end."""

from __future__ import annotations

import errno
import os
import sys

import typer
from rich.console import Console

from msdiff_dist import __version__, third_party
from msdiff_dist.cli import (
    ablate,
    array,
    attach,
    cancel,
    check,
    checkpoint,
    classifier,
    compare,
    convert,
    data,
    doctor,
    evaluate,
    export,
    extract,
    flops,
    grow,
    init,
    interval_report,
    jobs,
    launch,
    logs,
    merge,
    plan,
    recipes,
    report,
    sample,
    stages,
    train,
)
from msdiff_dist.cli.choices import NamingCommand
from msdiff_dist.errors import MsdiffError, UserError

_REASONS_OUTSIDE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOTDIR,
    errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE,
)  # fmt: skip

app = typer.Typer(
    help="Train multi-stage latent-diffusion models: one shared encoder, one decoder per timestep stage.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data.app, name="data")
app.add_typer(stages.app, name="stages")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(classifier.app, name="classifier")
for verb in (
    recipes.recipes,
    init.init,
    doctor.doctor,
    check.check,
    plan.plan,
    flops.flops,
    train.train,
    sample.sample,
    evaluate.evaluate,
    compare.compare,
    report.report,
    ablate.ablate,
    interval_report.interval_report,
    export.export,
    convert.convert,
    grow.grow,
    merge.merge,
    extract.extract,
    launch.launch,
    array.array,
    jobs.jobs,
    logs.logs,
    attach.attach,
    cancel.cancel,
):
    app.command(cls=NamingCommand)(verb)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(version: bool = typer.Option(False, "--version", callback=_version, help="Print the version.")) -> None:
    pass


def main() -> None:
    """Run the command. Exit status: 0 done, 2 an error that the user can correct, 1 any other failure."""
    third_party.quiet()
    try:
        _run()
    except MsdiffError as e:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/] {_escaped(str(e))}", highlight=False)
        status = 2 if isinstance(e, UserError) else 1
        if "torch.distributed" in sys.modules:
            _leave_if_rank(status)
        sys.exit(status)


def _run() -> None:
    """Run the command, and end its output.

    Raises:
        UserError: in place of an OSError for which nothing but the machine, its disks and permissions is the reason.
    """
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OSError as e:
        if e.errno not in _REASONS_OUTSIDE:
            raise
        if e.filename is None:  # else Python tries to write once more what is left, and fails with a status of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        where = str(e.filename or "output")
        remedy = "Name a place that can be read and written, and that has enough space."
        raise UserError("file", where, f"cannot be used ({e.strerror})", remedy) from e


def _leave_if_rank(status: int) -> None:
    """End a rank that failed without waiting for the others, which may be waiting for it."""
    from msdiff_dist.distributed.environment import is_rank_process, leave

    if is_rank_process():
        leave(status)


def _escaped(text: str) -> str:
    """For rich, which takes `[0]` in a message for markup."""
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
