"""`python -m benchmarks.busy`: an update of the digits beside processes that keep cores busy, by how its threads wait.

A case is a number of processes, threads of each, and what OpenMP is told; all are started once and take turns, quiet and
beside each number of `--busy` processes, so that what else the machine does meets all of them. A row has the median and
the least time of a case's updates, in ms, as `python -m pdfast.distill --device cpu` makes them, and the time that they had
on all cores together, which says what spins; `load` is the machine's, the least that was seen. Threads are as many as cores
unless the case says otherwise.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from statistics import median

import torch

from benchmarks.command import ROOT, Parser, Report, count, header
from pdfast.config import EngineConfig
from pdfast.recipes import PRESETS

CORES = len(os.sched_getaffinity(0))
# Processes, threads of each, what OpenMP is told.
CASES: dict[str, tuple[int, int, dict[str, str]]] = {
    "as they come": (1, CORES, {}),
    **{f"spin {count}": (1, CORES, {"GOMP_SPINCOUNT": str(count)}) for count in (300, 1000, 3000, 10_000, 30_000)},
    "passive": (1, CORES, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "one thread": (1, 1, {}),
    "a process a core": (CORES, 1, {}),
}
POLICIES = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS"


def start(processes: int, threads: int, told: dict[str, str]) -> list[subprocess.Popen]:
    """The processes of a case, which make updates when they are told how many."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        mesh = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    kept = {name: value for name, value in os.environ.items() if name not in POLICIES}
    environment = kept | mesh | told | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.busy", "--worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    return [subprocess.Popen(command, env=environment | {"RANK": str(r)}, **pipes) for r in range(processes)]


def run(processes: list[subprocess.Popen], updates: int) -> tuple[list[float], float, float]:
    """The ms of each of so many updates, those that one had on all cores together, and the machine's load."""
    for process in processes:
        print(updates, file=process.stdin, flush=True)
    said = [json.loads(process.stdout.readline()) for process in processes]
    return said[0][0], sum(on_cores for _, on_cores in said), os.getloadavg()[0]


def work() -> int:
    """What a process of a case does."""
    from benchmarks.updates import Pdfast, open_setting

    preset, elapsed = PRESETS["digits"], list[float]()
    with open_setting(preset, torch.device("cpu"), preset.batch_size, EngineConfig()) as setting:
        update = Pdfast(setting)
        for line in sys.stdin:
            elapsed.clear()
            before = time.process_time()
            for _ in range(int(line)):
                began = time.perf_counter()
                update.step()
                setting.machine.asked_to_stop("an update")
                elapsed.append(1e3 * (time.perf_counter() - began))
            print(json.dumps([elapsed, 1e3 * (time.process_time() - before) / len(elapsed)]), flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.busy", description="An update of the digits beside busy processes.")
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 2], metavar="K", help="processes beside it")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--turns", type=count, default=5, help="of each case")
    parser.add_argument("--updates", type=count, default=15, help="in a turn")
    parser.add_argument("--list", action="store_true", help="print the cases, and nothing else")
    parser.add_argument("--worker", action="store_true", help="a process of a case: for this command itself")
    parser.add_json()
    options = parser.parse(arguments)
    if options.worker:
        return work()
    if options.list:
        print("\n".join(options.cases))
        return 0
    numbers = "ms {ms:.1f}, least_ms {least_ms:.1f}, on_cores_ms {on_cores_ms:.1f}"
    report = Report(options.json, header(torch.device("cpu")), "{busy} busy, load {load:.1f}  {case:<17}", numbers)
    cases = {name: start(*CASES[name]) for name in options.cases}
    for processes in cases.values():
        run(processes, 3)
    for busy in options.busy:
        with contextlib.ExitStack() as beside:
            for _ in range(busy):
                process = beside.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                beside.callback(process.kill)
            turns = [{name: run(cases[name], options.updates) for name in cases} for _ in range(options.turns)]
        load = min(load for turn in turns for *_, load in turn.values())
        for name in cases:
            elapsed = [ms for turn in turns for ms in turn[name][0]]
            row = {"ms": median(elapsed), "least_ms": min(elapsed), "on_cores_ms": median(t[name][1] for t in turns)}
            report.add({"busy": busy, "case": name, "load": load} | {what: round(ms, 1) for what, ms in row.items()})
    for process in (
        process for processes in cases.values() for process in reversed(processes)
    ):  # the first keeps the store
        process.communicate()  # the end of what it is told
    return 0


if __name__ == "__main__":
    sys.exit(main())
