#!/usr/bin/env python3
"""peers.py BENCH - the four nets of bench.c trained by PyTorch and by mpt in turn: `make bench-peers`.

Prints a row for each net, batch, optimizer, type and number of threads: samples/s of mpt and of PyTorch's best mode,
each the median of ROUNDS rounds, and mpt/PyTorch. Modes: fp32; autocast to bf16; all bf16; images in channels_last or
not. Then a table of the nets with SGD: ratios, and samples/s of both. The data is random and made before the clock starts. Products and convolutions are MKL's and oneDNN's, which PyTorch
brings. glibc is told to keep freed blocks, without which PyTorch loses up to a third of its speed to page faults."""
import os
import statistics
import subprocess
import sys
import time

ROUNDS, SECONDS = 3, 0.6
MALLOC = {"MALLOC_TOP_PAD_": str(1 << 28), "MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
if any(os.environ.get(name) != value for name, value in MALLOC.items()):
    os.execve(sys.executable, [sys.executable] + sys.argv, {**os.environ, **MALLOC})

try:
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
except ImportError:
    print("bench-peers: PyTorch is not installed for", sys.executable)
    sys.exit(0)


def mlp():
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def lenet():
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = (3, 64), (64, 64), (64, 128)
        self.conv = nn.ModuleList([nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in sizes])
        self.norm = nn.ModuleList([nn.BatchNorm2d(o) for o in (64, 64, 128)])
        self.linear = nn.Linear(128, 10)

    def part(self, i, x):
        return F.relu(self.norm[i](self.conv[i](x)))

    def forward(self, x):
        a = self.part(0, x)
        x = F.max_pool2d(a + self.part(1, a), 2)
        return self.linear(self.part(2, x).mean((2, 3)))


NETS = {"mlp": (mlp, (784,)), "lenet": (lenet, (1, 28, 28)), "block": (Block, (3, 32, 32))}
MODES = {"f32": ("f32",), "bf16": ("autocast", "bf16"), "f16": ()}  # PyTorch trains in fp16 on no CPU: beside f32


def torch_speed(name, batch, optimizer, mode, channels_last):
    """samples/s of one window, after two steps that are not counted"""
    torch.manual_seed(1)
    make, shape = NETS[name]
    net, x, y = make(), torch.randn(batch, *shape), torch.randint(0, 10, (batch,))
    if mode == "bf16":
        net, x = net.bfloat16(), x.bfloat16()
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    if optimizer == "adam":
        opt = torch.optim.Adam(net.parameters(), lr=1e-4)
    else:
        opt = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    steps, start = -2, 0
    while True:
        if steps == 0:
            start = time.perf_counter()
        opt.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        steps += 1
        if steps > 0 and time.perf_counter() - start > SECONDS:
            return steps * batch / (time.perf_counter() - start)


def mpt_rows(bench, threads):
    """bench's rows as dictionaries"""
    text = subprocess.run([bench, "nets", str(threads)], check=True, capture_output=True, text=True).stdout
    return [dict(word.split("=") for word in row.split()[1:]) for row in text.splitlines() if row.startswith("train ")]


def torch_modes(key, speeds):
    """Modes worth a window in this round: all in the first, then those that may still be the best."""
    modes = [mode + last for mode in MODES[key[3]] or ("f32",) for last in ("", "_channels_last")[:1 + (key[0] != "mlp")]]
    best = max((s[0] for s in speeds.values()), default=0)
    return [mode for mode in modes if mode not in speeds or speeds[mode][0] > 0.8 * best]


def compare(bench, threads):
    torch.set_num_threads(threads)
    ours, theirs = {}, {}
    for turn in range(ROUNDS):
        for row in mpt_rows(bench, threads):
            key = row["net"], int(row["batch"]), row["optimizer"], row["type"]
            ours.setdefault(key, []).append(float(row["value"]))
            speeds = theirs.setdefault(key, {})
            for mode in torch_modes(key, speeds):
                kind, _, last = mode.partition("_")
                speeds.setdefault(mode, []).append(torch_speed(*key[:3], kind, bool(last)))
        print(f"round {turn + 1} of {ROUNDS}, {threads} threads", file=sys.stderr, flush=True)
    table = {}
    for key, values in ours.items():
        mode, best = max(((m, statistics.median(v)) for m, v in theirs[key].items()), key=lambda pair: pair[1])
        value = statistics.median(values)
        print(f"train net={key[0]} batch={key[1]} optimizer={key[2]} type={key[3]} threads={threads} value={value:.4g} "
              f"unit=samples/s peer=pytorch-{torch.__version__} mode={mode} peak={best:.4g} ratio={value / best:.3f}",
              flush=True)
        table[key] = value, best
    print_table(table, threads)


def print_table(table, threads):
    """mpt / PyTorch for each net and type, and mpt's fp16 over its fp32, which PyTorch does not have"""
    nets = [("mlp", 64), ("mlp", 512), ("lenet", 64), ("block", 64)]
    rows = [[f"{threads} thread{'s' * (threads > 1)}"] + [f"{name} b{batch}" for name, batch in nets]]
    for kind in "f32", "bf16":
        cells = [table[net + ("sgd_momentum", kind)] for net in nets]
        rows.append([f"{kind}: mpt / PyTorch"] + [f"{ours / theirs:.2f} ({ours:.0f} / {theirs:.0f})" for ours, theirs in cells])
    cells = [(table[net + ("sgd_momentum", "f16")][0], table[net + ("sgd_momentum", "f32")][0]) for net in nets]
    rows.append(["mpt: f16 / f32"] + [f"{half / full:.2f} ({half:.0f} / {full:.0f})" for half, full in cells])
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |", flush=True)


print(f"cpu pytorch={torch.backends.cpu.get_cpu_capability()} processors={os.cpu_count()}", flush=True)
for count in (1, 2):
    compare(sys.argv[1], count)
