"""Benchmark of all_reduce between machines on a network of known rate: fleet and Gloo, interleaved in one run.

    sudo python bench/network.py [--hosts 4] [--ranks-per-host 1] [--rate 1gbit] [--sizes 8,4K,64K,1M,16M]
                                 [--rounds 5] [--systems fleet,fleet-bf16,gloo] [--json FILE]

The machines are network namespaces of this one (see namespaces.py), so their cores are shared, and their network is
not. What is measured is what a user would start: an orchestrator, a worker on each host, and one job on all of them.

The floor is what no all_reduce can beat: each of H hosts must send 2(H-1)/H of the values, at the rate, as if frames had
no headers. "% of line" is floor / time, so it stays below what TCP itself reaches, which is measured first, on all
links at once. fleet-bf16 has half the bytes to send, hence half the floor. Bus Gbit/s are 2(N-1)/N of the values' bits
for N ranks, per second, as usual for such tables: they tell what the caller gets, whatever was sent.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from namespaces import BURST_BYTES_AT_LEAST, HOSTS_AT_MOST, INTERFACE, PAYLOAD_SHARE, Hosts, address, missing

import fleet

SOURCE = Path(fleet.__file__).resolve().parents[1]  # where everything is started: `python -m` looks there first
SYSTEMS = ("fleet", "fleet-bf16", "gloo")
PORT = 50051
LINE_PORT = 50050
LINE_S, LINE_WARM_UP_S, LINE_TRIPS = 2.5, 0.5, 500
LINE_PAUSE_S = 1.0
DIAL_S = 20.0
LINES_AT_MOST_S = 60.0
ROUND_S = 0.3  # about how long one system's calls of one size take in one round
REPEATS_AT_LEAST, REPEATS_AT_MOST = 3, 100
LOG_LINES = 15  # of each daemon, shown when something failed


def main() -> None:
    options = _options()
    if options.line is not None:
        print(json.dumps(measure_line(options.line, options.hosts)))
        return
    if reason := missing():
        sys.exit(f"bench/network.py: {reason}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="network-bench-") as folder:
            records = run(options, Path(folder))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"bench/network.py: {error}")
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument(
        "--rate", type=_bits_per_s, default="1gbit", help="of each host, each way: 100mbit, 2.5gbit, ..."
    )
    parser.add_argument("--burst", type=_bytes, default="32K", help="what may leave a host at once after a pause")
    parser.add_argument("--congestion", default="cubic", help="TCP's congestion control")
    parser.add_argument("--sizes", type=_sizes, default="8,4K,64K,1M,16M", help="bytes of float32 values")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--systems", type=_systems, default=",".join(SYSTEMS))
    parser.add_argument("--security", choices=("plain", "curve"), default="plain", help="of fleet's tensors")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--line", type=int, help=argparse.SUPPRESS)  # this host's number: measure its link, in it
    options = parser.parse_args()
    if not 2 <= options.hosts <= HOSTS_AT_MOST or options.ranks_per_host < 1 or options.rounds < 1:
        parser.error(f"there must be 2 to {HOSTS_AT_MOST} hosts, and at least one rank on each and one round")
    if options.burst < BURST_BYTES_AT_LEAST:
        parser.error(f"--burst must be at least {BURST_BYTES_AT_LEAST >> 10}K: a bucket never lets a larger frame pass")
    return options


def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Makes the hosts, measures in them and prints the table."""
    with Hosts(options.hosts, options.rate, options.burst, options.congestion) as hosts:
        lines = measured_lines(hosts, folder)
        tcp_bits_per_s = min(line["bits_per_s"] for line in lines)
        round_trip_s = max(line["round_trip_s"] for line in lines)
        print(
            f"{options.hosts} hosts with {options.ranks_per_host} rank(s) each, {options.rate / 1e6:g} Mbit/s each way, "
            f"burst {options.burst >> 10} KB, {options.congestion}, data {options.security}\n"
            f"TCP on all links at once, slowest: {tcp_bits_per_s / 1e6:.0f} Mbit/s of payload, "
            f"{tcp_bits_per_s / options.rate:.1%} of the line (headers leave {PAYLOAD_SHARE:.1%}); "
            f"round trip {round_trip_s * 1e6:.0f} µs",
            flush=True,
        )
        results = measure_ranks(options, hosts, folder)
    records = [_record(options, result) | {"tcp_bits_per_s": tcp_bits_per_s} for result in results]
    print_table(records)
    return records


