#!/usr/bin/env python3
"""peers_cuda.py [--tiny] [PROBE.csv] - training steps by PyTorch: AMP in fp16, eager and in a CUDA graph.

Prints a row for each net and mode: net,mode,us. Images are channels_last; Adam is fused and capturable; the batch is
made before the clock starts. A time is the median of 5 windows of 50 steps, each between two events. PROBE.csv is what
`probe steps` printed: then mpt/PyTorch follows, the ratio of speeds to the better mode. --tiny: one small step of each
net on any device, without a graph where that is the CPU; such times mean nothing."""
import statistics
import sys
import time

try:
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
except ImportError:
    print("skipped: no PyTorch for", sys.executable)
    sys.exit(0)

TINY = "--tiny" in sys.argv
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOWS, STEPS = (1, 1) if TINY else (5, 50)


def mlp(inputs, *widths):
    layers, last = [], inputs
    for width in widths:
        layers += [nn.Linear(last, width), nn.ReLU()]
        last = width
    return nn.Sequential(*layers, nn.Linear(last, 10))


def lenet():
    return nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(6, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(16 * 7 * 7, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
                         nn.Linear(84, 10))


class Block(nn.Module):
    def __init__(self, inputs, filters, stride):
        super().__init__()
        self.conv = nn.ModuleList([nn.Conv2d(inputs, filters, 3, stride, 1, bias=False),
                                   nn.Conv2d(filters, filters, 3, 1, 1, bias=False)])
        self.norm = nn.ModuleList([nn.BatchNorm2d(filters), nn.BatchNorm2d(filters)])
        self.skip = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(inputs, filters, 1, stride, bias=False), nn.BatchNorm2d(filters))

    def forward(self, x):
        h = F.relu(self.norm[0](self.conv[0](x)))
        return F.relu(self.norm[1](self.conv[1](h)) + self.skip(x))


def resnet(first, *stages):
    """stages: (filters, blocks, stride of the first)"""
    layers, last = [nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU()], first
    for filters, blocks, stride in stages:
        for i in range(blocks):
            layers.append(Block(last, filters, stride if i == 0 else 1))
            last = filters
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))


NETS = {  # name: (net, shape of a sample, batch)
    "MLP 64": (lambda: mlp(784, 512, 512), (784,), 64),
    "LeNet 64": (lenet, (1, 28, 28), 64),
    "block ResNet 64": (lambda: resnet(16, (16, 1, 1), (32, 1, 2), (64, 1, 2)), (3, 32, 32), 64),
    "ResNet-18 128": (lambda: resnet(64, (64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)), (3, 32, 32), 128),
    "wide MLP 4096": (lambda: mlp(784, 4096, 4096, 4096), (784,), 4096),
}


class Trainer:
    """A net with its optimizer and loss scale, and one batch; loss.backward() clips, as mpt's steps do."""

    def __init__(self, name):
        make, shape, batch = NETS[name]
        torch.manual_seed(1)
        self.net = make().to(DEVICE)
        self.x = torch.rand(4 if TINY else batch, *shape, device=DEVICE)
        self.y = torch.randint(0, 10, (len(self.x),), device=DEVICE)
        if len(shape) == 3:
            self.net = self.net.to(memory_format=torch.channels_last)
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        cuda = DEVICE == "cuda"
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3, fused=cuda, capturable=cuda)
        self.scaler = torch.amp.GradScaler(DEVICE, enabled=cuda)

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.float16 if DEVICE == "cuda" else torch.bfloat16):
            loss = F.cross_entropy(self.net(self.x), self.y)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def graph(self):
        """The same step as a function that replays it"""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


def microseconds(step):
    for _ in range(3):
        step()
    times = []
    for _ in range(WINDOWS):
        if DEVICE == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        begun = time.perf_counter()
        for _ in range(STEPS):
            step()
        if DEVICE == "cuda":
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end) / STEPS)
        else:
            times.append(1e6 * (time.perf_counter() - begun) / STEPS)
    return statistics.median(times)


def ours(paths):
    """us of mpt's step by net"""
    rows = [line.strip().split(",") for path in paths for line in open(path, encoding="utf-8")]
    return {row[1]: float(row[2]) for row in rows if row[0] == "steps" and row[1] in NETS}


def main():
    mpt = ours([a for a in sys.argv[1:] if not a.startswith("--")])
    print(f"# PyTorch {torch.__version__} on {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'the CPU'}")
    print("net,mode,us")
    for name in NETS:
        best = times = microseconds(Trainer(name).step)
        print(f"{name},eager,{times:.4g}", flush=True)
        if DEVICE == "cuda":
            try:
                times = microseconds(Trainer(name).graph())
                best = min(best, times)
                print(f"{name},graph,{times:.4g}", flush=True)
            except RuntimeError as error:
                print(f"{name},graph,skipped: {str(error).splitlines()[0]}", flush=True)
        if name in mpt:
            print(f"{name},mpt,{mpt[name]:.4g}")
            print(f"{name},mpt/PyTorch,{best / mpt[name]:.3f}", flush=True)


main()
