#!/usr/bin/env python3
"""Writes the golden files net_*.txt of tests/parity: whole nets, trained by PyTorch for 20 steps; and ema.txt.

    python3 tests/parity/make_golden_nets.py         needs PyTorch >= 2.6; the CPU is enough

The lines are those of make_golden_ops.py, which says what the modes f32, autocast and policy mean. In `policy` every
stored value is rounded to bf16 where mpt's O1 stores it: the input, what each node computes (its ReLU included), the
gradient of each of them, the copies of the weights and biases. Logits and loss are fp32.

Weights and samples are not in the files, both sides draw them, with u = mpt_uniform:

    tensor t = 1, 2, ... in the order of the layers, weight then bias, element i as mpt stores it:
        ((2 u(SEED, 0, t, i)) - 1) / sqrt(fan_in), computed in double and rounded to fp32; norms start at 1 and 0
    label of sample s of step 1, 2, ...: mpt_hash(SEED, step, 101, s) mod 10
    element i = (h, w, c) of it: (2 u(SEED, 0, 102, cell) - 1) + (2 u(SEED, step, 103, s H W C + i) - 1), exact in fp32:
        the picture of its class, drawn in cells of 4x4, and as much noise; cell = (label, h / 4, w / 4, c) of
        (10, H / 4, W / 4, C), counted as arrays are

Outputs, of each step before its update: `loss`, the mean over the samples; `logits`, the mean L2 norm of a sample's
logits; `norm`, the L2 norm of all gradients.
"""

from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy
import torch
import torch.nn.functional as F

from make_golden import GOLDEN, words
from make_golden_ops import BF16, channels_first, hashes, number_line, output_line, uniform

SEED = 1
STEPS = 20
CLASSES = 10
MODES = ("f32", "autocast", "policy")


# -- Where values are rounded --


class Stored(torch.autograd.Function):
    """A value and its gradient, both kept in bf16."""

    @staticmethod
    def forward(ctx, x):
        return x.to(BF16).float()

    @staticmethod
    def backward(ctx, dy):
        return dy.to(BF16).float()


class Copied(Stored):
    """A weight or bias that is read as bf16; its gradient is fp32."""

    @staticmethod
    def backward(ctx, dy):
        return dy


