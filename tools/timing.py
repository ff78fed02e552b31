"""Clocks, memory, a busy neighbour: how bench.py measures."""

import contextlib
import multiprocessing
import re
import resource
import statistics
import time
from pathlib import Path

import torch


def rate(draw, seconds):
    """Tasks per second of draw(), which returns how many it made, called over and over for so many seconds."""
    tasks, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        tasks += draw()
    return tasks / elapsed


def peak_memory(prepare, name, args, shots):
    """Most memory that the step of prepare(name, args, shots) needs, in MiB: what is allocated on a GPU; on a CPU, where this
    must be called in a process of its own, how much its resident memory has grown beyond that before the step."""
    step = prepare(name, args, shots)[0]
    forget_peak()
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    before = resident_peak()
    step()
    return resident_peak() - before


def forget_peak():
    """Let Linux count this process's peak from now on: preparing may have needed more than the step."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak():
    """Of this process, in MiB. (getrusage's figure survives exec on Linux: a child would report its parent's.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


def clock(function, device, times=1):
    """Milliseconds of one call."""

    def now():
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    for _ in range(times):
        function()
    return 1000 * (now() - start) / times


def with_threads(number, function):
    """function, run with so many PyTorch threads inside each operation."""

    def run():
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            function()
        finally:
            torch.set_num_threads(before)

    return run


def spin():
    """Keep one core busy for ever."""
    while True:
        pass


@contextlib.contextmanager
def neighbour(busy):
    """Another process that spins meanwhile, if `busy`."""
    if not busy:
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()


def has_bf16(device):
    """Whether bf16 is faster than float32 there by design: a GPU, or a processor with instructions for it."""
    if device != "cpu":
        return True
    file = Path("/proc/cpuinfo")
    return file.exists() and bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", file.read_text()))


def in_rounds(runs, args):
    """{what: function}, called in alternation -> {what: [milliseconds of each round]}; a first round warms up."""
    rounds = []
    with neighbour(args.busy):
        for _ in range(args.rounds + 1):
            rounds.append(one_round(runs, args))
    samples = {}
    for what in runs:
        samples[what] = [times[what] for times in rounds[1:]]
    return samples


def one_round(runs, args):
    """{what: function} -> {what: milliseconds of one call}."""
    return {what: clock(function, args.device, args.repeat) for what, function in runs.items()}


def spread(samples):
    """The median, and in brackets the smallest and the largest."""
    return f"{statistics.median(samples):.4g} ({min(samples):.4g} to {max(samples):.4g})"
