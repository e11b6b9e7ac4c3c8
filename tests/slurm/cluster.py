"""A real SLURM cluster on this one machine, for tests: controller, accounting and N nodes with fake GPUs.

Every daemon runs in the foreground as a child of this process and dies with it, all state is in one folder, all ports
are free ones. Each node is a slurmd in pid, mount and uts namespaces of its own, so that it has its own hostname, and
`power_cut` ends everything that ran on it at once, before any signal handler can run.

By hand: `python tests/slurm/cluster.py FOLDER [--nodes 2]` prints the `export` line to use and runs until Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "mariadb-install-db", "unshare")
PACKAGES = ("slurmctld", "slurmd", "slurmdbd", "slurm-client", "munge", "mariadb-server-core", "mariadb-client-core")


def why_not() -> str | None:
    """The reason why no cluster can run on this machine, None if one can. Installs Debian's packages where possible."""
    if os.geteuid() != 0:
        return "a SLURM cluster with nodes of its own needs root (namespaces)"
    if _missing() and shutil.which("apt-get"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "-qq", "update"], **quiet, check=False)
        install = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *PACKAGES]
        subprocess.run(install, env=environment, **quiet, check=False)
    if missing := _missing():
        return f"not installed and could not be installed: {', '.join(missing)}"
    if subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "--uts", "true"], capture_output=True).returncode:
        return "this machine does not allow new namespaces"
    return None


def _missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