class Logits(Stored):
    """An fp32 value whose gradient is kept in bf16."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()


def same(x):
    return x


def rounding(mode):
    if mode == "policy":
        return SimpleNamespace(stored=Stored.apply, copied=Copied.apply, logits=Logits.apply)
    return SimpleNamespace(stored=same, copied=same, logits=same)


# -- Nets -- of the parameters in order, the input (NHWC) and the rounding


def linear(p, x, r):
    return F.linear(x.flatten(1), r.copied(next(p)), r.copied(next(p)))


def conv2d(p, x, r, stride=1, bias=True):
    w = channels_first(r.copied(next(p)))
    y = F.conv2d(channels_first(x), w, r.copied(next(p)) if bias else None, stride, w.shape[2] // 2)
    return y.permute(0, 2, 3, 1)


def max_pool(x):
    return F.max_pool2d(channels_first(x), 2).permute(0, 2, 3, 1)


def mlp(p, x, r):
    h = r.stored(x)
    h = r.stored(F.relu(linear(p, h, r)))
    h = r.stored(F.relu(linear(p, h, r)))
    return r.logits(linear(p, h, r))


def lenet(p, x, r):
    h = r.stored(x)
    h = r.stored(F.relu(conv2d(p, h, r)))
    h = r.stored(max_pool(h))
    h = r.stored(F.relu(conv2d(p, h, r)))
    h = r.stored(max_pool(h))
    h = r.stored(F.relu(linear(p, h, r)))
    return r.logits(linear(p, h, r))


def conv_bn(p, x, r, stride=1):
    """Batch norm of this batch; gamma and beta are fp32."""
    h = r.stored(conv2d(p, x, r, stride, bias=False))
    return F.batch_norm(channels_first(h), None, None, next(p), next(p), True).permute(0, 2, 3, 1)


def block(p, x, r, stride=1):
    """Two convolutions and what goes around them: x itself, or its 1x1 projection."""
    h = r.stored(F.relu(conv_bn(p, x, r, stride)))
    h = r.stored(conv_bn(p, h, r))
    around = r.stored(conv_bn(p, x, r, stride)) if stride > 1 else x
    return r.stored(F.relu(h + around))


def resnet(p, x, r):
    h = r.stored(x)
    h = r.stored(F.relu(conv_bn(p, h, r)))
    h = block(p, h, r)
    h = block(p, h, r, stride=2)
    h = r.stored(h.float().mean((1, 2)))
    return r.logits(linear(p, h, r))


def excite(p, x, r):
    """Squeeze-and-excite behind a norm without gamma and beta, and beside it a slice of what goes down and up again."""
    h = r.stored(conv2d(p, r.stored(x), r, bias=False))
    h = r.stored(F.batch_norm(channels_first(h), None, None, None, None, True).permute(0, 2, 3, 1))
    h = r.stored(F.leaky_relu(h, 0.2))
    s = r.stored(h.float().mean((1, 2)))
    s = r.stored(torch.sigmoid(linear(p, s, r)))
    h = r.stored(h * s[:, None, None, :])
    low = F.interpolate(channels_first(r.stored(max_pool(h))), scale_factor=2).permute(0, 2, 3, 1)
    h = torch.cat([h, low[..., 4:9]], 3)
    return r.logits(linear(p, r.stored(h.float().mean((1, 2))), r))


class Net(NamedTuple):
    function: Callable
    shape: tuple  # H, W, C of a sample
    batch: int
    lr: float
    tensors: list  # shapes; of vectors (elements, fan_in) or "gamma", "beta"


def dense(O, I):
    return [((O, I), I), ((O,), I)]


def filters(K, R, C, bias=True):
    return [((K, R, R, C), R * R * C)] + ([((K,), R * R * C)] if bias else [])


def conv_norm(K, R, C):
    return [*filters(K, R, C, bias=False), ((K,), "gamma"), ((K,), "beta")]


NETS = {
    "mlp": Net(mlp, (28, 28, 1), 64, 0.02, [*dense(512, 784), *dense(512, 512), *dense(CLASSES, 512)]),
    "lenet": Net(lenet, (28, 28, 1), 32, 0.02, [
        *filters(32, 3, 1), *filters(64, 3, 32), *dense(128, 7 * 7 * 64), *dense(CLASSES, 128)]),
    "resnet": Net(resnet, (16, 16, 3), 16, 0.02, [
        *conv_norm(16, 3, 3), *conv_norm(16, 3, 16), *conv_norm(16, 3, 16), *conv_norm(32, 3, 16),
        *conv_norm(32, 3, 32), *conv_norm(32, 1, 16), *dense(CLASSES, 32)]),
    "excite": Net(excite, (16, 16, 3), 16, 0.02, [
        *filters(16, 3, 3, bias=False), *dense(16, 16), *dense(CLASSES, 21)]),
}
MOMENTUM = 0.9


# -- Training --


def first_parameter(t, shape, fan_in):
    if fan_in in ("gamma", "beta"):
        return torch.full(shape, 1.0 if fan_in == "gamma" else 0.0)
    values = (2 * uniform(SEED, 0, t, int(numpy.prod(shape))) - 1) / numpy.sqrt(float(fan_in))
    return torch.tensor(values.astype(numpy.float32)).reshape(shape)


def batch(net, step):
    H, W, C = net.shape
    labels = (hashes(SEED, step, 101, net.batch) % numpy.uint64(CLASSES)).astype(numpy.int64)
    cells = uniform(SEED, 0, 102, CLASSES * H // 4 * (W // 4) * C).reshape(CLASSES, H // 4, W // 4, C)
    pictures = cells.repeat(4, 1).repeat(4, 2)
    noise = uniform(SEED, step, 103, net.batch * H * W * C).reshape(net.batch, H, W, C)
    x = (2 * pictures[labels] - 1) + (2 * noise - 1)
    return torch.tensor(x.astype(numpy.float32)), torch.tensor(labels)


def train(net, mode):
    """What a file says of every step."""
    params = [torch.nn.Parameter(first_parameter(t, *spec)) for t, spec in enumerate(net.tensors, 1)]
    optimizer = torch.optim.SGD(params, lr=net.lr, momentum=MOMENTUM, foreach=False, fused=False)
    seen = dict(loss=[], logits=[], norm=[])
    for step in range(1, STEPS + 1):
        x, labels = batch(net, step)
        optimizer.zero_grad()
        with torch.autocast("cpu", BF16, enabled=mode == "autocast"):
            logits = net.function(iter(params), x, rounding(mode))
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        seen["loss"].append(loss.detach())
        seen["logits"].append(logits.detach().float().norm(dim=1).mean())
        seen["norm"].append(sum(p.grad.double().square().sum() for p in params).sqrt().float())
        optimizer.step()
    return {name: torch.stack(values) for name, values in seen.items()}


def write_net(name, net):
    numbers = dict(steps=STEPS, batch=net.batch, seed=SEED, lr=net.lr, momentum=MOMENTUM, **dict(zip("HWC", net.shape)))
    lines = [number_line(k, v) for k, v in numbers.items()]
    for mode in MODES:
        lines.append(f"mode {mode}")
        lines += [output_line(name, values, 1) for name, values in train(net, mode).items()]
    head = f"# {name}; PyTorch {torch.__version__}, CPU {torch.backends.cpu.get_cpu_capability()}; make_golden_nets.py"
    (GOLDEN / f"net_{name}.txt").write_text("\n".join([head, *lines]) + "\n", encoding="ascii")


# -- Averages --

AVERAGED = dict(steps=7, outputs=3, inputs=5, lr=0.5, decay=0.9)


def write_averages():
    """ema.txt: averages of the weights of a linear layer (outputs x inputs, then bias) after SGD on given gradients.

    Element i of the weight, or of the bias behind it, starts at 2 u(SEED, 0, 201, i) - 1; its gradient in step
    1, 2, ... is 2 u(SEED, step, 202, i) - 1.
    """
    O, I, steps = AVERAGED["outputs"], AVERAGED["inputs"], AVERAGED["steps"]
    layer = torch.nn.Linear(I, O)

    def draw(step, tensor):
        return torch.tensor((2 * uniform(SEED, step, tensor, O * I + O) - 1).astype(numpy.float32))

    def both(values):
        return zip(layer.parameters(), (values[:O * I].reshape(O, I), values[O * I:]))

    for parameter, value in both(draw(0, 201)):
        parameter.data.copy_(value)
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGED["decay"])
    average = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=decay)
    optimizer = torch.optim.SGD(layer.parameters(), lr=AVERAGED["lr"], foreach=False, fused=False)
    lines = [number_line(k, v) for k, v in dict(AVERAGED, seed=SEED).items()]
    lines.append("mode f32")
    for step in range(1, steps + 1):
        for parameter, value in both(draw(step, 202)):
            parameter.grad = value.clone()
        optimizer.step()
        average.update_parameters(layer)
        values = torch.cat([p.detach().flatten() for p in average.module.parameters()])
        lines.append(output_line(f"step{step}", values, 1))
    head = f"# averages of weights; PyTorch {torch.__version__}; make_golden_nets.py"
    (GOLDEN / "ema.txt").write_text("\n".join([head, *lines]) + "\n", encoding="ascii")


def main():
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for name, net in NETS.items():
        write_net(name, net)
    write_averages()
    print(f"PyTorch {torch.__version__}: {len(NETS) + 1} files in {GOLDEN}")


if __name__ == "__main__":
    main()
