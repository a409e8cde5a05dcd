"""Hosts of a Ray cluster on one machine: network namespaces with addresses and a /tmp of their own.

Root is needed, and Debian's iproute2. Nothing is made outside of the namespaces: the switch that
joins them is in one too, so that two tests at once do not see each other.
"""

import contextlib
import getpass
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUBNET = "10.77.0"
HEAD = f"{SUBNET}.1"
PORT = 6379
START_S = 90.0
# Ray's own: a host is taken for dead after about a minute without an answer.
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
# As a container would: a mount namespace comes with `ip netns exec`.
ENTER = """
tmp=$1; shift
for path in "$@"; do
    [ "$path" = -- ] && break
    inner=$tmp/${path#/tmp/}
    case $path in /tmp/*) mkdir -p "$inner"; mount --bind "$path" "$inner";; esac
done
while [ "$1" != -- ]; do shift; done; shift
mount --rbind "$tmp" /tmp && mount -t tmpfs -o mode=1777 tmpfs /dev/shm && exec "$@"
"""


def why_not() -> str | None:
    """Why this machine cannot do it; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no `ip`: apt-get install iproute2"
    name = f"probe{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"`ip netns add` is refused: {done.stderr.strip()}"
    with contextlib.suppress(subprocess.CalledProcessError):
        probe = (
            f"mount -t tmpfs none /tmp && ip link add {name[:10]}a type veth peer name {name[:10]}b"
        )
        found = subprocess.run(
            ["ip", "netns", "exec", name, "sh", "-c", probe],
            capture_output=True,
            text=True,
            check=False,
        )
    ip("netns", "del", name)
    return (
        f"no mounts or links in a namespace: {found.stderr.strip()}" if found.returncode else None
    )


class Hosts:
    """A head without work, and workers that can be added, killed and cut off.

    Attributes:
        shared: A folder that all hosts have, at the same path.
        workers: The hosts that work, and neither were killed nor cut off.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pear-hosts-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.shared = self.folder / "shared"
        self.shared.mkdir()
        self.workers: list[str] = []
        self._name = f"pr{os.getpid()}"
        self._hosts: dict[str, int] = {}  # name: last part of the address
        self._started: list[subprocess.Popen[bytes]] = []
        self.switch = f"{self._name}sw"
        ip("netns", "add", self.switch)
        self._in(self.switch, "ip", "link", "add", "br0", "type", "bridge")
        self._in(self.switch, "ip", "link", "set", "br0", "up")

    def start_head(self) -> None:
        """The head, whose CPUs are for nobody's work."""
        self._add("head", 1)
        self._start_ray(
            "head", "--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"
        )

    def start_worker(self, name: str, *, num_cpus: int = 1) -> None:
        """A host that works, on the next free address."""
        self._add(name, max(self._hosts.values()) + 1)
        self._start_ray(name, f"--address={HEAD}:{PORT}", f"--num-cpus={num_cpus}")
        self.workers.append(name)

    def address_of(self, name: str) -> str:
        """The host's IP address."""
        return f"{SUBNET}.{self._hosts[name]}"

    def kill(self, name: str) -> None:
        """End all that runs on the host, at once."""
        if name in self.workers:
            self.workers.remove(name)
        for pid in self._pids(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut_off(self, name: str) -> None:
        """Take the host's network cable out; what runs there runs on."""
        self.workers.remove(name)
        self._in(self.switch, "ip", "link", "set", f"v{self._hosts[name]}", "down")

    def run(
        self, host: str, command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """A process on the host; it ends with the hosts."""
        tmp = self.folder / f"tmp-{host}"
        tmp.mkdir(exist_ok=True)
        # What the engines have compiled is machine code of this machine, not of a run.
        compiled = Path("/tmp") / f"torchinductor_{getpass.getuser()}"
        compiled.mkdir(exist_ok=True)
        needed = {str(ROOT), sys.prefix, sys.base_prefix, str(compiled)}
        entered = ["sh", "-c", ENTER, "sh", str(tmp), *sorted(needed), "--", *command]
        with log.open("ab") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._name + host, *entered],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.shared,
                env=os.environ
                | {
                    "PYTHONPATH": str(ROOT),
                    "RAY_AUTH_MODE": "disabled",
                    "RAY_USAGE_STATS_ENABLED": "0",
                }
                | QUICK_HEALTH_CHECKS
                | dict(env or {}),
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def close(self) -> None:
        """End every process on every host, and the hosts."""
        for name in self._hosts:
            self.kill(name)
        for process in self._started:
            process.wait(timeout=30)
        for name in (*(self._name + host for host in self._hosts), self.switch):
            ip("netns", "del", name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _add(self, host: str, number: int) -> None:
        name, cable = self._name + host, f"v{number}"
        ip("netns", "add", name)
        self._hosts[host] = number
        self._in(name, "ip", "link", "set", "lo", "up")
        peer = ("peer", "name", "eth0", "netns", name)
        self._in(self.switch, "ip", "link", "add", cable, "type", "veth", *peer)
        self._in(self.switch, "ip", "link", "set", cable, "master", "br0", "up")
        self._in(name, "ip", "address", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
        self._in(name, "ip", "link", "set", "eth0", "up")

    def _start_ray(self, host: str, *options: str) -> None:
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            f"--node-ip-address={self.address_of(host)}",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
            "--block",
            *options,
        ]
        log = self.folder / f"{host}.log"
        process = self.run(host, command, log=log)
        deadline = time.monotonic() + START_S
        while b"Ray runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no Ray on {host}: {log.read_text()[-2000:]}")
            time.sleep(0.2)

    def _pids(self, host: str) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self._name + host).split()]

    def _in(self, name: str, *command: str) -> None:
        ip("netns", "exec", name, *command)


def ip(*arguments: str) -> str:
    """What `ip` prints."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def cluster_of(*workers: str) -> Iterator[Hosts]:
    """A head and `workers` of one CPU each."""
    hosts = Hosts()
    try:
        hosts.start_head()
        for worker in workers:
            hosts.start_worker(worker)
        yield hosts
    finally:
        hosts.close()
