#!/usr/bin/env python3
"""Do the tests notice a wrong operator or constant in mpt.h? `make mutants`, N=30 of them (N=300 takes an hour or two).

One operator or number in the casts, the scaler, the optimizers or an operation is changed in a copy of mpt.h, the tests
of that part (private names tell which) are built against it, with checked array bounds, and run, quickest first, until one fails. A mutant that no
test notices survives: it is printed, and fails the run if over 5 % do (one is allowed). equivalent.txt lists those that
cannot be noticed, and why.
The same seed gives the same mutants; results are kept beside the copy, so that an interrupted run goes on.

Usage: mutants.py [N [folder]]   from the repository's root
"""
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import time

SEED = 7
PATIENCE = 10, 20  # a test may take so many times as long as without a mutant, and seconds more: some loop for ever

# Functions by the first word of their name, and what tests them, quickest first.
NUMBERS = ["unit/numbers", "unit/casts"]
TRAINING = ["parity/optimizers", "unit/training", "unit/weights"]
SCALER = ["unit/training", "unit/scaler"]
OPERATIONS = ["parity/operations", "unit/operations", "unit/model", "unit/lens"]
PARTS = [
    (r"mpt_narrow|mpt_widen|mpt_\w+_from_\w+|mpt__mix|mpt_hash|mpt_uniform|mpt__format_of|mpt__\w+_bf16_plain",
     NUMBERS),
    (r"mpt_scaler_rule|mpt_scaler_\w+", SCALER),
    (r"mpt_schedule_factor|mpt__anneal|mpt__cos_pi|mpt__weight_\w+|mpt__update_\w+|mpt__rates_of|mpt__sgd_element|"
     r"mpt__adam_element|mpt__state_\w+|mpt_unscale|mpt_clip_\w+|mpt_step", TRAINING),
    (r"mpt__activate\w*|mpt__gelu_\w+|mpt__sigmoid|mpt__mask_factor|mpt__norm_(?!node|shape)\w+|mpt__row_\w+|"
     r"mpt__class_\w+|mpt__loss_(?:factor|element)|mpt__sign|mpt__taps_\w+|"
     r"mpt__epilogue_run|mpt__columns_\w+|mpt__unpool_run|mpt__max_run|mpt__pool2d_\w+|"
     r"mpt__depthwise_\w+|mpt__map_run|mpt__\w+_backward\w*", OPERATIONS),
]

CHANGES = [
    (r" \+ ", [" - "]), (r" - ", [" + "]), (r" \* ", [" / "]), (r" / ", [" * "]), (r" < ", [" <= ", " >= "]),
    (r" <= ", [" < "]), (r" > ", [" >= ", " <= "]), (r" >= ", [" > "]), (r" == ", [" != "]), (r" != ", [" == "]),
    (r" && ", [" || "]), (r" \|\| ", [" && "]), (r" & ", [" | "]), (r" \| ", [" & "]), (r" << ", [" >> "]),
    (r" >> ", [" << "]), (r" \+= ", [" -= "]), (r" -= ", [" += "]), (r" \? ", [" ? 0 * "]),
]


def functions(lines):
    """(name, first line, last line) of every definition, told by the style: it ends with a } in the first column."""
    found, i = [], 0
    while i < len(lines):
        head = re.match(r"(?:MPT_HD|MPT_DEF|MPT__INLINE|MPT__AVX2 static|static)\b.*?\b(mpt__?\w+)\(", lines[i])
        if head:
            j = i
            while j < len(lines) and not re.search(r"[;{}]\s*(/\*.*)?$", lines[j]):
                j += 1
            if j < len(lines) and "{" in lines[j]:
                end = j if lines[j].endswith("}") else lines.index("}", j)
                found.append((head.group(1), i, end))
                i = end
        i += 1
    return found


