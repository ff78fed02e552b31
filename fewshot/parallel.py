"""Cores, threads and recorded GPU graphs: how tasks of a batch run side by side."""

import concurrent.futures
import os
from pathlib import Path

import numpy as np
import torch


def cores(quotas=("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us")):
    """Count the CPU cores that this process may use -> at least 1.

    Its affinity, its container's quota and the environment variable FEWSHOT_CORES, which run_all.sh sets, limit them.
    quotas: the files in which Linux says what a container may use, of control groups version 2 and 1.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    for file in map(Path, quotas):
        try:
            words = file.read_text().split()  # "200000 100000": microseconds, of so many
            if len(words) == 1:
                words += file.with_name("cpu.cfs_period_us").read_text().split()
            quota, period = (int(word) for word in words)
        except (OSError, ValueError):  # no such file, or "max": no quota
            continue
        if quota > 0:
            allowed = min(allowed, quota // period)
    share = os.environ.get("FEWSHOT_CORES", "")
    if share.isdecimal():
        allowed = min(allowed, int(share))
    return max(1, allowed)


def in_threads(function, items, workers):
    """Yield function(item) of each item, in order. `workers` of them run at a time, each with one PyTorch thread.

    PyTorch's own way is to split each operation over the cores and to wait, after each, for the slowest core. Whole tasks
    in threads wait for each other once per batch: so they do not suffer from another program on one of the cores, and as
    each operation runs in one thread, results have the same bits for any number of workers. In bf16 this needs autocast
    without its cache of casts: all threads share that cache, and any of them may empty it.
    """
    with concurrent.futures.ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.map(function, items)


def fresh_memory(shape, device):
    """Room for float32 numbers, not set to anything.

    Numpy asks the system for huge pages, and PyTorch does not: on the CPU, the first touch of fresh memory would cost
    more than all else that drawing tasks does.
    """
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, device=device)


def recorded(function, params):
    """Record the kernels of function(batch) as a CUDA graph and replay them, so that the GPU no longer waits for Python.

    function: sets the gradients of `params`, a dict of tensors, and returns a tuple of tensors. Recording happens at the
    first batch; each call copies its batch to where the graph reads. All batches must have the shapes of the first. What
    a call returns is overwritten by the next one.
    """
    graph = torch.cuda.CUDAGraph()
    held = None  # the batch that the graph reads
    results = None
    gradients = None

    def run():
        for w in params.values():
            w.grad = None  # so that the backward pass sets it, and does not add to it
        return function(held)

    def record(batch):
        nonlocal held, results, gradients
        held = type(batch)(*(x.clone() for x in batch))
        side = torch.cuda.Stream()  # PyTorch asks for a few runs on another stream before recording
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            results = run()
        gradients = {k: w.grad for k, w in params.items()}

    def replay(batch):
        if held is None:
            record(batch)
        for to, x in zip(held, batch):
            to.copy_(x)
        graph.replay()
        for k, w in params.items():
            w.grad = gradients[k]
        return results

    return replay
