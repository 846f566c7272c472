#!/usr/bin/env python3
"""Writes the golden files of tests/parity from PyTorch itself.

    python3 tests/parity/make_golden.py         needs PyTorch >= 2.6; the CPU is enough

The files are committed, so nobody needs PyTorch to run the tests. Every file opens with the PyTorch version and the
kind of kernels it ran with. Kernels for AVX2, AVX-512 and NEON fuse multiply and add; those for x86 without AVX2 do
not, have other last bits, and are refused here.

The first line is a comment, then words: a key and its value or values. fp32 values are written as their bits in 8 hex
digits, doubles as C's %a.

    inputs.txt       what all optimizer cases share: sizes, first parameters, and for each of 20 attempts the scale, the
                     scaled gradients (NaN in attempt 1, inf in 3 and 9), what GradScaler found, the norm of the
                     unscaled ones
    <case>.txt       hyperparameters, then for each attempt lr, clip factor, parameters and moments after it
    scaler_*.txt     GradScaler over a long row of events
    schedules.txt    learning rates of torch.optim.lr_scheduler, and momenta
"""

import math
import random
import struct
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

GOLDEN = Path(__file__).parent / "golden"
SIZES = [7, 33, 1]  # tensors: scalar tail only, vector body and tail, one element
ATTEMPTS = 20
BAD = {1: (0, 4, math.nan), 3: (1, 20, math.inf), 9: (2, 0, -math.inf)}  # attempt: (tensor, element, value)
SCALER = dict(init_scale=1024.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=4)

# Hyperparameters in the order of the files, named as in torch.optim and mpt_optimizer_desc. group_*: of tensors 2, 3.
# warmup: number of applied steps over which lr rises (LinearLR, from a tenth). exact_root: PyTorch's square root on the
# CPU is MKL's, one ulp off for a sixth of all values; 1 puts a correctly rounded one in its place. one_cycle: steps of
# OneCycleLR with its defaults, where momentum or beta1 goes with lr; only in the files of such cases.
DEFAULTS = dict(kind="sgd", lr=1e-3, momentum=0.0, dampening=0.0, nesterov=0, beta1=0.9, beta2=0.999, eps=1e-8,
                weight_decay=0.0, amsgrad=0, maximize=0, clip_norm=0.0, clip_value=0.0, group_lr_factor=1.0,
                group_weight_decay=None, warmup=0, exact_root=0)

CASES = {
    "sgd": dict(lr=0.1),
    "sgd_weight_decay": dict(lr=0.1, weight_decay=0.05),
    "sgd_momentum": dict(lr=0.1, momentum=0.9),
    "sgd_dampening": dict(lr=0.1, momentum=0.9, dampening=0.3),
    "sgd_nesterov": dict(lr=0.1, momentum=0.9, nesterov=1),
    "sgd_maximize": dict(lr=0.1, momentum=0.9, weight_decay=0.05, maximize=1),
    "sgd_clip_norm": dict(lr=0.1, momentum=0.9, nesterov=1, weight_decay=0.05, clip_norm=1.5),
    "sgd_clip_value": dict(lr=0.1, momentum=0.9, clip_value=0.25),
    "sgd_groups": dict(lr=0.1, momentum=0.9, weight_decay=0.05, group_lr_factor=0.3, group_weight_decay=0.0),
    "adam": dict(kind="adam"),
    "adam_weight_decay": dict(kind="adam", lr=0.01, weight_decay=0.05),
    "adam_betas": dict(kind="adam", lr=0.01, beta1=0.4, beta2=0.9, eps=1e-3),
    "adam_amsgrad": dict(kind="adam", lr=0.01, beta2=0.9, amsgrad=1),
    "adam_exact_root": dict(kind="adam", lr=0.01, weight_decay=0.05, exact_root=1),
    "adam_maximize": dict(kind="adam", lr=0.01, weight_decay=0.05, maximize=1),
    "adam_clip_norm": dict(kind="adam", lr=0.01, clip_norm=1.5),
    "adam_clip_value": dict(kind="adam", lr=0.01, clip_value=0.25),
    "adamw": dict(kind="adamw", weight_decay=0.01),
    "adamw_exact_root": dict(kind="adamw", lr=0.01, weight_decay=0.05, exact_root=1),
    "adamw_amsgrad": dict(kind="adamw", lr=0.01, beta2=0.9, weight_decay=0.05, amsgrad=1),
    "adamw_maximize": dict(kind="adamw", lr=0.01, weight_decay=0.05, maximize=1, amsgrad=1),
    "adamw_clip_norm": dict(kind="adamw", lr=0.01, weight_decay=0.05, clip_norm=0.5),
    "adamw_groups": dict(kind="adamw", lr=0.01, weight_decay=0.05, group_lr_factor=0.3, group_weight_decay=0.0),
    "adamw_warmup": dict(kind="adamw", lr=0.01, weight_decay=0.05, warmup=8),
    "sgd_one_cycle": dict(lr=0.1, momentum=0.9, nesterov=1, weight_decay=0.05, one_cycle=17),
    "adam_one_cycle": dict(kind="adam", lr=0.01, beta1=0.8, one_cycle=17),
    "adamw_one_cycle": dict(kind="adamw", lr=0.01, weight_decay=0.05, exact_root=1, one_cycle=17),
}


