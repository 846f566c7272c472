#!/usr/bin/env python3
"""Writes the golden files op_*.txt of tests/parity: every operation, forward and backward, from PyTorch itself.

    python3 tests/parity/make_golden_ops.py         needs PyTorch >= 2.6; the CPU is enough

One file per operation. Images are NHWC, convolution weights [K][R][S][C / groups], linear weights [O][I]. The first
line is a comment, then lines of a word, a name and values:

    number NAME VALUE                       shapes and options: decimal, or C's %a
    input NAME COUNT VALUES                 fp32 as its bits in 8 hex digits; labels and class weights too
    bound NAME TERMS COUNT VALUES           how far a result may be off, see below; a COUNT of 0: it is exact
    mode NAME                               what follows belongs to this mode
    cast NAME TYPE                          the operation reads this input rounded to a type; the others stay fp32
    output NAME TYPE ROUNDS COUNT VALUES    a result; bf16 as its bits in 4 hex digits. dx is the gradient of x

Modes:

    f32         fp32 throughout
    autocast    torch.autocast("cpu", torch.bfloat16), activations and the logits of losses being bf16: weights and
                biases are rounded to bf16, and so is every result and every gradient of them
    policy      what mpt's O1 means, emulated: activations and the weights of products are bf16, biases and parameters
                of norms fp32; arithmetic in fp32; results and gradients of activations are rounded to bf16 once,
                gradients of weights, biases and parameters are not. Losses read fp32 there: that is mode f32

Bounds. An fp32 evaluation in any order is off by at most 1.001 (TERMS + 5) 2^-24 times the values of `bound`, which are
the sums of the absolute values of the terms: each passes at most TERMS - 1 additions, its own rounding and a few more.
Where a function has several stages (norms, softmax), the values weigh each stage's error by what the later ones make of
it, to first order. Rounding to bf16 comes on top: ROUNDS is how often a term is rounded to it on the way. Where that is
once, the result alone is rounded, by at most 2^-8 of itself; else ROUNDS 2^-8 of the values of `bound` may be lost. It
is more than once in kernels that PyTorch has for CPUs without bf16: its convolution adds the patches of dx and the
samples of dw and db in bf16, its average pooling the windows of dx, its layer norm the rows of dgamma and dbeta; and in
the slopes of tanh and sigmoid, which are told from the rounded result. No file is written if PyTorch leaves a bound.
"""

from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy
import torch
import torch.nn.functional as F

from make_golden import GOLDEN, bits, words

BF16 = torch.bfloat16
UNIT = {torch.float32: 2.0**-24, BF16: 2.0**-8}
TYPE_NAMES = {torch.float32: "f32", BF16: "bf16"}

# What a mode rounds its inputs to, by their kind. What is not named stays fp32.
CASTS = {
    "f32": {},
    "autocast": dict(activation=BF16, weight=BF16, bias=BF16, logits=BF16),
    "policy": dict(activation=BF16, weight=BF16),
}
CONSTANTS = ("target", "labels")  # kinds of inputs that have no gradient


# -- Numbers --


def mix(z):
    z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xbf58476d1ce4e5b9)
    z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94d049bb133111eb)
    return z ^ (z >> numpy.uint64(31))


def hashes(seed, step, tensor, count):
    """mpt_hash of elements 0 .. count - 1."""
    golden = numpy.array([0x9e3779b97f4a7c15], numpy.uint64)
    stream = mix(mix(mix(golden + seed) + golden * step) + golden * tensor)
    return mix(stream + golden * numpy.arange(count, dtype=numpy.uint64)) >> numpy.uint64(32)


def uniform(seed, step, tensor, count):
    """mpt_uniform of elements 0 .. count - 1, as doubles."""
    return (hashes(seed, step, tensor, count) >> numpy.uint64(8)).astype(numpy.float64) * 2.0**-24


# -- Operations -- functions of numbers and tensors, whatever their type; a dict where there is more than y


def channels_first(x):
    return x.permute(0, 3, 1, 2)


def channels_last(y):
    return y.permute(0, 2, 3, 1)


def linear(n, t):
    return F.linear(t.x, t.w, t.b)


def conv2d(n, t):
    x, w = channels_first(t.x), channels_first(t.w)
    padding = "same" if n.same else (n.padding_h, n.padding_w)
    return channels_last(F.conv2d(x, w, t.b, (n.stride_h, n.stride_w), padding, (n.dilation_h, n.dilation_w), n.groups))


