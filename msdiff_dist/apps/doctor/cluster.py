"""SLURM and the network between nodes."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from msdiff_dist.apps.doctor.finding import Finding, ask, listed, ok, problem, text_of, warning
from msdiff_dist.apps.doctor.probe import Answers

_CLIENTS = ("sbatch", "srun", "scontrol", "squeue", "sinfo", "sacct", "scancel")
_INTERFACES = Path("/sys/class/net")


def check_slurm(answers: Answers) -> Iterator[Finding]:
    """SLURM's client commands, whether its controller answers, and what it does with pre-empted jobs."""
    there = [client for client in _CLIENTS if shutil.which(client)]
    if not there:
        yield ok("SLURM", "no client commands: `msdiff launch` runs with --cluster local only")
        return
    name = "SLURM"
    if missing := [client for client in _CLIENTS if client not in there]:
        cure = "Load the cluster's SLURM module, or install its client package."
        yield warning("SLURM's commands", f"not found: {listed(missing)}", cure)
    reply = ask("scontrol", "show", "config")
    config = dict(re.findall(r"^(\S+) *= *(.*?) *$", reply.output, re.MULTILINE))
    if not config:
        cure = "On a login node see `scontrol ping`; elsewhere use --cluster local."
        yield warning(name, f"its commands are here, but no controller answers: {reply.failure}", cure)
        return
    job = os.environ.get("SLURM_JOB_ID")
    place = f"inside job {job}" if job else "outside a job"
    yield ok(name, f"{config.get('SLURM_VERSION', '')} at {config.get('SlurmctldHost[0]', 'an unnamed host')}, {place}")
    if config.get("JobRequeue") == "0":
        yield ok("requeue", "off by default in this cluster; `msdiff launch` asks for it")
    mode = config.get("PreemptMode", "OFF")
    # One parameter, which older and newer releases have in different places.
    parameters = f"{config.get('SlurmctldParameters', '')},{config.get('PreemptParameters', '')}"
    if "REQUEUE" in mode and "send_user_signal" not in parameters:
        found = f"{mode}, and pre-empted jobs do not get the signal at which a run saves"
        cure = "Ask for SlurmctldParameters=preempt_send_user_signal, or set a smaller checkpoint.every."
        yield warning("pre-emption", found, cure)
    else:
        yield ok("pre-emption", mode)


def check_interfaces(answers: Answers) -> Iterator[Finding]:
    """Interfaces that are up, the address of this host's own name, and variables that name an interface."""
    names = sorted(p.name for p in _INTERFACES.iterdir()) if _INTERFACES.is_dir() else []
    up = [n for n in names if n != "lo" and (text_of(_INTERFACES / n / "operstate") or "") in ("up", "unknown")]
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        cure = f"Write {host} into /etc/hosts with this machine's address: ranks of other machines ask for it."
        yield warning("network", f"the name of this host, {host}, has no address", cure)
        return
    found = f"{host} is {address}; up: {listed(up) if up else 'none but lo'}"
    if address.startswith("127.") and "SLURM_JOB_ID" in os.environ:
        cure = f"Give {host} its real address in /etc/hosts, or set `interface` in the cluster file."
        yield warning("network", f"{found}: other nodes cannot reach this address", cure)
    else:
        yield ok("network", found)
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        value = os.environ.get(variable)
        if value is None or value.startswith("^"):
            continue
        exact = value.startswith("=") or variable != "NCCL_SOCKET_IFNAME"  # NCCL takes beginnings of names
        wanted = value.removeprefix("=").split(",")
        if not any(n == w if exact else n.startswith(w) for n in names for w in wanted):
            yield problem(
                variable, f"{value!r} names no interface of this machine", f"Choose from: {', '.join(names)}."
            )
        else:
            yield ok(variable, value)


def check_infiniband(answers: Answers) -> Iterator[Finding]:
    """InfiniBand adapters, the library by which NCCL uses them, and NCCL's variables that contradict them."""
    folder = Path("/sys/class/infiniband")
    adapters = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if not adapters:
        yield ok("InfiniBand", "none")
    else:
        states = {a: text_of(*(folder / a / "ports").glob("*/state")) or "" for a in adapters}
        active = [adapter for adapter, state in states.items() if "ACTIVE" in state]
        library = ask("ldconfig", "-p").output
        found = f"{listed(adapters)}; active: {listed(active) if active else 'none'}"
        if os.environ.get("NCCL_IB_DISABLE") == "1":
            yield warning("InfiniBand", f"{found}, but NCCL_IB_DISABLE=1", "Unset it: NCCL now uses TCP.")
        elif not active:
            yield warning("InfiniBand", found, "Have the adapters or their cables examined; NCCL uses TCP.")
        elif "libibverbs.so.1" not in library and not Path("/dev/infiniband").is_dir():
            cure = "Install libibverbs1, and give the container /dev/infiniband."
            yield warning("InfiniBand", f"{found}, but neither libibverbs nor /dev/infiniband is here", cure)
        else:
            yield ok("InfiniBand", found)
    hca = os.environ.get("NCCL_IB_HCA", "").lstrip("=^")
    if hca and not any(a.startswith(w.partition(":")[0]) for w in hca.split(",") for a in adapters):
        yield problem("NCCL_IB_HCA", f"{hca!r} names no adapter of this machine", "Unset it, or name one that is here.")


def check_nccl_variables(answers: Answers) -> Iterator[Finding]:
    """NCCL's variables that are set."""
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("NCCL_", "TORCH_NCCL_"))}
    slow = [name for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE") if variables.get(name) == "1"]
    words = ", ".join(f"{name}={value}" for name, value in variables.items())
    if slow:
        yield warning("NCCL's variables", words, f"Unset {listed(slow)}: GPUs of a node then exchange by slower ways.")
    elif variables:
        yield ok("NCCL's variables", words)
