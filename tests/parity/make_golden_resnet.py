#!/usr/bin/env python3
"""Writes tests/parity/golden/resnet18.txt: ResNet-18 as torchvision has it, its logits, and 20 steps of fine-tuning.

    python3 tests/parity/make_golden_resnet.py       needs PyTorch >= 2.6, without torchvision; the CPU is enough

The lines are those of make_golden_ops.py. The state_dict has torchvision's names, order and shapes, with WIDTH filters
in the stem instead of 64. Neither it nor the samples are in the file, both sides draw them, with u = mpt_uniform and
v = 2 u - 1, in double and rounded to fp32. Element i, as PyTorch stores it, of tensor t = 0, 1, ... of the state_dict:

    weights of products   v(SEED, 0, t, i) sqrt(6 / fan_in)      bn .weight, .running_var    u(SEED, 0, t, i) + 0.5
    everything else       v(SEED, 0, t, i) / 10                  .num_batches_tracked        0
    element i of the batch of step s (NHWC)   v(SEED, s, 1001, i)
    label of sample i of it                   mpt_hash(SEED, s, 1002, i) mod CLASSES

`eval` are the logits of two samples of the batch of step 0 in evaluation. Then the stem and three stages are frozen,
their norms in evaluation, and SGD trains the rest; outputs of each step before its update: `loss`, the mean over the
samples; `logits`, the mean L2 norm of a sample's logits; `norm`, the L2 norm of all gradients.
"""

import numpy
import torch
import torch.nn.functional as F

from make_golden import GOLDEN
from make_golden_ops import hashes, number_line, output_line, uniform

SEED, STEPS, WIDTH, CLASSES, BATCH, SIDE, FROZEN, LR, MOMENTUM = 3, 20, 16, 1000, 8, 64, 3, 0.005, 0.9


def conv_norm(conv, norm, K, C, R):
    yield f"{conv}.weight", (K, C, R, R)
    for suffix in ("weight", "bias", "running_mean", "running_var"):
        yield f"{norm}.{suffix}", (K,)
    yield f"{norm}.num_batches_tracked", ()


def tensors():
    """Names and shapes of the state_dict."""
    yield from conv_norm("conv1", "bn1", WIDTH, 3, 7)
    C = WIDTH
    for stage in range(1, 5):
        K = WIDTH << stage - 1
        for block in range(2):
            place = f"layer{stage}.{block}."
            yield from conv_norm(place + "conv1", place + "bn1", K, C, 3)
            yield from conv_norm(place + "conv2", place + "bn2", K, K, 3)
            if C != K:
                yield from conv_norm(place + "downsample.0", place + "downsample.1", K, C, 1)
            C = K
    yield "fc.weight", (CLASSES, C)
    yield "fc.bias", (CLASSES,)


def drawn(t, name, shape):
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    u = uniform(SEED, 0, t, int(numpy.prod(shape)))
    if len(shape) > 1:
        values = (2 * u - 1) * numpy.sqrt(6 / float(numpy.prod(shape[1:])))
    elif name.endswith("running_var") or (name.endswith("weight") and name != "fc.weight"):
        values = u + 0.5
    else:
        values = (2 * u - 1) / 10
    return torch.tensor(values.astype(numpy.float32)).reshape(shape)


def is_frozen(name):
    return not name.startswith("fc.") and not any(name.startswith(f"layer{s}.") for s in range(FROZEN + 1, 5))


def norm(p, name, x, train):
    statistics = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    return F.batch_norm(x, *statistics, p[f"{name}.weight"], p[f"{name}.bias"], train and not is_frozen(name))


def block(p, place, x, train):
    stride = 2 if f"{place}downsample.0.weight" in p else 1
    h = F.conv2d(x, p[f"{place}conv1.weight"], None, stride, 1)
    h = F.relu(norm(p, f"{place}bn1", h, train))
    h = norm(p, f"{place}bn2", F.conv2d(h, p[f"{place}conv2.weight"], None, 1, 1), train)
    if stride > 1:
        x = norm(p, f"{place}downsample.1", F.conv2d(x, p[f"{place}downsample.0.weight"], None, 2), train)
    return F.relu(h + x)


def resnet18(p, x, train):
    h = F.relu(norm(p, "bn1", F.conv2d(x, p["conv1.weight"], None, 2, 3), train))
    h = F.max_pool2d(h, 3, 2, 1)
    for stage in range(1, 5):
        for number in range(2):
            h = block(p, f"layer{stage}.{number}.", h, train)
    return F.linear(h.mean((2, 3)), p["fc.weight"], p["fc.bias"])


def batch(step):
    x = 2 * uniform(SEED, step, 1001, BATCH * SIDE * SIDE * 3) - 1
    labels = (hashes(SEED, step, 1002, BATCH) % numpy.uint64(CLASSES)).astype(numpy.int64)
    x = torch.tensor(x.astype(numpy.float32)).reshape(BATCH, SIDE, SIDE, 3)
    return x.permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def main():
    torch.set_num_threads(1)
    state = {name: drawn(t, name, shape) for t, (name, shape) in enumerate(tensors())}
    numbers = dict(seed=SEED, steps=STEPS, width=WIDTH, classes=CLASSES, batch=BATCH, side=SIDE, frozen=FROZEN, lr=LR,
                   momentum=MOMENTUM)
    lines = [number_line(k, v) for k, v in numbers.items()] + ["mode f32"]
    with torch.no_grad():
        lines.append(output_line("eval", resnet18(state, batch(0)[0], False)[:2].flatten(), 1))
    trained = [v.requires_grad_() for k, v in state.items() if not is_frozen(k) and v.is_floating_point()
               and "running" not in k]
    optimizer = torch.optim.SGD(trained, lr=LR, momentum=MOMENTUM, foreach=False, fused=False)
    seen = dict(loss=[], logits=[], norm=[])
    for step in range(1, STEPS + 1):
        x, labels = batch(step)
        optimizer.zero_grad()
        logits = resnet18(state, x, True)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        seen["loss"].append(loss.detach())
        seen["logits"].append(logits.detach().norm(dim=1).mean())
        seen["norm"].append(sum(p.grad.double().square().sum() for p in trained).sqrt().float())
        optimizer.step()
    lines += [output_line(name, torch.stack(values), 1) for name, values in seen.items()]
    capability = torch.backends.cpu.get_cpu_capability()
    head = f"# ResNet-18; PyTorch {torch.__version__}, CPU {capability}; make_golden_resnet.py"
    (GOLDEN / "resnet18.txt").write_text("\n".join([head, *lines]) + "\n", encoding="ascii")
    print(f"PyTorch {torch.__version__}: {GOLDEN}/resnet18.txt")


if __name__ == "__main__":
    main()