def fused():
    """Does add with a factor round once? 1 + 2^-12 squared is 1 + 2^-11 + 2^-24; rounded, it loses the last term."""
    x = 1 + 2.0**-12
    return torch.full((64,), -(1 + 2.0**-11)).add(torch.full((64,), x), alpha=x).tolist() == [2.0**-24] * 64


def bits(x):
    return "%08x" % struct.unpack("<I", struct.pack("<f", x))


def words(tensors):
    """Bits of all elements of several tensors, one line."""
    return " ".join(bits(x) for t in tensors for x in t.detach().flatten().tolist())


def write(name, what, lines):
    head = f"# {what}; PyTorch {torch.__version__}, CPU {torch.backends.cpu.get_cpu_capability()}; make_golden.py"
    (GOLDEN / name).write_text("\n".join([head, *lines]) + "\n", encoding="ascii")


def random_tensors(rng, exponents):
    """Tensors of SIZES: uniform signs and fractions, exponents spread evenly over a range."""
    return [torch.tensor([rng.uniform(-1, 1) * 2.0 ** rng.uniform(*exponents) for _ in range(n)]) for n in SIZES]


def make_inputs():
    """First parameters and unscaled gradients, a few of them zero. Python's generator is the same everywhere."""
    rng = random.Random(20)
    params = random_tensors(rng, (-3, 1))
    params[0][2] = 0.0
    grads = []
    for attempt in range(1, ATTEMPTS + 1):
        tensors = random_tensors(rng, (-6, 0 if attempt % 2 else 2))
        tensors[1][5] = 0.0
        if attempt < 5:
            tensors[0][1] = 0.0  # the first gradients of this one are zero: 0 / (0 + eps)
        if attempt in BAD:
            tensor, element, value = BAD[attempt]
            tensors[tensor][element] = value
        grads.append(tensors)
    return params, grads


def make_optimizer(case, params):
    decay = case["weight_decay"] if case["group_weight_decay"] is None else case["group_weight_decay"]
    groups = [dict(params=params[:1]),
              dict(params=params[1:], lr=case["lr"] * case["group_lr_factor"], weight_decay=decay)]
    same = dict(lr=case["lr"], weight_decay=case["weight_decay"], maximize=bool(case["maximize"]), foreach=False,
                fused=False)
    if case["kind"] == "sgd":
        return torch.optim.SGD(groups, momentum=case["momentum"], dampening=case["dampening"],
                               nesterov=bool(case["nesterov"]), **same)
    kind = torch.optim.Adam if case["kind"] == "adam" else torch.optim.AdamW
    return kind(groups, betas=(case["beta1"], case["beta2"]), eps=case["eps"], amsgrad=bool(case["amsgrad"]), **same)