def window(n):
    return (n.R, n.S), (n.stride_h, n.stride_w), (n.padding_h, n.padding_w)


def max_pool(n, t):
    return channels_last(F.max_pool2d(channels_first(t.x), *window(n)))


def avg_pool(n, t):
    return channels_last(F.avg_pool2d(channels_first(t.x), *window(n), count_include_pad=not n.exclude_padding))


def multiply(n, t):
    return t.a * t.b


def upsample(n, t):
    return channels_last(F.interpolate(channels_first(t.x), scale_factor=n.R, mode="nearest"))


def batch_norm_train(n, t):
    mean, var = t.running_mean.clone(), t.running_var.clone()
    y = F.batch_norm(channels_first(t.x), mean, var, t.gamma, t.beta, True, n.momentum, n.eps)
    return dict(y=channels_last(y), mean_after=mean, var_after=var)


def batch_norm_eval(n, t):
    y = F.batch_norm(channels_first(t.x), t.running_mean, t.running_var, t.gamma, t.beta, False, 0.0, n.eps)
    return channels_last(y)


def layer_norm(n, t):
    return F.layer_norm(t.x, (n.C,), t.gamma, t.beta, n.eps)


def group_norm(n, t):
    return channels_last(F.group_norm(channels_first(t.x), n.groups, t.gamma, t.beta, n.eps))


def weighted_mean(loss, weights, sample_weights):
    """Of losses(N, ...) that are weighted already: their sum over that of the weights, both times those of the samples."""
    own = sample_weights.reshape(-1, *[1] * (loss.dim() - 1)).expand(loss.shape)
    return (own * loss).sum() / (own * weights).sum()


def cross_entropy(n, t):
    soft, image, weights = hasattr(n, "probabilities"), hasattr(n, "H"), getattr(t, "class_weights", None)
    x = channels_first(t.x) if image else t.x
    target = t.target if soft else t.target.long()
    options = dict(weight=weights, label_smoothing=n.label_smoothing)
    if soft:
        target = channels_first(target) if image else target
    else:
        options["ignore_index"] = n.ignore_index
    if not hasattr(t, "sample_weights"):
        return F.cross_entropy(x, target, **options)
    loss = F.cross_entropy(x, target, **options, reduction="none")
    rows = torch.ones_like(loss) if soft else (target != n.ignore_index).to(loss.dtype)
    if weights is not None and not soft:
        rows = rows * weights[torch.where(rows > 0, target, 0)]
    return weighted_mean(loss, rows, t.sample_weights)


# -- Bounds -- functions of numbers, doubles and the gradient of y; a dict with one for every output


class Bound(NamedTuple):
    terms: int
    values: torch.Tensor | None = None  # None: exact
    autocast: int = 1  # roundings to bf16
    policy: int = 1


def multilinear(function, terms, fixed=(), rounds=lambda n: {}):
    """Sums of products: the function itself of absolute values. fixed: inputs that only say where to look."""
    def bounds(n, t, dy):
        absolute = SimpleNamespace(**{k: v if k in fixed else v.abs() for k, v in vars(t).items()})
        counts, times = terms(n), rounds(n)
        return {k: Bound(counts[k], v, times.get(k, 1)) if counts[k] else Bound(0)
                for k, v in gradients(function, n, absolute, dy.abs()).items()}
    return bounds


def linear_terms(n):
    return dict(y=n.I, dx=n.O, dw=n.N, db=n.N)


def conv2d_terms(n):
    positions = n.N * n.P * n.Q
    return dict(y=n.R * n.S * n.C // n.groups, dx=n.R * n.S * n.K // n.groups, dw=positions, db=positions)


def conv2d_rounds(n):
    return dict(dx=n.R * n.S + 1, dw=n.N + 1, db=n.N + 1)


def max_pool_terms(n):
    return dict(y=0, dx=n.R * n.S)


def avg_pool_terms(n):
    return dict(y=n.R * n.S, dx=n.R * n.S)


def avg_pool_rounds(n):
    return dict(dx=n.R * n.S + 1)


def multiply_terms(n):
    return dict(y=1, da=1, db=n.R * n.S)


def multiply_rounds(n):
    return dict(db=2 if n.R * n.S > 1 else 1)


def upsample_terms(n):
    return dict(y=0, dx=n.R * n.S)


def exact(n, t, dy):
    """Nothing is rounded but the result."""
    return dict.fromkeys(["y", *("d" + name for name in vars(t))], Bound(0))


def of_activation(value, slope, rounds=1):
    """From the terms of the value and of the slope at x. 16: a few units for each of tanh, erf and exp."""
    def bounds(n, t, dy):
        return dict(y=Bound(16, value(t.x)), dx=Bound(16, dy.abs() * slope(t.x), rounds, rounds))
    return bounds


def sigmoid_value(x):
    return torch.sigmoid(x) * (1 + x.abs())  # exp of x rounded: x units of error


def gelu_erf_slope(x):
    density = torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    return (1 + torch.erf(x.abs())) / 2 + x.abs() * density * (1 + x * x)


def gelu_tanh_parts(x):
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3).abs()
    return inner, torch.tanh(inner)