def measured_lines(hosts: Hosts, folder: Path) -> list[dict[str, float]]:
    """Measures the lines: each host sends to the next, all at once, as the ranks of a ring do."""
    outputs = [folder / f"line{host}" for host in range(hosts.count)]
    command = [sys.executable, __file__, "--hosts", str(hosts.count), "--line"]
    started = [
        hosts.start(host, [*command, str(host)], SOURCE, _environment(), outputs[host]) for host in range(hosts.count)
    ]
    for process, output in zip(started, outputs, strict=True):
        try:
            process.wait(LINES_AT_MOST_S)
        except subprocess.TimeoutExpired:
            raise OSError(f"the links took more than {LINES_AT_MOST_S:g} s to measure: does this rate work?") from None
        if process.returncode:
            raise OSError(f"the links cannot be measured:\n{output.read_text()}")
    return [json.loads(output.read_text()) for output in outputs]


def measure_line(host: int, count: int) -> dict[str, float]:
    """In a host: payload per second from the host before it, and round trip to the host behind it."""
    with socket.create_server(("", LINE_PORT)) as server, ThreadPoolExecutor() as pool:
        arriving = pool.submit(_answer, server)
        with _dial((host + 1) % count) as stream:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trips = []
            for _ in range(LINE_TRIPS):
                started = time.perf_counter()
                stream.sendall(bytes(8))
                stream.recv(8, socket.MSG_WAITALL)
                trips.append(time.perf_counter() - started)
            time.sleep(LINE_PAUSE_S)  # until the others have their round trips too
            piece = bytes(256 << 10)
            until = time.perf_counter() + LINE_S
            while time.perf_counter() < until:
                stream.sendall(piece)
        return {"bits_per_s": arriving.result(), "round_trip_s": statistics.median(trips)}


def _answer(server: socket.socket) -> float:
    """Other end of measure_line: echoes, then counts bits per second."""
    with server.accept()[0] as stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(LINE_TRIPS):
            stream.sendall(stream.recv(8, socket.MSG_WAITALL))
        buffer = bytearray(256 << 10)
        stream.recv_into(buffer)
        warm = time.perf_counter() + LINE_WARM_UP_S
        while (started := time.perf_counter()) < warm:
            stream.recv_into(buffer)
        arrived = 0
        while count := stream.recv_into(buffer):
            arrived += count
        return arrived * 8 / (time.perf_counter() - started)