@dataclass
class SlurmCluster:
    """`with SlurmCluster(folder, nodes=2) as cluster:` a running cluster; its `environment` connects clients to it.

    Partitions: `main` (jobs there can be pre-empted, with `grace_s` seconds between signal and end) and `high`.
    """

    folder: Path
    nodes: int = 2
    cpus: int = 8
    gpus: int = 2
    memory_mb: int = 8000
    grace_s: int = 30
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    @property
    def node_names(self) -> list[str]:
        return [f"node{i}" for i in range(self.nodes)]

    def __enter__(self) -> SlurmCluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty: SLURM numbers its jobs from 1 again, so take a fresh folder")
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        control, database, sql, *node_ports = _free_ports(3 + self.nodes)
        for name in ("log", "state", "spool", "dev", "munge"):
            (self.folder / name).mkdir(mode=0o700 if name == "munge" else 0o755)
        (self.folder / "munge/key").write_bytes(secrets.token_bytes(1024))
        (self.folder / "munge/key").chmod(0o600)
        self._write_configuration(control, database, sql, node_ports)

        munge = {"key-file": "munge/key", "socket": "munge.socket", "pid-file": "munge/pid", "seed-file": "munge/seed"}
        files = [f"--{option}={self.folder / path}" for option, path in munge.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *files, f"--log-file={self.folder}/log/munge.log")
        self._start_database(sql)
        _wait("munge", lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmdbd", "slurmdbd", "-D")
        _wait("the accounting daemon", lambda: _listening(database))
        self._daemon("slurmctld", "slurmctld", "-D")
        _wait("the controller", lambda: "is UP" in self.run("scontrol", "ping", check=False))
        for name in self.node_names:
            self.start_node(name)
        self.wait_idle()

    def _start_database(self, port: int) -> None:
        data = self.folder / "database"
        install = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"]
        subprocess.run([*install, "--auth-root-authentication-method=normal"], check=True, capture_output=True)
        network = ("--bind-address=127.0.0.1", f"--port={port}", f"--socket={self.folder}/mariadb.socket")
        small = ("--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin")
        wanted = ("--innodb-log-file-size=8M", "--innodb-lock-wait-timeout=900")  # slurmdbd asks for a long lock wait
        login = ("--skip-grant-tables", "--skip-name-resolve", f"--pid-file={self.folder}/mariadb.pid")
        options = ("--no-defaults", "--user=root", f"--datadir={data}", *network, *small, *wanted, *login)
        self._daemon("mariadbd", "mariadbd", *options)
        _wait("the database", lambda: _listening(port))

    def start_node(self, name: str) -> None:
        """Switch a node on."""
        boot = 'hostname "$1" && mount --bind "$2/hosts" /etc/hosts && exec slurmd -D -f "$2/slurm.conf" -N "$1"'
        isolation = ("unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--uts", "--mount")
        self._daemon(name, *isolation, "bash", "-c", boot, "node", name, str(self.folder))

    def power_cut(self, name: str) -> None:
        """Everything on the node dies at once; the controller finds out by itself after its time-out."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def wait_idle(self, timeout_s: float = 60) -> None:
        """Until every node waits for work."""

        def idle() -> bool:
            return self.run("sinfo", "-h", "-p", "main", "-N", "-t", "idle", "-o", "%N").split() == self.node_names

        _wait("all nodes to be idle", idle, timeout_s)

    def run(self, *command: str, check: bool = True) -> str:
        """The standard output of a client command (`squeue`, `scontrol`, ...) run against this cluster."""
        done = subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} -> {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job` as a mapping: JobState, Reason, Restarts, NumNodes, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_job(self, job_id: str, *states: str, timeout_s: float = 240) -> str:
        """Until the job's state is one of `states`."""
        _wait(f"job {job_id} to be {' or '.join(states)}", lambda: self.job(job_id)["JobState"] in states, timeout_s)
        return self.job(job_id)["JobState"]

    def stop(self) -> None:
        """End every daemon, nodes first; the folder with all logs stays."""
        for name in [*self.node_names, "slurmctld", "slurmdbd", "mariadbd", "munged"]:
            if process := self.processes.pop(name, None):
                process.send_signal(signal.SIGKILL if name in self.node_names else signal.SIGTERM)
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _daemon(self, name: str, *command: str) -> None:
        """Start a daemon which gets SIGKILL when this process dies, however that happens."""
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self.processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    def _write_configuration(self, control: int, database: int, sql: int, node_ports: list[int]) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        slurm = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": control,
            "SlurmUser": "root",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool/%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd-%n.pid",
            "SlurmctldLogFile": folder / "log/slurmctld.log",
            "SlurmdLogFile": folder / "log/slurmd-%n.log",
            "AuthType": "auth/munge",
            # A requeued job waits until its old credential has expired: two minutes by default.
            "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": database,
            "AccountingStoragePass": folder / "munge.socket",
            "AccountingStorageTRES": "gres/gpu",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU_Memory",
            "SlurmdParameters": "config_overrides",
            "GresTypes": "gpu",
            "DefMemPerCPU": 100,
            "SchedulerParameters": "sched_interval=2,bf_interval=2,sched_min_interval=0,requeue_delay=1",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmctldParameters": "preempt_send_user_signal",
            "ReturnToService": 2,
            "SlurmctldTimeout": 10,
            "SlurmdTimeout": 10,
            "KillWait": 10,
            "MailProg": "/bin/true",
        }
        lines = [f"{key}={value}" for key, value in slurm.items()]
        gpu_files, hosts = [], [Path("/etc/hosts").read_text().rstrip()]
        for name, port in zip(self.node_names, node_ports, strict=True):
            (folder / "spool" / name).mkdir()
            address = f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port}"
            lines.append(f"{address} CPUs={self.cpus} RealMemory={self.memory_mb} Gres=gpu:{self.gpus} State=UNKNOWN")
            hosts.append(f"127.0.0.1 {name}")
            if self.gpus:
                gpu_files.append(f"NodeName={name} Name=gpu File={folder}/dev/gpu[0-{self.gpus - 1}]")
        for gpu in range(self.gpus):
            (folder / "dev" / f"gpu{gpu}").symlink_to("/dev/null")  # must be a character device
        common = "Nodes=ALL State=UP MaxTime=INFINITE"
        lines.append(
            f"PartitionName=main {common} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={self.grace_s}"
        )
        lines.append(f"PartitionName=high {common} PriorityTier=10 PreemptMode=OFF")
        self._write("slurm.conf", lines)
        self._write("gres.conf", gpu_files)
        self._write("cgroup.conf", ["CgroupPlugin=cgroup/v1"])  # Slurm 22.05 cannot switch it off; it stays unused
        self._write("hosts", hosts)
        accounting = {
            "DbdHost": "localhost",
            "DbdAddr": "127.0.0.1",
            "DbdPort": database,
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder}/munge.socket",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "127.0.0.1",
            "StoragePort": sql,
            "StorageUser": "root",
            "PidFile": folder / "slurmdbd.pid",
            "LogFile": folder / "log/slurmdbd.log",
        }
        self._write("slurmdbd.conf", [f"{key}={value}" for key, value in accounting.items()])
        (folder / "slurmdbd.conf").chmod(0o600)

    def _write(self, name: str, lines: list[str]) -> None:
        (self.folder / name).write_text("\n".join([*lines, ""]))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _listening(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def _wait(what: str, ready: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run a SLURM cluster on this machine until Ctrl-C.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=2)
    options = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    with SlurmCluster(options.folder.resolve(), options.nodes, options.cpus, options.gpus) as running:
        print(f"export SLURM_CONF={running.environment['SLURM_CONF']}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("stopping")
