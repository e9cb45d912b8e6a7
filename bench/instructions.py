"""Count the instructions of fixed workloads and compare them with those committed: a guard against slowing down by mistake.

    python bench/instructions.py            compare; the exit status is 1 if a count grew by more than 3 %
    python bench/instructions.py --update   write bench/instructions.json

Times are noise on a shared machine, counts of instructions are not. Callgrind counts those of fs_measure and fs_update in
csrc/test/workloads.c, in one thread. They hold for one compiler: with another, all is printed and nothing compared.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "bench/instructions.json"
LEVELS = ["baseline", "avx2"]  # valgrind has no AVX-512
TOLERANCE = 0.03


def output(*command):
    return subprocess.run(command, cwd=ROOT / "csrc", check=True, capture_output=True, text=True).stdout


def count(program, workload, level):
    with tempfile.TemporaryDirectory() as folder:
        toggles = ["--toggle-collect=fs_measure", "--toggle-collect=fs_update"]
        out = Path(folder) / "callgrind"
        output("valgrind", "--tool=callgrind", *toggles, f"--callgrind-out-file={out}", program, workload, level)
        return int(re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.M)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true")
    args = parser.parse_args()
    output("make", "-s", "CC=gcc", "build/workloads")
    program = ROOT / "csrc/build/workloads"
    compiler = output("gcc", "--version").splitlines()[0]
    wanted = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"compiler": None, "instructions": {}}
    comparable = wanted["compiler"] == compiler
    cases = [(workload, level) for workload in output(program).split() for level in LEVELS]
    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(lambda case: count(program, *case), cases))
    found = {f"{workload} {level}": n for (workload, level), n in zip(cases, counts)}
    if args.update:
        BASELINE.write_text(json.dumps({"compiler": compiler, "instructions": found}, indent=1) + "\n")
    grown = []
    for name, n in found.items():
        before = wanted["instructions"].get(name)
        change = f"{n / before - 1:+8.2%}" if before else "     new"
        print(f"{name:30} {n:14,} {change}")
        if before is None or n > before * (1 + TOLERANCE):
            grown.append(name)
    if not comparable:
        print(f"not compared: counted with {compiler}, committed with {wanted['compiler']}")
    elif grown and not args.update:
        print(f"more instructions than in {BASELINE.relative_to(ROOT)}: {', '.join(grown)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