def _dial(host: int) -> socket.socket:
    """A connection to the server of a host, which may start later."""
    deadline = time.monotonic() + DIAL_S
    while True:
        try:
            return socket.create_connection((address(host), LINE_PORT))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def measure_ranks(options: argparse.Namespace, hosts: Hosts, folder: Path) -> list[dict[str, Any]]:
    """The results of one job on a cluster of these hosts, as rank 0 wrote them. Raises OSError if a part fails."""
    secret = folder / "secret"
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_urlsafe(32))
    repeats = {size: _repeats(floor_s("fleet", size, options)) for size in (0, *options.sizes)}
    results = folder / "results.json"
    plan = {
        "systems": options.systems,
        "repeats": repeats,
        "rounds": options.rounds,
        "hosts": options.hosts,
        "ranks_per_host": options.ranks_per_host,
        "results": str(results),
    }
    common = _environment() | {
        "FLEET_SECRET_FILE": str(secret),
        "FLEET_DATA_SECURITY": options.security,
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",  # hosts share cores that each takes for its own; idle OpenMP threads would spin on them
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # else it warns that addresses have no names here
        "ORCHESTRATOR_ADDR": f"{address(0)}:{PORT}",
        "WORKER_PORT": str(PORT + 1),
    }
    command = [sys.executable, "-m", "fleet"]
    bind = [*command, "orchestrator", "--bind", f"{address(0)}:{PORT}"]
    daemons = {folder / "orchestrator.log": hosts.start(0, bind, SOURCE, common, folder / "orchestrator.log")}
    for host in range(options.hosts):
        # Each host's temporary files lie apart: nothing but the network is to connect them.
        temporary = folder / str(host)
        temporary.mkdir()
        own = common | {"FLEET_WORKER_ID": f"host{host}", "TMPDIR": str(temporary)}
        log = folder / f"host{host}.log"
        daemons[log] = hosts.start(host, [*command, "worker", "--slots", str(options.ranks_per_host)], SOURCE, own, log)
    script = str(Path(__file__).resolve().with_name("network_rank.py"))
    world_size = str(options.hosts * options.ranks_per_host)
    job = [*command, "run", "--workers", world_size, script, "--", json.dumps(plan)]
    running = hosts.start(0, job, SOURCE, common)
    while running.poll() is None and all(daemon.poll() is None for daemon in daemons.values()):
        time.sleep(0.1)
    if running.poll() != 0:
        said = "\n".join(f"--- {log.name}\n{_tail(log)}" for log in daemons)
        raise OSError(f"the job failed; what its cluster said last:\n{said}")
    return json.loads(results.read_text())  # type: ignore[no-any-return]


def floor_s(system: str, size: int, options: argparse.Namespace) -> float:
    """Seconds of a host's line for the bytes that no all_reduce of `size` bytes can avoid."""
    wire_bytes = size / 2 if system == "fleet-bf16" else size
    return 2 * (options.hosts - 1) / options.hosts * wire_bytes * 8 / options.rate


def print_table(records: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'bytes':>10}  {'system':10} {'ms':>9} {'floor ms':>9} {'bus Gbit/s':>10} {'% of line':>9} {'gloo / it':>9}"
    )
    theirs = {record["bytes"]: record["median_s"] for record in records if record["system"] == "gloo"}
    for record in records:
        size, median_s, ranks = record["bytes"], record["median_s"], record["world_size"]
        row = f"{size or 'barrier':>10}  {record['system']:10} {median_s * 1e3:9.3f}"
        if size:
            bus = 2 * (ranks - 1) / ranks * size * 8 / median_s / 1e9
            row += f" {record['floor_s'] * 1e3:9.3f} {bus:10.3f} {record['floor_s'] / median_s:9.1%}"
        else:
            row += f"{'':31}"
        print(row + (f" {theirs[size] / median_s:9.2f}" if size in theirs else ""))


def _record(options: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "bench": "network",
        "op": "all_reduce" if result["bytes"] else "barrier",
        "system": result["system"],
        "world_size": options.hosts * options.ranks_per_host,
        "hosts": options.hosts,
        "ranks_per_host": options.ranks_per_host,
        "rate_bits_per_s": options.rate,
        "security": options.security,
        "bytes": result["bytes"],
        "dtype": "float32",
        "median_s": result["median_s"],
        "floor_s": floor_s(result["system"], result["bytes"], options),
        "rounds_s": result["rounds_s"],
    }


def _repeats(floor: float) -> int:
    return max(REPEATS_AT_LEAST, min(REPEATS_AT_MOST, int(ROUND_S / (floor + 1e-3))))


def _environment() -> dict[str, str]:
    """The environment of this process, without the variables that lead to another cluster."""
    others = ("FLEET_SECRET", "FLEET_HOST", "FLEET_CONTROL", "FLEET_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if name not in others}
    paths = [str(SOURCE), *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(paths)}


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def _bits_per_s(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate such as 1gbit")
    return round(float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]])


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64K")
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]


def _sizes(text: str) -> list[int]:
    sizes = [_bytes(size) for size in text.split(",")]
    if any(size < 4 or size % 4 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: float32 values have 4 bytes each")
    return sizes


def _systems(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(SYSTEMS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: there are {', '.join(SYSTEMS)}")
    return names


if __name__ == "__main__":
    main()
