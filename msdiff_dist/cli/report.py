"""`msdiff report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or names of runs.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file. Default: report.html in the folder of the first run.")
    ] = None,
    strip: Annotated[
        bool, typer.Option("--strip", help="Sample images to show what each stage makes of them, in any model.")
    ] = False,
    nearest: Annotated[
        int, typer.Option(min=0, max=256, help="Samples of each run to show beside the nearest training images.")
    ] = 0,
    live: Annotated[
        bool, typer.Option("--live", help="Serve the report on this machine, and keep it up to date.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --live; 0: any that is free.")] = 8420,
) -> None:
    """Write one HTML file about runs, which needs no network: curves, balance, samples, evaluations, differences.

    Training writes one at the end of each run. With --live the page is served on 127.0.0.1 until Ctrl-C.

    Example: msdiff report runs/quickstart --out quickstart.html
    """
    from msdiff_dist.apps.report.serve import REFRESH_S, ReportServer
    from msdiff_dist.apps.report.write import NAME, Drawn, Request, read_runs
    from msdiff_dist.apps.report.write import report as report_on
    from msdiff_dist.distributed.environment import this_device
    from msdiff_dist.errors import ConfigError
    from msdiff_dist.files.atomic import WriteError, atomic_write, check_place, writing
    from msdiff_dist.launch.known_runs import find_run

    folders = [find_run(run) for run in runs]
    read_runs(folders)
    device = this_device()
    if not live:
        target = out or folders[0] / NAME
        check_place("--out", target, "file")
        with writing("--out", target, WriteError):
            atomic_write(target, report_on(Request(folders, device, strip, nearest)))
        typer.echo(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")
        return
    if out is not None:
        raise ConfigError(
            "--out", str(out), "has no meaning with --live, which serves the report", "Remove one of them."
        )
    request, kept = Request(folders, device, strip, nearest, REFRESH_S), dict[Path, Drawn]()
    with ReportServer(folders, lambda: report_on(request, kept), port) as server:
        typer.echo(f"serving {server.address} until Ctrl-C")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("ended")