def gelu_tanh_value(x):
    inner, t = gelu_tanh_parts(x)
    return x.abs() / 2 * (1 + t + (1 - t * t) * inner)


def gelu_tanh_slope(x):
    inner, t = gelu_tanh_parts(x)
    steep = (2 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * x * x)
    return (1 + t + (1 - t * t) * inner) / 2 + x.abs() / 2 * steep * (1 + t * t) * (1 + inner)


def silu_slope(x):
    s = torch.sigmoid(x)
    return s * (1 + x.abs() * (1 + s)) * (1 + x.abs())


def of_norm(x, gamma, beta, dy, eps, over, params_over):
    """A norm that takes its statistics over some axes. In units of the error of a sum over them: the mean is off by
    mean|x|, which the deviation and with it the inverse root r weigh by k; e is what that makes of (x - mean) r."""
    a, mean = x.abs().mean(over, keepdim=True), x.mean(over, keepdim=True)
    r = torch.rsqrt(((x - mean) ** 2).mean(over, keepdim=True) + eps)
    k = 1 + a * r
    normal = ((x - mean) * r).abs()
    e = (x.abs() + a) * r + normal * k
    g, e_y = (dy * gamma).abs(), gamma.abs() * e + beta.abs()
    means = g.mean(over, keepdim=True), (g * normal).mean(over, keepdim=True), (g * e).mean(over, keepdim=True)
    dx = r * ((g + means[0] + normal * means[1]) * (1 + k) + e * means[1] + normal * means[2])
    terms = x.numel() // mean.numel()
    sums = terms + x.numel() // gamma.numel()
    return dict(y=Bound(terms, e_y), dx=Bound(terms, dx), dbeta=Bound(sums, dy.abs().sum(params_over)),
                dgamma=Bound(sums, (dy.abs() * (normal + e)).sum(params_over)))


def batch_norm_train_bounds(n, t, dy):
    b = of_norm(t.x, t.gamma, t.beta, dy, n.eps, (0, 1, 2), (0, 1, 2))
    a, (var, mean) = t.x.abs().mean((0, 1, 2)), torch.var_mean(t.x, (0, 1, 2))
    terms = t.x.numel() // n.C
    b["mean_after"] = Bound(terms, (1 - n.momentum) * t.running_mean.abs() + n.momentum * a)
    b["var_after"] = Bound(terms, (1 - n.momentum) * t.running_var + n.momentum * var * (1 + a / var.sqrt()))
    return b


def batch_norm_eval_bounds(n, t, dy):
    r = torch.rsqrt(t.running_var + n.eps)
    normal = (t.x.abs() + t.running_mean.abs()) * r
    rows = t.x.numel() // n.C
    return dict(y=Bound(4, normal * t.gamma.abs() + t.beta.abs()), dx=Bound(4, dy.abs() * (t.gamma * r).abs()),
                dgamma=Bound(rows + 4, (dy.abs() * normal).sum((0, 1, 2))), dbeta=Bound(rows, dy.abs().sum((0, 1, 2))))


def layer_norm_bounds(n, t, dy):
    bounds = of_norm(t.x, t.gamma, t.beta, dy, n.eps, (1,), (0,))
    return {k: b._replace(autocast=n.N + 1) if k in ("dgamma", "dbeta") else b for k, b in bounds.items()}


