"""A Slurm cluster of two nodes on this host, with daemons of its own: its folder, its ports, its munge key.

What it takes: Debian's `slurm-wlm` and `munge`; with `slurmdbd`, `slurm-wlm-mysql-plugin` and `mariadb-server` it keeps
accounts too. The nodes share this host's processor; each says that it has two.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sacct", "scontrol", "scancel")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian keeps daemons
CONF = """\
ClusterName=test
SlurmctldHost=localhost
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=1
PriorityType=priority/basic
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{accounting}
ReturnToService=2
MailProg=/bin/true
KillWait=30
InactiveLimit=0
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=8000
PartitionName=work Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db")
DATABASE = """\
DbdHost=localhost
DbdPort={port}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StorageType=accounting_storage/mysql
StorageHost=localhost
StoragePort=0
StorageUser=root
StorageLoc=accounts
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment for clients of a running cluster."""
    missing = _missing(NEEDED)
    if missing:
        pytest.skip(f"no Slurm here ({', '.join(missing)} not found): apt-get install slurm-wlm munge")
    # Short: munge's socket lies in it, and the path of a socket may have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, cluster(Path(folder)) as env:
        yield env


def _missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if shutil.which(name, path=PATH) is None]


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start the daemons, yield the environment for their clients, and stop them by their process ids.

    `folder` must have a short path: munge's socket lies in it.
    """
    user = getpass.getuser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir()
    controller, first, second, database = _free_ports(4)
    accounts = not _missing(ACCOUNTING)
    conf = folder / "slurm.conf"
    accounting = (
        f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStoragePort={database}\n"
        f"AccountingStoragePass={folder}/munge.socket"
    )
    conf.write_text(CONF.format(
        folder=folder, user=user, controller=controller, first=first, second=second,
        accounting=accounting if accounts else f"JobCompType=jobcomp/filetxt\nJobCompLoc={folder}/jobcomp",
    ))  # fmt: skip
    (folder / "jobcomp").touch()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    env = {**os.environ, "SLURM_CONF": str(conf), "PATH": PATH, "ACCOUNTS": "yes" if accounts else ""}
    munge = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log",
             "seed-file": "munge.seed"}  # fmt: skip
    running: list[subprocess.Popen[bytes]] = []

    def start(name: str, *command: str, **settings: str) -> None:
        with open(folder / f"{name}.out", "wb") as output:
            running.append(subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=env | settings,
                start_new_session=True,
            ))  # fmt: skip

    try:
        start(
            "munged", "munged", "--foreground", "--force", *(f"--{key}={folder / name}" for key, name in munge.items())
        )
        _wait(lambda: (folder / "munge.socket").exists(), folder)
        if accounts:
            _start_database(folder, user, database, start, env)
        start("slurmctld", "slurmctld", "-D", "-f", str(conf))
        for node in ("n1", "n2"):
            start(f"slurmd-{node}", "slurmd", "-D", "-N", node, "-f", str(conf))
        _wait(lambda: _idle(env) == 2, folder)
        yield env
        subprocess.run(["scancel", "--user", user], env=env, timeout=30, check=False)
        _wait(lambda: not _ask(["squeue", "--noheader"], env), folder)
    finally:
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start_database(folder: Path, user: str, port: int, start: Callable[..., None], env: dict[str, str]) -> None:
    """MariaDB with a folder and a socket of its own and no port, and Slurm's daemon before it."""
    data, socket_file = folder / "data", folder / "mysql.socket"
    subprocess.run(
        ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal",
         "--skip-test-db", f"--user={user}"],
        env=env, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    start("mariadbd", "mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={socket_file}", "--skip-networking",
          f"--user={user}", f"--pid-file={folder}/mysql.pid")  # fmt: skip
    _wait(lambda: socket_file.exists(), folder)
    conf = folder / "slurmdbd.conf"
    conf.write_text(DATABASE.format(folder=folder, user=user, port=port))
    conf.chmod(0o600)
    # slurmdbd looks for its configuration beside slurm.conf; the client library takes the socket from here.
    start("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=str(socket_file))
    _wait(lambda: _listens(port), folder)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _ask(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip()


def _idle(env: dict[str, str]) -> int:
    return len(_ask(["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"], env).split())


def _wait(condition: Callable[[], object], folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(f"{path.name}: {path.read_text(errors='replace')[-800:]}" for path in folder.glob("*.log"))
            raise AssertionError(f"the Slurm cluster did not answer:\n{logs}")
        time.sleep(0.2)