def sites(lines):
    """All mutants: (line index, column, old, new, tests)."""
    for name, first, last in functions(lines):
        tests = next((t for pattern, t in PARTS if re.fullmatch(pattern, name)), None)
        if not tests:
            continue
        for i in range(first, last + 1):
            code = re.sub(r"/\*.*?(\*/|$)", lambda m: " " * len(m.group()), lines[i])
            if code.lstrip().startswith("#") or '"' in code:
                continue
            for pattern, changed in CHANGES:
                for m in re.finditer(pattern, code):
                    for new in changed:
                        yield i, m.start(), m.group(), new, tests
            for m in re.finditer(r"(?<![\w.])(\d+)(?=u?\b(?![.\w]))", code):
                yield i, m.start(), m.group(), str(int(m.group()) + 1), tests


def run(folder, test, limit=None):
    """What the test returns, built against the mpt.h in the folder; None if that is no C, a word if it takes too long."""
    program = os.path.join(folder, "program")
    command = ["cc", "-std=c99", "-O0", "-w", "-fsanitize=bounds", "-fsanitize-undefined-trap-on-error",
               "-DTEST_STRIDE=65536", "-DTEST_FIRST", "-I.", f"tests/{test}.c", "-o", program, "-lm", "-pthread"]
    if subprocess.run(command, cwd=folder, stderr=subprocess.DEVNULL).returncode:
        return None
    try:
        return subprocess.run([program], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return "no end"


def limits(folder):
    """How long each test may take. Without a mutant they must pass."""
    found = {}
    for test in sorted({test for _, tests in PARTS for test in tests}):
        start = time.monotonic()
        if run(folder, test) != 0:
            sys.exit(f"mutants.py: {test} fails as it is")
        found[test] = PATIENCE[0] * (time.monotonic() - start) + PATIENCE[1]
    return found


def verdict(folder, tests, limit):
    """The test that notices, "" if none does, None if it is no C."""
    for test in tests:
        result = run(folder, test, limit[test])
        if result is None:
            return None
        if result:
            return test
    return ""


def known(path):
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    folder = os.path.abspath(sys.argv[2] if len(sys.argv) > 2 else "build/mutants")
    with open("mpt.h", encoding="utf-8") as file:
        text = file.read()
    lines = text.split("\n")
    os.makedirs(folder, exist_ok=True)
    shutil.copytree("tests", os.path.join(folder, "tests"), dirs_exist_ok=True)
    shutil.copy("mpt.h", folder)
    limit = limits(folder)
    log = os.path.join(folder, "results-" + hashlib.sha1(text.encode()).hexdigest()[:12])
    done = dict(line.split("\t") for line in known(log)) if os.path.exists(log) else {}
    equivalent = known("tests/mutants/equivalent.txt")
    equivalent = {tuple(line.split("\t")[:3]) for line in equivalent if not line.startswith("#")}
    mutants = sorted(sites(lines), key=lambda s: s[:4])
    everything = len(mutants)
    random.Random(SEED).shuffle(mutants)
    tried = caught = same = 0
    survivors = []
    for i, column, old, new, tests in mutants:
        if tried == count:
            break
        name = f"mpt.h:{i + 1}:{column + 1}: {old.strip()} -> {new.strip()}"
        if (lines[i].strip(), old.strip(), new.strip()) in equivalent:
            same += 1
            continue
        if name not in done:
            changed = lines[:]
            changed[i] = lines[i][:column] + new + lines[i][column + len(old):]
            with open(os.path.join(folder, "mpt.h"), "w", encoding="utf-8") as file:
                file.write("\n".join(changed))
            by = verdict(folder, tests, limit)
            done[name] = "no C" if by is None else by or "survived"
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{name}\t{done[name]}\n")
        if done[name] == "no C":
            continue
        tried += 1
        if done[name] == "survived":
            survivors.append(f"{name}    {lines[i].strip()}")
            print("survives: " + survivors[-1], flush=True)
        else:
            caught += 1
    share = 100 * caught / max(tried, 1)
    good = len(survivors) <= max(1, tried // 20)  # of a few, one
    print(f"{tried} of {everything} mutants, {caught} caught: {share:.1f} %; {same} left out as equivalent")
    print(f"mutants.py: {int(good)} passed, {int(not good)} failed")
    return not good


if __name__ == "__main__":
    sys.exit(main())
