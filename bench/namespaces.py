"""Network namespaces in the place of machines. Each has one interface of a given rate, and one switch joins all.

The switch is a bridge in a namespace of its own, so nothing appears among this machine's own interfaces, addresses and
settings. Token buckets limit both ways: at the host's interface what it sends, at the switch's port what it receives.
What is started in a host has a host name, a /dev/shm and System V objects of its own: it shares memory with what it
starts (a worker's ranks with each other) and with nothing of another host.
Files are everybody's. Needs Linux, root, iproute2 and util-linux.

A bucket counts a frame as the kernel does: payload with the headers of Ethernet, IP and TCP, 1514 bytes for 1448 of
payload, so TCP reaches 95.6 % of the rate. A real wire adds 24 bytes (preamble, checksum, gap) and reaches 94.1 %.

Weakness: after a pause a bucket lets its burst out at once, so a message of at most that size crosses faster than on a
wire. A smaller burst is truer and costs more: TCP may hand over no larger pieces than a bucket takes whole, since a
bucket that has to split them needs more of two cores than four ranks leave it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

INTERFACE = "eth0"  # in every host
NETWORK = "10.213.0.0/24"
PAYLOAD_SHARE = 1448 / 1514  # of the rate: what TCP with timestamps, at an MTU of 1500, can carry
HOSTS_AT_MOST = 250
PIECE_SHARE = 15 / 16  # of the burst: TCP's largest piece, so that with the headers of all its frames it is not split
BURST_BYTES_AT_LEAST = 4 << 10  # a frame, and then some
QUEUE = "50ms"  # what a bucket holds back before it drops
END_S = 5.0

# Run in a host as `sh -c OWN_MACHINE name command...`.
OWN_MACHINE = 'mount -t tmpfs tmpfs /dev/shm && hostname "$0" && exec "$@"'
# The key is the switch's own; before Linux 5.3 it was the machine's, which a namespace does not see and does not need.
PAST_IPTABLES = "cd /proc/sys/net/bridge 2>&- || exit 0; echo 0 > bridge-nf-call-iptables"


class Hosts:
    """`count` hosts of `rate_bits_per_s`. They end with the context, and so do the processes in them."""

    def __init__(self, count: int, rate_bits_per_s: int, burst_bytes: int, congestion: str) -> None:
        self.count = count
        self._rate_bits_per_s = rate_bits_per_s
        self._burst_bytes = burst_bytes
        self._congestion = congestion  # TCP's congestion control
        self._prefix = f"fleet{os.getpid()}-"
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        try:
            self._build()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()

    def start(
        self,
        host: int,
        command: Sequence[str],
        directory: Path,
        environment: Mapping[str, str],
        output: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Runs a command in a host. Its output goes to the file, or to the output of this process."""
        name = f"host{host}"
        wrapped = ["unshare", "--uts", "--ipc", "sh", "-c", OWN_MACHINE, name, *command]
        with output.open("wb") if output else contextlib.nullcontext() as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._prefix + name, *wrapped],  # which makes the mount namespace
                cwd=directory,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT if file else None,
                start_new_session=True,  # Ctrl-C is for us alone; we end the hosts in order
            )
        self._started.append(process)
        return process

    def remove(self) -> None:
        """Ends the processes in the hosts, and removes hosts and interfaces. Signals wait meanwhile."""
        with _undisturbed():
            names = [line.split()[0] for line in _ip("netns", "list").splitlines() if line.startswith(self._prefix)]
            for number in (signal.SIGTERM, signal.SIGKILL):
                for process in self._running(names):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, number)
                deadline = time.monotonic() + END_S
                while self._running(names) and time.monotonic() < deadline:
                    time.sleep(0.05)
            for name in names:
                _ip("netns", "delete", name)

    def _running(self, names: Sequence[str]) -> list[int]:
        for process in self._started:
            process.poll()  # what has ended is a zombie, and in its namespace, until somebody asks
        return [int(line) for name in names for line in _ip("netns", "pids", name).split()]

    def _build(self) -> None:
        switch = self._prefix + "switch"
        _ip("netns", "add", switch)
        _ip("netns", "exec", switch, "sh", "-c", PAST_IPTABLES)  # where Docker sends all frames there
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for host in range(self.count):
            name, port = f"{self._prefix}host{host}", f"port{host}"
            _ip("netns", "add", name)
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            _ip("-n", switch, "link", "set", port, "master", "bridge0", "up")
            _ip("-n", name, "address", "add", f"{address(host)}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", "lo", "up")
            piece_bytes = int(self._burst_bytes * PIECE_SHARE)
            _ip("-n", name, "link", "set", INTERFACE, "up", "gso_max_size", str(piece_bytes))
            # By route: the namespace's own setting takes only what this machine lets its users choose.
            route = [NETWORK, "dev", INTERFACE, "src", address(host), "congctl", self._congestion]
            _ip("-n", name, "route", "replace", *route)
            bucket = ["tbf", "rate", f"{self._rate_bits_per_s}bit", "burst", f"{self._burst_bytes}b", "latency", QUEUE]
            for namespace, interface in ((name, INTERFACE), (switch, port)):
                _run(["tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", *bucket])


def address(host: int) -> str:
    return f"10.213.0.{host + 1}"


def missing() -> str | None:
    """The reason why this process cannot make hosts, in one sentence."""
    if os.geteuid() != 0:
        return "only root can make network namespaces: run this as root"
    absent = [tool for tool in ("ip", "tc", "unshare", "mount", "hostname") if shutil.which(tool) is None]
    if absent:
        return f"there is no {', '.join(absent)} on this machine: install iproute2, util-linux and hostname"
    return None


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: Sequence[str]) -> str:
    """The output of a command. Raises OSError with its error."""
    # In a session of its own: a Ctrl-C of the terminal must not cut it in the middle.
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise OSError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignores the signals that would end this process, until the context is left."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