def moments(case, optimizer, params):
    """Names and tensors of an optimizer's state; zeros before the first applied step."""
    if case["kind"] == "sgd":
        names = ["momentum_buffer"] if case["momentum"] else []
    else:
        names = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if case["amsgrad"] else [])
    return {name: [optimizer.state[p].get(name, torch.zeros_like(p)) for p in params] for name in names}


def growth_tracker(scaler):
    """Clean steps since the last change."""
    return scaler.state_dict()["_growth_tracker"]


def clip_norm(max_norm, params, norm):
    """Clips; returns the factor, which clip_grad_norm_ keeps to itself."""
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    expected = [p.grad * factor for p in params]
    returned = torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=False)
    assert bits(returned.item()) == bits(norm.item())
    assert words(p.grad for p in params) == words(expected)
    return factor.item()


def exact_root(x):
    """The root in double, rounded to fp32, is the correctly rounded root."""
    return torch.sqrt(x.double()).float()


def attempts(case, first_params, grads):
    """Runs one case the way PyTorch's manual writes a training step; yields what is known after every attempt."""
    params = [torch.nn.Parameter(p.clone()) for p in first_params]
    optimizer = make_optimizer(case, params)
    schedule = None
    if case["warmup"]:
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=case["warmup"])
    if case.get("one_cycle"):
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=case["lr"], total_steps=case["one_cycle"])
    scaler = torch.amp.GradScaler(device="cpu", **SCALER)
    for tensors in grads:
        scale = scaler.scale(torch.ones(())).item()
        for p, g in zip(params, tensors):
            p.grad = g * scale
        scaled = [p.grad.clone() for p in params]
        scaler.unscale_(optimizer)
        found = sum(scaler._found_inf_per_device(optimizer).values()).item()
        norm = torch.nn.utils.get_total_norm([p.grad for p in params], foreach=False)
        clip = clip_norm(case["clip_norm"], params, norm) if case["clip_norm"] else 1.0
        if case["clip_value"]:
            torch.nn.utils.clip_grad_value_(params, case["clip_value"], foreach=False)
        lr = optimizer.param_groups[0]["lr"]
        with mock.patch.object(torch.Tensor, "sqrt", exact_root) if case["exact_root"] else nullcontext():
            scaler.step(optimizer)
        scaler.update()
        if schedule and not found:
            schedule.step()
        yield dict(scale=scale, scaled=scaled, found=int(found), norm=norm.item(), lr=lr, clip=clip, params=params,
                   moments=moments(case, optimizer, params), scale_after=scaler.get_scale(),
                   tracker=growth_tracker(scaler))


def write_inputs(first_params, grads):
    lines = [f"tensors {len(SIZES)}", f"elements {sum(SIZES)}", f"attempts {ATTEMPTS}"]
    lines += [f"{key} {float(value).hex()}" for key, value in SCALER.items()]
    lines.append("param " + words(first_params))
    for number, a in enumerate(attempts(DEFAULTS, first_params, grads), 1):
        lines.append(f"attempt {number} scale {bits(a['scale'])} found {a['found']} norm {bits(a['norm'])} "
                     f"scale_after {bits(a['scale_after'])} tracker {a['tracker']}")
        lines.append("grad " + words(a["scaled"]))
    write("inputs.txt", "inputs of the optimizer cases", lines)


def write_case(name, options, first_params, grads):
    case = {**DEFAULTS, **options}
    if case["group_weight_decay"] is None:
        case["group_weight_decay"] = case["weight_decay"]
    lines = [f"{key} {value.hex() if isinstance(value, float) else value}" for key, value in case.items()]
    for number, a in enumerate(attempts(case, first_params, grads), 1):
        lines.append(f"attempt {number} applied {1 - a['found']} lr {a['lr'].hex()} clip {a['clip'].hex()}")
        lines.append("param " + words(a["params"]))
        lines += [f"{moment} {words(tensors)}" for moment, tensors in a["moments"].items()]
    write(f"{name}.txt", f"torch.optim, case {name}", lines)