def group_norm_bounds(n, t, dy):
    """Each group of channels beside the others: [N][H][W][groups][C / groups]."""
    inner = (n.groups, n.C // n.groups)
    parts = [v.reshape(v.shape[:-1] + inner) for v in (t.x, t.gamma, t.beta, dy)]
    return of_norm(*parts, n.eps, (1, 2, 4), (0, 1, 2))


def cross_entropy_shares(n, t):
    """(rows, C): what the mean makes of every log p."""
    weights = getattr(t, "class_weights", torch.ones(n.C, dtype=torch.double))
    if hasattr(n, "probabilities"):
        shares = t.target.reshape(-1, n.C)
        counted = row_weights = torch.ones(len(shares), dtype=torch.double)
    else:
        label = t.target.long().flatten()
        counted = (label != n.ignore_index).double()
        label = torch.where(counted > 0, label, 0)
        shares, row_weights = F.one_hot(label, n.C), weights[label] * counted
    own = getattr(t, "sample_weights", torch.ones(n.N, dtype=torch.double)).repeat_interleave(len(shares) // n.N)
    q = shares * (1 - n.label_smoothing) + n.label_smoothing / n.C
    return q * weights * (counted * own)[:, None] / (row_weights * own).sum()


def cross_entropy_bounds(n, t, dy):
    """e: error of log p, from that of x - max, of the sum of exponentials and of its logarithm. q: what the loss makes
    of log p. 8 more terms: a few units for each of exp and log."""
    x, q = t.x.reshape(-1, n.C), cross_entropy_shares(n, t)
    below = (x - x.max(1, keepdim=True).values).abs()
    p = torch.softmax(x, 1)
    spread = 1 + (p * below).sum(1, keepdim=True)
    e = below + torch.logsumexp(-below, 1, keepdim=True) + spread
    loss = (q * e).sum()
    dx = q.sum(1, keepdim=True) * p * (1 + below + spread) + q
    return dict(y=Bound(n.C + len(x) + 8, loss), dx=Bound(n.C + len(x) + 8, dx))


def elementwise_loss(value, slope):
    """Means over all elements, weighted by samples, from the terms of an element's loss and slope."""
    def bounds(n, t, dy):
        own = getattr(t, "sample_weights", torch.ones(n.N, dtype=torch.double))[:, None]
        total = own.sum() * n.C
        return dict(y=Bound(n.N * n.C + 8, (value(t.x, t.target) * own).sum() / total),
                    dx=Bound(8, slope(t.x, t.target) * own / total))
    return bounds


def huber_bounds(n, t, dy):
    d, delta = (t.x - t.target).abs(), getattr(n, "delta", 1.0)
    value = torch.where(d <= delta, d * d / 2, delta * (d + delta / 2))
    return elementwise_loss(lambda x, target: value, lambda x, target: d.clamp(max=delta))(n, t, dy)


def bce(n, t, **options):
    return F.binary_cross_entropy_with_logits(t.x, t.target, pos_weight=getattr(t, "pos_weight", None), **options)


def huber(n, t, **options):
    return F.huber_loss(t.x, t.target, delta=getattr(n, "delta", 1.0), **options)


def bce_bounds(n, t, dy):
    """PyTorch weighs by 1 + (pos_weight - 1) t."""
    heavy = 1 if not hasattr(t, "pos_weight") else 2 + t.pos_weight
    return elementwise_loss(
        lambda x, target: (x.abs() * (1 + target) + torch.log1p(torch.exp(-x.abs())) + 1) * heavy,
        lambda x, target: (sigmoid_value(x) + target) * heavy)(n, t, dy)


# -- The table --


class Op(NamedTuple):
    function: Callable  # of numbers and tensors
    bounds: Callable  # of numbers, doubles and the gradient of y
    numbers: dict
    inputs: dict  # name: (kind, low, high, shape)


def linear_op(**numbers):
    n = SimpleNamespace(**numbers)
    return Op(linear, multilinear(linear, linear_terms), numbers, dict(
        x=("activation", -2, 2, (n.N, n.I)), w=("weight", -1, 1, (n.O, n.I)), b=("bias", -1, 1, (n.O,))))


def by_axis(**numbers):
    """Numbers NAME_h and NAME_w of each name: a pair, or the same down and across."""
    pairs = {name: x if isinstance(x, tuple) else (x, x) for name, x in numbers.items()}
    return {f"{name}_{axis}": pair[i] for name, pair in pairs.items() for i, axis in enumerate("hw")}


def conv2d_op(stride=1, padding=0, dilation=1, groups=1, same=0, **shape):
    numbers = dict(**shape, **by_axis(stride=stride, padding=padding, dilation=dilation), groups=groups, same=same)
    n = SimpleNamespace(**numbers)
    numbers["P"] = n.H if same else (n.H + 2 * n.padding_h - n.dilation_h * (n.R - 1) - 1) // n.stride_h + 1
    numbers["Q"] = n.W if same else (n.W + 2 * n.padding_w - n.dilation_w * (n.S - 1) - 1) // n.stride_w + 1
    bounds = multilinear(conv2d, conv2d_terms, rounds=conv2d_rounds)
    return Op(conv2d, bounds, numbers, dict(
        x=("activation", -2, 2, (n.N, n.H, n.W, n.C)), w=("weight", -1, 1, (n.K, n.R, n.S, n.C // groups)),
        b=("bias", -1, 1, (n.K,))))


def pool_op(function, bounds, stride, padding, exclude_padding=0, **shape):
    numbers = dict(**shape, **by_axis(stride=stride, padding=padding), exclude_padding=exclude_padding)
    n = SimpleNamespace(**numbers)
    return Op(function, bounds, numbers, dict(x=("activation", -2, 2, (n.N, n.H, n.W, n.C))))


def max_pool_op(**numbers):
    return pool_op(max_pool, multilinear(max_pool, max_pool_terms, fixed=("x",)), **numbers)


def avg_pool_op(**numbers):
    return pool_op(avg_pool, multilinear(avg_pool, avg_pool_terms, rounds=avg_pool_rounds), **numbers)


def add_op(count):
    return Op(lambda n, t: t.a + t.b, exact, dict(n=count), dict(
        a=("activation", -2, 2, (count,)), b=("activation", -2, 2, (count,))))


def multiply_op(R=1, S=1, **shape):
    """b is of 1 x 1, each of whose pixels stands for R x S of a; or of a's shape."""
    n = SimpleNamespace(**shape)
    numbers = dict(**shape, R=R, S=S)
    return Op(multiply, multilinear(multiply, multiply_terms, rounds=multiply_rounds), numbers, dict(
        a=("activation", -2, 2, (n.N, n.H * R, n.W * S, n.C)), b=("activation", -2, 2, (n.N, n.H, n.W, n.C))))


def upsample_op(scale, **shape):
    n = SimpleNamespace(**shape)
    return Op(upsample, multilinear(upsample, upsample_terms), dict(**shape, R=scale, S=scale), dict(
        x=("activation", -2, 2, (n.N, n.H, n.W, n.C))))


def leaky_relu_op(slope):
    return activation_op(lambda x: F.leaky_relu(x, slope), of_activation(
        lambda x: F.leaky_relu(x, slope).abs(), lambda x: torch.where(x > 0, 1.0, slope)), slope=slope)


def activation_op(function, bounds, count=61, **numbers):
    return Op(lambda n, t: function(t.x), bounds, dict(n=count, **numbers), dict(
        x=("activation", -5, 5, (count,))))


def norm_op(function, bounds, shape, running=False, **numbers):
    C = shape[-1]
    inputs = dict(x=("activation", -1, 3, shape), gamma=("parameter", 0.5, 1.5, (C,)),
                  beta=("parameter", -1, 1, (C,)))
    if running:
        inputs.update(running_mean=("target", -1, 1, (C,)), running_var=("target", 0.5, 1.5, (C,)))
    return Op(function, bounds, {**dict(zip("NHWC" if len(shape) == 4 else "NC", shape)), **numbers}, inputs)


def cross_entropy_op(N, C, weights=False, sample_weights=False, **options):
    rows = (N, options["H"], options["W"]) if "H" in options else (N,)
    inputs = dict(x=("logits", -4, 4, (*rows, C)), target=("labels", 0, C, rows))
    if "probabilities" in options:
        inputs["target"] = ("target", 0, 1, (*rows, C))
    if weights:
        inputs["class_weights"] = ("target", 0.25, 2, (C,))
    if sample_weights:
        inputs["sample_weights"] = ("target", 0, 3, (N,))
    return Op(cross_entropy, cross_entropy_bounds,
              {**dict(N=N, C=C, ignore_index=-100, label_smoothing=0.0), **options}, inputs)


def loss_op(function, bounds, targets=(-2, 2), N=7, C=9, pos_weight=False, sample_weights=False, **options):
    def weighted(n, t):
        loss = function(n, t, reduction="none").mean(1)
        return weighted_mean(loss, torch.ones_like(loss), t.sample_weights)
    inputs = dict(x=("logits", -3, 3, (N, C)), target=("target", *targets, (N, C)))
    if pos_weight:
        inputs["pos_weight"] = ("target", 0.25, 4, (C,))
    if sample_weights:
        inputs["sample_weights"] = ("target", 0, 3, (N,))
    return Op(weighted if sample_weights else function, bounds, dict(N=N, C=C, **options), inputs)


def plain_loss(function, bounds, **options):
    return loss_op(lambda n, t, **how: function(t.x, t.target, **how), bounds, **options)


def mse_op(**options):
    return plain_loss(F.mse_loss, elementwise_loss(
        lambda x, t: (x - t) ** 2, lambda x, t: 2 * (x - t).abs()), **options)


IMAGE = dict(N=2, H=7, W=6, C=3)
SMALL = dict(N=2, H=6, W=5, C=3, K=4)
FOUR = dict(N=2, H=6, W=5, C=4)

OPS = {
    "linear": linear_op(N=5, I=35, O=9),
    "conv2d": conv2d_op(**SMALL, R=3, S=3, padding=1),
    "conv2d_tall": conv2d_op(**SMALL, R=5, S=2),
    "conv2d_stride": conv2d_op(**SMALL, R=3, S=3, stride=2, padding=1),
    "conv2d_projection": conv2d_op(**SMALL, R=1, S=1, stride=2),
    "conv2d_dilation": conv2d_op(**SMALL, R=3, S=3, padding=2, dilation=2),
    "conv2d_groups": conv2d_op(**{**FOUR, "K": 6}, R=3, S=3, padding=1, groups=2),
    "conv2d_depthwise": conv2d_op(**{**FOUR, "K": 4}, R=3, S=3, padding=1, stride=2, groups=4),
    "max_pool": max_pool_op(**IMAGE, R=2, S=2, stride=2, padding=0),
    "max_pool_overlap": max_pool_op(**IMAGE, R=3, S=3, stride=2, padding=1),
    "avg_pool": avg_pool_op(**IMAGE, R=2, S=2, stride=2, padding=0),
    "avg_pool_overlap": avg_pool_op(**IMAGE, R=3, S=3, stride=2, padding=1),
    "global_avg_pool": avg_pool_op(**IMAGE, R=7, S=6, stride=1, padding=0),
    "add": add_op(61),
    "relu": activation_op(F.relu, exact),
    "leaky_relu": leaky_relu_op(0.01),
    "gelu_erf": activation_op(F.gelu, of_activation(
        lambda x: x.abs() / 2 * (1 + torch.erf(x.abs())), gelu_erf_slope)),
    "gelu_tanh": activation_op(lambda x: F.gelu(x, approximate="tanh"), of_activation(
        gelu_tanh_value, gelu_tanh_slope)),
    "silu": activation_op(F.silu, of_activation(lambda x: x.abs() * sigmoid_value(x), silu_slope)),
    "tanh": activation_op(torch.tanh, of_activation(
        lambda x: torch.tanh(x).abs(), lambda x: 1 + torch.tanh(x) ** 2, rounds=4)),
    "sigmoid": activation_op(torch.sigmoid, of_activation(
        sigmoid_value, lambda x: sigmoid_value(x) * (1 + torch.sigmoid(x)), rounds=4)),
    "batch_norm_train": norm_op(batch_norm_train, batch_norm_train_bounds, (2, 6, 5, 4), running=True, eps=1e-5,
                                momentum=0.1),
    "batch_norm_eval": norm_op(batch_norm_eval, batch_norm_eval_bounds, (2, 6, 5, 4), running=True, eps=1e-5),
    "layer_norm": norm_op(layer_norm, layer_norm_bounds, (7, 33), eps=1e-5),
    "group_norm": norm_op(group_norm, group_norm_bounds, (2, 6, 5, 6), groups=3, eps=1e-5),
    "cross_entropy": cross_entropy_op(7, 10),
    "cross_entropy_smoothing": cross_entropy_op(7, 10, label_smoothing=0.1),
    "cross_entropy_weights": cross_entropy_op(7, 10, weights=True),
    "cross_entropy_ignore": cross_entropy_op(23, 5, ignore_index=3),
    "cross_entropy_all": cross_entropy_op(23, 5, weights=True, ignore_index=3, label_smoothing=0.1),
    "mse": mse_op(),
    "bce_with_logits": loss_op(bce, bce_bounds, targets=(0, 1)),
    "l1": plain_loss(F.l1_loss, elementwise_loss(lambda x, t: (x - t).abs(), lambda x, t: torch.ones_like(x))),
    "huber": loss_op(huber, huber_bounds),
    "conv2d_axes": conv2d_op(**SMALL, R=3, S=2, stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    "conv2d_same": conv2d_op(**SMALL, R=4, S=2, dilation=(1, 3), same=1),
    "max_pool_axes": max_pool_op(**IMAGE, R=3, S=2, stride=(3, 1), padding=(1, 0)),
    "avg_pool_exclude": avg_pool_op(**IMAGE, R=3, S=2, stride=(2, 1), padding=(1, 1), exclude_padding=1),
    "bce_pos_weight": loss_op(bce, bce_bounds, targets=(0, 1), pos_weight=True),
    "huber_delta": loss_op(huber, huber_bounds, delta=0.75),
    "multiply": multiply_op(N=2, H=5, W=3, C=3),
    "multiply_channels": multiply_op(N=3, H=1, W=1, C=11, R=5, S=3),
    "upsample": upsample_op(2, N=2, H=3, W=5, C=3),
    "leaky_relu_slope": leaky_relu_op(0.2),
    "cross_entropy_soft": cross_entropy_op(7, 10, probabilities=1),
    "cross_entropy_soft_all": cross_entropy_op(23, 5, weights=True, label_smoothing=0.1, probabilities=1),
    "cross_entropy_positions": cross_entropy_op(3, 6, H=4, W=5, weights=True, ignore_index=2, label_smoothing=0.1),
    "cross_entropy_soft_positions": cross_entropy_op(2, 4, H=5, W=3, weights=True, probabilities=1),
    "cross_entropy_sample_weights": cross_entropy_op(23, 5, weights=True, sample_weights=True, ignore_index=3,
                                                     label_smoothing=0.1),
    "cross_entropy_positions_weighted": cross_entropy_op(5, 4, H=3, W=2, weights=True, sample_weights=True,
                                                         ignore_index=1),
    "cross_entropy_soft_weighted": cross_entropy_op(11, 6, sample_weights=True, label_smoothing=0.2, probabilities=1),
    "mse_sample_weights": mse_op(sample_weights=True),
    "bce_sample_weights": loss_op(bce, bce_bounds, targets=(0, 1), pos_weight=True, sample_weights=True),
    "huber_sample_weights": loss_op(huber, huber_bounds, delta=0.75, sample_weights=True),
}


# -- Running --


def draw(kind, low, high, shape, seed, tensor):
    values = uniform(seed, 0, tensor, int(numpy.prod(shape))) * (high - low) + low
    values = numpy.floor(values) if kind == "labels" else values
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def gradients(function, n, tensors, dy, fed=None):
    """All outputs of a function: what it returns and the gradients of the tensors that have one. fed: the tensors as
    the function gets them, where that is not as they are."""
    result = function(n, fed or tensors)
    result = result if isinstance(result, dict) else dict(y=result)
    leaves = {name: t for name, t in vars(tensors).items() if t.requires_grad}
    grads = torch.autograd.grad(result["y"], list(leaves.values()), dy.to(result["y"].dtype))
    return {**{k: v.detach() for k, v in result.items()}, **{"d" + k: g for k, g in zip(leaves, grads)}}


def in_type(op, inputs, dtype):
    """The inputs as leaves of a type; in double where they have it all."""
    leaves = {k: t.to(dtype) for k, t in inputs.items() if k != "dy"}
    for k, t in leaves.items():
        t.requires_grad_(op.inputs[k][0] not in CONSTANTS)
    return SimpleNamespace(**leaves), inputs["dy"].to(dtype)


def run(op, mode, inputs, casts):
    """Outputs of PyTorch in a mode, in the types they are written in."""
    n = SimpleNamespace(**op.numbers)
    leaves, dy = in_type(op, inputs, torch.float32)
    fed = SimpleNamespace(**vars(leaves))
    if mode == "autocast":
        for k, (kind, *_) in op.inputs.items():
            if kind in ("activation", "logits"):
                setattr(fed, k, getattr(fed, k).to(BF16))
    with torch.autocast("cpu", BF16, enabled=mode == "autocast"):
        outputs = gradients(op.function, n, leaves, dy, fed)
    for k, value in outputs.items():
        kind = op.inputs[k[1:]][0] if k[1:] in op.inputs else None
        if mode == "policy" and (k == "y" or kind == "activation"):
            outputs[k] = value.to(BF16)
        if mode == "autocast" and kind and k[1:] in casts:
            assert torch.equal(value, value.to(BF16).float())
            outputs[k] = value.to(BF16)
    return outputs


def make_inputs(op, seed):
    """fp32 inputs and the gradient of y, which is 1 for a loss."""
    inputs = {k: draw(*spec, seed, tensor) for tensor, (k, spec) in enumerate(op.inputs.items())}
    n = SimpleNamespace(**op.numbers)
    y = op.function(n, SimpleNamespace(**inputs))
    shape = (y["y"] if isinstance(y, dict) else y).shape
    inputs["dy"] = draw("activation", -1, 1, shape, seed, len(inputs)) if shape else torch.ones(())
    return inputs


def rounds(bound, mode):
    return {"f32": 1, "autocast": bound.autocast, "policy": bound.policy}[mode]


def tolerance(bound, value, mode):
    """How far PyTorch's value may be off."""
    rounding = UNIT[value.dtype] * value.double().abs()
    if bound.values is None:
        return rounding
    if rounds(bound, mode) > 1:
        rounding = rounds(bound, mode) * UNIT[BF16] * bound.values
    return 1.001 * (bound.terms + 5) * UNIT[torch.float32] * bound.values + rounding


def run_mode(name, op, mode, inputs):
    """Casts, outputs and bounds of a mode. The outputs must keep the bounds."""
    kinds = {**{k: spec[0] for k, spec in op.inputs.items()}, "dy": "activation" if inputs["dy"].shape else "target"}
    casts = {k: CASTS[mode][kind] for k, kind in kinds.items() if kind in CASTS[mode]}
    rounded = {k: t.to(casts.get(k, t.dtype)).float() for k, t in inputs.items()}
    outputs = run(op, mode, rounded, casts)
    n = SimpleNamespace(**op.numbers)
    doubles, dy = in_type(op, rounded, torch.double)
    exact_outputs = gradients(op.function, n, doubles, dy)
    bounds = op.bounds(n, doubles, dy)
    for k, value in outputs.items():
        if bounds[k].values is not None:
            bounds[k] = bounds[k]._replace(values=bounds[k].values.detach().reshape(value.shape))
        off = (value.double() - exact_outputs[k]).abs() / tolerance(bounds[k], value, mode).clamp(min=1e-300)
        assert off.max() <= 1, f"{name}, {mode}: {k} is off {off.max():.3g} times as far as it may be"
    return casts, outputs, bounds


def upward(x):
    """Bits of a bf16 number that is not under x >= 0."""
    return "%04x" % ((int(bits(x), 16) + 0xffff) >> 16)


def number_line(key, value):
    return f"number {key} {value.hex() if isinstance(value, float) else value}"


def output_line(key, value, times):
    digits = words([value.float()]).split()
    if value.dtype == BF16:
        digits = [d[:4] for d in digits]
    return " ".join([f"output {key} {TYPE_NAMES[value.dtype]} {times} {len(digits)}", *digits])


def bound_line(key, bounds):
    """One for all modes: the largest of each value."""
    values = []
    if bounds[0].values is not None:
        values = [upward(x) for x in torch.stack([b.values for b in bounds]).amax(0).flatten().tolist()]
    return " ".join([f"bound {key} {bounds[0].terms} {len(values)}", *values])


def write_op(number, name, op):
    inputs = make_inputs(op, 100 + number)
    kinds = [spec[0] for spec in op.inputs.values()]
    modes = [mode for mode in CASTS if mode != "policy" or "logits" not in kinds]
    results = {mode: run_mode(name, op, mode, inputs) for mode in modes}
    lines = [number_line(k, v) for k, v in op.numbers.items()]
    lines += [f"input {k} {t.numel()} {words([t])}" for k, t in inputs.items()]
    lines += [bound_line(k, [bounds[k] for _, _, bounds in results.values()]) for k in results["f32"][1]]
    for mode, (casts, outputs, bounds) in results.items():
        lines.append(f"mode {mode}")
        lines += [f"cast {k} {TYPE_NAMES[dtype]}" for k, dtype in casts.items()]
        lines += [output_line(k, value, rounds(bounds[k], mode)) for k, value in outputs.items()]
    head = f"# {name}; PyTorch {torch.__version__}, CPU {torch.backends.cpu.get_cpu_capability()}; make_golden_ops.py"
    (GOLDEN / f"op_{name}.txt").write_text("\n".join([head, *lines]) + "\n", encoding="ascii")


def main():
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for number, (name, op) in enumerate(OPS.items()):
        write_op(number, name, op)
    files = list(GOLDEN.glob("op_*.txt"))
    print(f"PyTorch {torch.__version__}: {len(files)} files, {sum(f.stat().st_size for f in files)} bytes in {GOLDEN}")


if __name__ == "__main__":
    main()
