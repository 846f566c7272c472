#!/usr/bin/env python3
"""Writes and checks the safetensors files of tests/parity, both ways between PyTorch and mpt.

    python3 tests/parity/make_golden_checkpoint.py           writes golden/checkpoint_torch*.safetensors, checkpoint.txt
    python3 tests/parity/make_golden_checkpoint.py FOLDER    checks the files that tests/parity/checkpoint wrote there,
                                                             and fails if one is not what PyTorch wrote; and a `keep`
                                                             behind it keeps one, golden/checkpoint_mpt.safetensors

Needs PyTorch >= 2.6; the CPU is enough. The format is written and read by hand here, with safetensors.torch as well
where that is installed. The net has what the two sides lay out differently: convolutions, one of them in groups, batch
norm of an image and of a flattened one, a linear layer that reads two flattened images side by side.

checkpoint.txt: inputs `x` as NHWC, PyTorch's logits with its weights in fp32 (mode f32) and rounded to fp16 (mode f16),
in lines as make_golden_ops.py describes them. The values of `bound` are the net of absolute values, TERMS the sum of
the terms of all its stages: an evaluation mode net is a sum of products, and ReLU and max pooling move no error up.
"""

import json
import shutil
import struct
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from make_golden import GOLDEN, words
from make_golden_ops import channels_first, output_line, uniform, upward

SEED, SAMPLES, H, W, C = 3, 5, 4, 4, 2
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Net(nn.Module):
    """Its layers have the names of mpt's nodes."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.batch_norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 2, groups=2, bias=False)
        self.batch_norm2 = nn.BatchNorm1d(6 * 3 * 3)
        self.linear1 = nn.Linear(6 * 3 * 3 + 6, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        h = F.relu(self.batch_norm1(self.conv1(x)))
        h = self.conv2(h)
        a = self.batch_norm2(h.flatten(1))
        b = F.max_pool2d(h, 2).flatten(1)
        return self.head(F.relu(self.linear1(torch.cat([a, b], 1))))

    def magnitude(self, x):
        """The sums of absolute values, in double."""
        def norm(bn, v, shape):
            scale = bn.weight.abs() / torch.sqrt(bn.running_var + bn.eps)
            return (v + bn.running_mean.abs().view(shape)) * scale.view(shape) + bn.bias.abs().view(shape)

        v = F.conv2d(x.abs(), self.conv1.weight.abs(), self.conv1.bias.abs(), padding=1)
        v = F.conv2d(norm(self.batch_norm1, v, (1, -1, 1, 1)), self.conv2.weight.abs(), None, groups=2)
        a, b = norm(self.batch_norm2, v.flatten(1), (1, -1)), F.max_pool2d(v, 2).flatten(1)
        v = F.linear(torch.cat([a, b], 1), self.linear1.weight.abs(), self.linear1.bias.abs())
        return F.linear(v, self.head.weight.abs(), self.head.bias.abs())


TERMS = (2 * 9 + 1) + 5 + 2 * 4 + 5 + (60 + 1) + (7 + 1)  # of the stages: convolution, norm, ...


def make_net():
    net = Net().eval()
    for t, (name, tensor) in enumerate(net.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            tensor.fill_(t)
            continue
        low = 0.5 if name.endswith("running_var") else -1.0
        values = low + (1 - low) * uniform(SEED, 0, t, tensor.numel())
        tensor.copy_(torch.tensor(values).reshape(tensor.shape))
    return net


# -- The format --


def write_file(path, tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=[at, at + size])
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(bytes(t.contiguous().view(-1).view(torch.uint8).numpy()) for t in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_file(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8:8 + length]), bytearray(raw[8 + length:])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        if begin % dtype.itemsize:
            raise SystemExit(f"{path}: {name} is not aligned")
        count = (end - begin) // dtype.itemsize
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=begin).reshape(entry["shape"])
    try:
        from safetensors.torch import load_file
    except ImportError:
        return tensors
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys() and all(torch.equal(theirs[n], tensors[n]) for n in theirs)
    return tensors


# -- From PyTorch to mpt --


def images():
    return torch.tensor(2 * uniform(SEED, 1, 0, SAMPLES * H * W * C) - 1).float().reshape(SAMPLES, H, W, C)


def mode_lines(mode, net):
    x = channels_first(images())
    y, exact = net(x), net.double()(x.double())
    bound = net.magnitude(x.double())
    net.float()
    if ((y - exact).abs() > 1.001 * (TERMS + 5) * 2.0**-24 * bound).any():
        raise SystemExit("PyTorch leaves the bound")
    above = " ".join(upward(v) for v in bound.flatten().tolist())
    return [f"mode {mode}", f"bound y {TERMS} {bound.numel()} {above}", output_line("y", y, 1)]


def write():
    net = make_net()
    write_file(GOLDEN / "checkpoint_torch.safetensors", net.state_dict())
    x = images()
    lines = [f"input x {x.numel()} {words([x])}", *mode_lines("f32", net)]
    half = make_net().half()
    write_file(GOLDEN / "checkpoint_torch_f16.safetensors", half.state_dict())
    lines += mode_lines("f16", half.float())
    head = f"# weights by name; PyTorch {torch.__version__}; make_golden_checkpoint.py"
    (GOLDEN / "checkpoint.txt").write_text("\n".join([head, *lines]) + "\n", encoding="ascii")


# -- From mpt to PyTorch --


def check_file(path, dtype):
    """Strictly the tensors of the module, and its weights rounded to the type; its outputs, too, in fp32."""
    tensors = {n: t for n, t in read_file(path).items() if not n.startswith("mpt.")}
    net, first = Net().eval(), make_net()
    net.load_state_dict(tensors, strict=True)
    for name, tensor in first.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        running = "running" in name
        want = tensor if running else tensor.to(dtype)
        if not torch.equal(tensors[name], want):
            raise SystemExit(f"{path}: {name} is {tensors[name]}, not {want}")
    x = channels_first(images())
    if dtype == torch.float32 and not torch.equal(net(x), first(x)):
        raise SystemExit(f"{path}: other outputs")


def check(folder):
    for name, dtype in dict(f32=DTYPES["F32"], f16=DTYPES["F16"], bf16=DTYPES["BF16"], full=DTYPES["F32"]).items():
        check_file(folder / f"{name}.safetensors", dtype)


def main():
    torch.set_num_threads(1)
    with torch.no_grad():
        if len(sys.argv) > 1:
            folder = Path(sys.argv[1])
            check(folder)
            if sys.argv[2:] == ["keep"]:
                shutil.copy(folder / "f32.safetensors", GOLDEN / "checkpoint_mpt.safetensors")
        else:
            write()


if __name__ == "__main__":
    main()