def write_scaler(name, events, **options):
    """GradScaler over a row of events: '.' a clean step, 'X' an overflow."""
    scaler = torch.amp.GradScaler(device="cpu", **options)
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.0, foreach=False, fused=False)
    lines = [f"{key} {float(value).hex()}" for key, value in options.items()]
    lines.append(f"events {len(events)}")
    for event in events:
        scaler.scale(torch.ones(()))
        p.grad = torch.full((1,), math.inf if event == "X" else 1.0)
        scaler.step(optimizer)
        scaler.update()
        lines.append(f"{event} scale {bits(scaler.get_scale())} tracker {growth_tracker(scaler)}")
    write(f"scaler_{name}.txt", f"torch.amp.GradScaler, trace {name}", lines)


def write_scalers():
    rng = random.Random(21)
    rare = "".join("X" if rng.random() < 0.08 else "." for _ in range(1000))
    often = "".join("X" if rng.random() < 0.25 else "." for _ in range(300))
    write_scaler("default", rare, init_scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=5)
    write_scaler("odd_factors", often, init_scale=1000.0, growth_factor=1.75, backoff_factor=0.375, growth_interval=2)
    write_scaler("ceiling", "." * 20 + "X" + "." * 9, init_scale=2.0**122, growth_factor=2.0, backoff_factor=0.5,
                 growth_interval=2)
    write_scaler("floor", "X" * 40 + "." * 20, init_scale=1024.0, growth_factor=2.0, backoff_factor=0.5,
                 growth_interval=2)


def scheduled(make, key="lr", steps=50, lr=0.1):
    """lr, or momentum, that each of the steps 0, 1, ... uses."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    schedule = make(optimizer)
    values = [optimizer.param_groups[0][key]]
    for _ in range(1, steps):
        optimizer.step()
        schedule.step()
        values.append(optimizer.param_groups[0][key])
    return values


def write_schedules():
    s = torch.optim.lr_scheduler
    schedules = {
        "constant": lambda o: s.ConstantLR(o, factor=1.0),
        "linear_warmup": lambda o: s.LinearLR(o, start_factor=0.1, total_iters=10),
        "cosine": lambda o: s.CosineAnnealingLR(o, T_max=50),
        "cosine_min": lambda o: s.CosineAnnealingLR(o, T_max=50, eta_min=0.01),
        "step": lambda o: s.StepLR(o, step_size=10, gamma=0.5),
        "step_odd": lambda o: s.StepLR(o, step_size=7, gamma=0.3),
        "one_cycle": lambda o: s.OneCycleLR(o, max_lr=0.1, total_steps=50),
        "one_cycle_linear": lambda o: s.OneCycleLR(o, max_lr=0.1, total_steps=50, pct_start=0.25, div_factor=10.0,
                                                   final_div_factor=100.0, anneal_strategy="linear",
                                                   base_momentum=0.7, max_momentum=0.8),
        "warmup_cosine": lambda o: s.SequentialLR(o, [s.LinearLR(o, start_factor=0.1, total_iters=10),
                                                      s.CosineAnnealingLR(o, T_max=40)], milestones=[10]),
    }
    lines = []
    for name, make in schedules.items():
        lines.append(f"schedule {name} " + " ".join(lr.hex() for lr in scheduled(make)))
    for name in ("one_cycle", "one_cycle_linear"):
        momenta = scheduled(schedules[name], "momentum")
        lines.append(f"momentum {name} " + " ".join(momentum.hex() for momentum in momenta))
    write("schedules.txt", "torch.optim.lr_scheduler, lr 0.1, 50 steps", lines)


def main():
    torch.set_num_threads(1)  # the first call of MKL's sqrt on several threads can be far off (PyTorch issue 188792)
    if not fused():
        raise SystemExit("these kernels of PyTorch do not fuse multiply and add; use a processor with AVX2 or NEON")
    GOLDEN.mkdir(exist_ok=True)
    first_params, grads = make_inputs()
    write_inputs(first_params, grads)
    for name, options in CASES.items():
        write_case(name, options, first_params, grads)
    write_scalers()
    write_schedules()
    size = sum(f.stat().st_size for f in GOLDEN.iterdir())
    print(f"PyTorch {torch.__version__}: {len(list(GOLDEN.iterdir()))} files, {size} bytes in {GOLDEN}")


if __name__ == "__main__":
    main()
