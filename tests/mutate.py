"""Mutation testing of the C core: each small change to the code must turn a test red.

    python tests/mutate.py                      all mutants (an hour on two cores)
    python tests/mutate.py --sample 60          some of them
    python tests/mutate.py --only tiles.c:120   those of a file, or of one line

A mutant is the code with one operator, number, bound, condition or statement changed. It is killed when it does not compile
without warnings, or when a test fails, crashes or hangs: first the C tests, then, for those that survive, the Python tests on
an extension with the mutant. Mutants that cannot change any result are listed in EXPLAINED, with the reason. Prints the
score and every survivor; the exit status is 1 below 95 %, or what --at-least says.
"""

import argparse
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# How many threads there are, how they wait, and which level they use, is nothing that a result depends on; the roofline is no
# rule, but the speed limit that rules are measured against.
LEFT_OUT = {"threads.c", "team.c", "levels.c", "rules/roofline.h"}
SOURCES = [path for pattern in ("*.c", "*.inc", "rules/*.h") for path in sorted(CSRC.glob(pattern))]
FILES = [name for path in SOURCES if (name := path.relative_to(CSRC).as_posix()) not in LEFT_OUT]
LIST_OF_TESTS = re.search(r"#define FOR_TESTS\(TEST\)(.*?)\n\n", (CSRC / "test/harness.h").read_text(), re.S)
C_TESTS = re.findall(r"TEST\((\w+)\)", LIST_OF_TESTS[1])
C_TEST_FILES = ["test/harness.c", *(f"test/{path.name}" for path in sorted(CSRC.glob("test/test_*.c")))]
PYTHON_TESTS = ["test_kernels.py", "test_interface.py", "test_failures.py", "test_bits.py"]
FLAGS = ["-std=c11", "-O1", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp", "-Wall", "-Werror"]
ENVIRONMENT = {**os.environ, "QUICK": "1", "OMP_WAIT_POLICY": "passive"}

# What is replaced, and by what.
SWAPS = [
    (r" \+ ", [" - "]), (r" - ", [" + "]), (r" \* ", [" / "]), (r" / ", [" * "]), (r" % ", [" / "]),
    (r" \+= ", [" -= "]), (r" -= ", [" += "]), (r" \*= ", [" /= "]), (r" /= ", [" *= "]),
    (r" < ", [" <= ", " > "]), (r" <= ", [" < "]), (r" > ", [" >= ", " < "]), (r" >= ", [" > "]),
    (r" == ", [" != "]), (r" != ", [" == "]), (r" && ", [" || "]), (r" \|\| ", [" && "]),
    (r"\+\+", ["--"]), (r"--", ["++"]), (r"(?<=[(\s])!(?=\w)", [""]), (r"(?<=[=(,] )-(?=\w)", [""]), (r"(?<=\()-(?=\w)", [""]),
    (r"\btrue\b", ["false"]), (r"\bfalse\b", ["true"]),
    (r"(?<![.\w])0(?![.\w])", ["1"]), (r"(?<![.\w])1(?![.\w])", ["0", "2"]), (r"(?<![.\w])2(?![.\w])", ["3"]), (r"\b0\.0\b", ["1.0"]), (r"\b1\.0\b", ["0.0", "2.0"]),
    (r"\bINFINITY\b", ["1.0"]), (r"\bSQRT\b", [""]), (r"\bsqrt\b", [""]), (r"\bmin_size\(", ["max_size("]),
    (r"\bratio_up\((\w+(?:->\w+|\[\w+\]\.\w+)*), (\w+(?:->\w+|\[\w+\]\.\w+)*)\)", [r"(\1 / \2)"]),
]  # fmt: skip
STATEMENT = re.compile(r"^\s+(?!return|const|static|for\b|if\b|else\b|typedef\b)[\w*][^{}]*[=(+-][^{}]*;\s*$")

# (file or file:function, part of the line, part of the changed line or None for any change, why no test can notice).
DELETED = "(deleted)"
MEMORY = "more memory than needed"
ONE_MORE = "there is one more, empty, so that none is not a special case"
OUTSIDE = "looks one too far, at what is not used; where that is out of bounds, the sanitizers find it"
EQUAL = "of two equal numbers either will do"
CUTS = "where the shares of threads are cut changes no result"
SHORT_WAY = "the short way and the long way have the same bits"
MERGING = "loops that are not merged only take time"
ORDER = "in which order, and by which pieces, the elements are visited changes no result"
ROOM = "room that is not used"
LEAK = "a leak, which the sanitizers find"
NOTHING = "an allocation of nothing, which gives NULL elsewhere"
ONE = "a factor of 1"
EXPLAINED: list[tuple[str, str, str | None, str]] = [
    ("rules/schedule_free.h", "numbers[1] = c->lr > numbers[1]", ">=", EQUAL),
    ("rules/adafactor.h", "double least_v[2]", None, ROOM),
    ("rules/radam.h", "? length > 5.0 : length >= 5.0", None, EQUAL),
    ("passes.c", "const size_t element =", None, CUTS),
    ("passes.c", "plan->first_element[middle] <=", None, CUTS),
    ("passes.c", "*start = (element", None, CUTS),
    ("norms.c", "i < plan->n_arrays; i++", "i <= plan->n_arrays; i++", ONE_MORE),
    ("scaled.c", "i < plan->n_arrays; i++", "i <= plan->n_arrays; i++", ONE_MORE),
    ("norms.c", "i < plan->n_groups; i++", "i <= plan->n_groups; i++", ONE_MORE),
    ("scaled.c", "i < plan->n_groups; i++", "i <= plan->n_groups; i++", ONE_MORE),
    ("update.c", "i < plan->n_groups; i++", "i <= plan->n_groups; i++", ONE_MORE),
    ("scaled.c", "start < end; start += piece", "<=", "a last piece of no elements"),
    ("units.c", "start < end; start += FS_BLOCK", "<=", "a last block of no elements"),
    ("clip.c", "start < end; start += FS_BLOCK", "<=", "a last block of no elements"),
    ("scaled.c", "int exponents[N_MEASURED]", "{1}", "scaled by a half, which is exact"),
    ("scaled.c", "if (exponents[0] != 0 || exponents[1] != 0)", "] != 1", "measured once more, the same"),
    ("scaled.c", "double numbers[FS_MAX_NUMBERS], norms", None, "norms that no rule looks at"),
    ("norms.c", "for (size_t i = 0; i < n / 2; i++)", "<=", OUTSIDE),
    ("norms.c", "if (n % 2)", "if (n / 2)", OUTSIDE),
    ("norms.c", "norm->sum_squares >= SMALL_SUM", "BIG_SUM", EQUAL),
    ("norms.c", "sum_squares > BIG_SUM", ">=", EQUAL),
    ("norms.c", "sum_squares < SMALL_SUM", "<=", EQUAL),
    ("norms.c", "if (norm->exponent != 0)", "1", "summed once more, with a scale of 1"),
    ("norms.c:fs_rescue_exponent", "-RESCUE_EXPONENT : 0", ": 1", "scaled by a half, which is exact"),
    ("norms.c", "return factor >= 1.0", "> 1.0", EQUAL),
    ("norms.c", "*exponent = 0;", "*exponent = 1;", "of sums that are all 0 or nan any exponent will do"),
    ("norms.c", "exponent > *exponent", ">=", EQUAL),
    ("norms.c", "squaring < 2", "<= 2", "squared twice, the same way"),
    ("norms.c", "squaring < 2", "< 3", "squared twice, the same way"),
    ("norms.c", "int own = 0;", "1", "frexp sets it, where it counts"),
    ("norms.c", "if (options->clip_norm < INFINITY)", "<=", "a factor of 1, for a norm that is finite"),
    ("norms.c", "of_norms < report->clip_factor", "<=", EQUAL),
    ("tiles.c:fs_before_cache_line", "", None, ORDER),
    ("update.c:update_run", "size_t count =", None, ORDER),
    ("update.c:update_run", "start += count, count = 0", "count = 1", ORDER),
    ("update.c:update_run", "count = count > 0", "< 0", ORDER),
    ("update.c:update_run", "count = count > 0", "> 1", ORDER),
    ("update.c", "o < w->n_operands; o++", "<=", OUTSIDE),
    ("update.c:update_work", "array->is_run && rule_alone", "&& array->in_blocks", SHORT_WAY),
    ("clip.c:clear_work", "t < end_tile", "<=", "cleared twice"),
    ("kernels.c:float32_to_float16_at_random", "const bool is_subnormal", "<=", "2^-14 comes out the same either way"),
    ("kernels.c:float32_to_float16_at_random", "is_subnormal ? magnitude : 0", ": 1", "not used where it is not subnormal"),
    ("kernels.c:float32_to_float16_at_random", ">= 0x477fe000", ">", "the largest comes out the same either way"),
    ("kernels.c", "residual[i] = (int16_t)", "bits + rounded", "of `rounded` the lower 16 bits are 0"),
    ("kernels.inc", "if (grad_scale != 1.0)", "0.0", "the same division, by 1"),
    ("kernels.inc", "if (stages->clip_value < HUGE_VAL)", "<=", "clipped at infinity"),
    ("kernels.inc:apply_stages", "MAP(x > bound", ">=", EQUAL),
    ("kernels.inc:apply_stages", "MAP(x > bound", "<=", EQUAL),
    ("kernels.inc:bound", "param[i] < lower", ">=", EQUAL),
    ("kernels.inc:bound", "param[i] < lower", "<=", EQUAL),
    ("kernels.c", "l < half", "<=", OUTSIDE),
    ("kernels.c", "lane < WIDTH; lane++", "<=", "masked in the rest; before that it is found"),
    ("kernels.c", "if (rest > 0)", ">= 0", "masks all of a register"),
    ("kernels.c", "lane < FS_LANES; lane++", "<=", "masked in the rest; before that it is found"),
    ("kernels.c", "if (whole < end)", "<=", "masks all lanes"),
    ("kernels.c:to_code", "code > smallest", ">=", EQUAL),
    ("kernels.inc:apply_to_few", "largest[s] =", ": 1", "not used without a scale"),
    ("kernels.inc:apply_to_few", "s < small->n_states", "<=", OUTSIDE),
    ("kernels.inc", "if (largest > LAST_TO_FIT)", ">=", EQUAL),
    ("kernels.inc:load_small", "start < n", "<=", "a last block of no elements"),
    ("rules/adam.h", "> v ?", ">= v ?", EQUAL),
    ("rules/rmsprop.h", "variance < 0 ?", "<= 0 ?", EQUAL),
    ("rules/rprop.h", "s = s < smallest ?", "<=", EQUAL),
    ("rules/rprop.h", "s = s < smallest ?", ">=", EQUAL),
    ("rules/prodigy.h", "estimate > c->d", ">=", EQUAL),
    ("plan.c:fs_plan_new", "->arrays = calloc(n_arrays + 1", "+ 0", NOTHING),
    ("plan.c:fs_plan_new", "->groups = calloc(n_groups + 1", "+ 0", NOTHING),
    ("plan.c:fs_plan_new", "->array_sums = calloc(n_arrays + 1", "+ 0", NOTHING),
    ("plan.c", "calloc(", "+ 2", MEMORY),
    ("plan.c", "calloc(1,", "calloc(2", MEMORY),
    ("plan.c", "free(", DELETED, LEAK),
    ("plan.c:fs_plan_free", "for (size_t i = 0", None, LEAK),
    ("plan.c:fs_plan_free", "for (int s = 0", None, LEAK),
    ("plan.c:fs_plan_new", "for (size_t i = 0", "<=", ONE_MORE),
    ("plan.c:fs_plan_finish", "calloc(", "+ 0", NOTHING),
    ("plan.c:fs_plan_finish", "i <", "i <= plan->n_arrays; i++", ONE_MORE),
    ("plan.c:fs_plan_finish", "if (room > 0)", "> 1", "no array with units needs as little"),
    ("plan.c:fs_plan_finish", "s < FS_N_STATS", "<=", OUTSIDE),
    ("plan.c:fs_plan_finish", "plan->first_block[i + 1] =", "FS_BLOCK + 1", "a further block of 0 changes no pairwise sum"),
    ("plan.c:fs_plan_finish", "plan->first_block[i + 1] =", "FS_BLOCK - 0", "a further block of 0 changes no pairwise sum"),
    ("tiles.c", "sizeof(fs_loop), grad_loops =", "(n + 3)", MEMORY),
    ("tiles.c", "sizeof(fs_loop), grad_loops =", "grad_loops = (n + 2)", MEMORY),
    ("tiles.c", "const size_t lengths", "(2 + FS", MEMORY),
    ("tiles.c", "calloc(1, numbers", "calloc(2", MEMORY),
    ("tiles.c", "if (loop.size == 1)", "0", MERGING),
    ("tiles.c", "if (n > 0 && loops[n - 1].stride", "if (n < 0", MERGING),
    ("tiles.c", "if (n > 0 && loops[n - 1].stride", "if (n > 1", MERGING),
    ("tiles.c", "if (n > 0 && loops[n - 1].stride", "loops[n + 1].stride", MERGING),
    ("tiles.c", "if (n > 0 && loops[n - 1].stride", "loops[n - 0].stride", MERGING),
    ("tiles.c", "loops[n++] = (fs_loop){.size = 1, .stride[FS_GRAD]", "= 2,", "one element is one row of one, whatever its size"),
    ("tiles.c", "for (int o = 0; o < FS_N_OPERANDS; o++)", "o <= FS_N_OPERANDS", OUTSIDE),
    ("tiles.c:are_one", "return true;", None, MERGING),
    ("tiles.c:are_one", "if (outer->stride[o] != inner->stride[o]", "==", MERGING),
    ("tiles.c:are_one", "for (int o = 0;", "o--", MERGING + ", or where it looks is out of bounds, which the sanitizers find"),
    ("tiles.c:are_one", "inner->stride[o] * (ptrdiff_t)inner->size", "/", MERGING),
    ("tiles.c:share_tile", "const ptrdiff_t *strides =", "- 0", ROOM),
    ("tiles.c:share_tile", "size_t n_copied = 0, place = 0;", "= 1", ROOM + ", or out of bounds, where the sanitizers find it"),
    ("tiles.c:share_tile", "copied[o] = !only_copied", "data || ", ROOM),
    ("tiles.c:share_tile", "place += copied[o] ? room : 0", ": 1", ROOM + ", or out of bounds, where the sanitizers find it"),
    ("tiles.c:arrange_tiles", "for (int l = 0; l < array->n_loops", "<=", OUTSIDE),
    ("tiles.c:fs_array_set", "if (array->n_dims > 0)", ">= 0", "copies nothing"),
    ("tiles.c:fs_grad_in_c_order", "if (array->n_grad_loops > 1", "> 0", SHORT_WAY),
    ("tiles.c:fs_grad_in_c_order", "if (array->n_grad_loops > 1", ">= 1", SHORT_WAY),
    ("tiles.c:move", "if (last > 0 && n_columns", "last < 0", ORDER),
    ("tiles.c:move", "if (last > 0 && n_columns", "last > 1", ORDER),
    ("tiles.c:move", "const ptrdiff_t outer =", ": 1", "a single row's distance from the next"),
    ("tiles.c:move", "const ptrdiff_t outer =", ">= 0", "a single row's distance from the next"),
    ("tiles.c:fs_array_set_units", "array->unit_size =", ": 1", "not used where there are no units"),
    ("tiles.c:fs_array_place_units", "aligned = true", None, SHORT_WAY),
    ("tiles.c:fs_units_in_place", "if (!operand->aligned ||", "if (operand", SHORT_WAY + ", but for what the sanitizers find"),
    ("tiles.c:fs_units_in_place", "for (int d = 0;", "<=", OUTSIDE),
    ("tiles.c:fs_units_in_place", "for (int d = 0;", "d--", OUTSIDE),
    ("tiles.c:fs_units_in_place", "if (array->shape[d] > 1", ">= 1", SHORT_WAY),
    ("tiles.c:fs_units_in_place", "if (array->shape[d] > 1", "> 0", SHORT_WAY),
    ("tiles.c:fs_units_in_place", "if (array->shape[d] > 1", "||", SHORT_WAY),
    ("pieces.c:ahead_of", "", None, "when data is fetched changes no result"),
    ("pieces.c:fetch_some", "", None, "when data is fetched changes no result"),
    ("kernels.c:fetch_ahead", "", None, "when data is fetched changes no result"),
    ("kernels.inc", "fetch_ahead(", None, "when data is fetched changes no result"),
    ("kernels.inc:apply_to_few", "const size_t item =", None, "when data is fetched changes no result"),
    ("kernels.inc:sum_squares", "if (scale == 1.0)", "0.0", "multiplied by 1"),
    ("kernels.inc:sum_squares", "if (scale == 1.0)", "2.0", "multiplied by 1; no other scale is close to it"),
    ("pieces.c:has_small_states", "for (int o = FS_STATE;", "<=", OUTSIDE),
    ("pieces.c:has_small_states", "return false;", "true", SHORT_WAY),
    ("pieces.c:fs_load_staged", "work.n_operands = FS_STATE", DELETED, "brings states, too, at which nobody looks"),
    ("pieces.c:fs_update_pieces", "fetch_some(", None, "when data is fetched changes no result"),
    ("pieces.c:small_states", "small.in_place =", None, "when data is fetched changes no result"),
    ("pieces.c:small_states", "small.all_bfloat16 = array->real", DELETED, SHORT_WAY),
    ("pieces.c:fs_copy_block", "if (o != FS_GRAD && at[o]", "|| at[o]", "copied in place of being read where it lies"),
    ("work.c:fs_work_on", "w.zero =", ">= 0", "nothing is there to be zeroed"),
    ("units.c", "group->decay_after != 1.0)", "!= 0.0", ONE),
    ("work.c", "group->decay_after != 1.0)", "!= 0.0", ONE),
    ("update.c", "group->decay_after != 1.0)", "!= 0.0", ONE),
    ("units.c", "group->decay_after != 1.0)", "!= 2.0", ONE),
    ("work.c", "group->decay_after != 1.0)", "!= 2.0", ONE),
    ("update.c", "group->decay_after != 1.0)", "!= 2.0", ONE),
    ("work.c:fs_work_on", "w.stage_grad =", "!= 0.0", SHORT_WAY),
    ("work.c:fs_work_on", "w.bound =", ">=", "bounded by infinities"),
    ("work.c:fs_work_on", "w.bound =", "<=", "bounded by infinities"),
    ("scaled.c:load_numbers", "n < n_numbers", "<=", OUTSIDE),
    ("scaled.c:scale_array", "n < n_numbers", "<=", OUTSIDE),
    ("scaled.c:fs_scale_pass", "bool any_measured = false", None, "measures nothing"),
    ("units.c:is_measured", "< INFINITY", "<=", ONE),
    ("units.c:sum_unit", "start < array->unit_size", "<=", "a last piece of no elements"),
    ("units.c:measure_unit", "if (array->real == FS_FLOAT32", "&&", "what is nan, or of floats, needs no scale; it takes time"),
    ("units.c:measure_unit", "if (norm.exponent != 0)", "1", "summed once more, with a scale of 1"),
    ("units.c:unit_factor", "if (norm <= limit)", "norm < limit", EQUAL),
    ("units.c:unit_factor", "norm < least", "<=", EQUAL),
    ("units.c:measure_units_work", "for (size_t unit =", "<=", OUTSIDE),
    ("units.c:measure_units_work", "for (size_t unit =", "(end + size + 1)", OUTSIDE),
    ("units.c:measure_units_work", "for (size_t unit =", "(end + size - 0)", OUTSIDE),
    ("units.c:measure_units_work", "length < LEAST_PARAM", "<=", EQUAL),
    ("factored.c:sum_part", "together =", None, "how many rows go together changes no result"),
    ("factored.c:sum_part", "r < n_rows", "<=", "a last run of no rows"),
    ("factored.c:move_rows", "mean < least", "<=", EQUAL),
    ("factored.c:move_columns", "i < n / 2", "<=", OUTSIDE),
    ("factored.c:move_columns", "c < n_columns", "<=", OUTSIDE),
    ("factored.c:move_columns", "if (n % 2)", "n / 2", OUTSIDE),
    ("rules/adafactor.h", "limit < h->lr", "<=", EQUAL),
    ("rules/adafactor.h", "c->rate =", "<=", EQUAL),
    ("rules/adafactor.h", "square < smallest", "<=", EQUAL),
    ("rules/adafactor.h", "v < least_v", "<=", EQUAL),
    ("units.c", "bool any = false", None, "measures nothing"),
    ("units.c", "i < plan->n_groups && plan->units", "<=", "measures nothing"),
    ("units.c", "any = any || plan->groups[i]", "<=", "measures nothing"),
    ("norms.c:count_nonfinite", "const size_t count =", "array->size + start", OUTSIDE),
    ("pieces.c:fs_update_pieces", "for (int o = 0; o < FS_N_PLACES", "<=", OUTSIDE),
    ("update.c:fs_update", "bool any_scaled = false", None, "measures nothing"),
    ("pieces.c:fs_update_pieces", "count > 0 ? count : piece", "count < 0", ORDER),
    ("pieces.c:fs_update_pieces", "count > 0 ? count : piece", "count > 1", ORDER),
    ("tiles.c:rows_are_runs", "across->chunk == 1", "== 0", SHORT_WAY),
    ("tiles.c:find_transposed", "", None, ORDER),
    ("tiles.c:arrange_grad", "array->grad_is_transposed =", None, ORDER),
    ("tiles.c:has_long_rows", "", None, ORDER),
    ("tiles.c:arrange_loops", "for (; !array->in_c_order", ">= 1", "the loop of size 1 may lie between others"),
    ("tiles.c:arrange_loops", "for (; !array->in_c_order", "> 0", "the loop of size 1 may lie between others"),
    ("tiles.c:arrange_loops", "llabs(loops[place - 1].stride", "<=", "no two strides of a parameter are equal"),
    ("tiles.c:fs_array_set_rounding", "is_packed", None, "the strides of what never had any are 0"),
    ("tiles.c", "loop.stride[o] = array->operand[o].data &&", ": 1", MERGING),
    ("tiles.c", "loop.stride[o] = array->operand[o].data &&", "data || ", "strides of what is not there are 0"),
    ("tiles.c", "if (last > 0 && are_one", "if (last < 0", MERGING),
    ("tiles.c", "if (last > 0 && are_one", "if (last > 1", MERGING),
    ("tiles.c", "if (last > 0 && are_one", "if (last >= 0", "the loop of size 1 in front has a stride of 0, which is no other's"),
    ("tiles.c", "transposed ? room / WIDTH : room", None, ORDER),
    ("tiles.c", "across->chunk = min_size(across->size", DELETED, ORDER),
    ("tiles.c", "last->chunk = min_size(last->size, room / across", DELETED, ORDER),
    ("tiles.c", "changed->aligned = aligned;", DELETED, "nothing is used where it lies"),
]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    file: str
    function: str
    line: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before.strip()}  ->  {self.after.strip() or DELETED}"

    def is_explained_by(self, place: str, part: str, change: str | None, _reason: str) -> bool:
        file, _, function = place.partition(":")
        is_here = file == self.file and function in ("", self.function) and part in self.before
        return is_here and (change is None or change in (self.after or DELETED))

    def is_explained(self) -> bool:
        return any(self.is_explained_by(*entry) for entry in EXPLAINED)


def code_lines(text: str) -> list[tuple[int, str]]:
    """The lines that are code: no comments, no preprocessor."""
    blank = re.sub(r"/\*.*?\*/", lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.S)
    lines = blank.split("\n")
    return [(n, line) for n, line in enumerate(lines, 1) if not line.lstrip().startswith("#") and '"' not in line]


def mutants_of(file: str) -> list[Mutant]:
    original = (CSRC / file).read_text().split("\n")
    found = []
    function = ""
    for n, code in code_lines((CSRC / file).read_text()):
        whole = original[n - 1]
        if opening := re.match(r"(?=\w)[^(]*?\b(\w+)\((?:(\w+)\)\()?", code):
            function = opening[2] or opening[1]  # RULE(adam)(...) is adam
        for pattern, replacements in SWAPS:
            for match in re.finditer(pattern, code):
                for replacement in replacements:
                    changed = whole[: match.start()] + match.expand(replacement) + whole[match.end() :]
                    found.append(Mutant(file, function, n, whole, changed))
        if STATEMENT.match(code):
            found.append(Mutant(file, function, n, whole, ""))
    return found


class Worker:
    """A copy of the sources with its objects."""

    def __init__(self, c_only: bool) -> None:
        self.c_only = c_only
        self.folder = Path(tempfile.mkdtemp(prefix="mutate-"))
        shutil.copytree(CSRC, self.folder / "csrc", ignore=shutil.ignore_patterns("build"))
        shutil.copytree(
            ROOT / "src/fusedstep", self.folder / "fusedstep", ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
        header = self.folder / "csrc/kernels.h"
        definition = next(line for line in header.read_text().split("\n") if "min_size(size_t a" in line)
        opposite = definition.replace("min_size", "max_size").replace("<", ">")
        header.write_text(header.read_text().replace(definition, f"{definition}\n{opposite}"))
        # The same lines are compiled for every level, but for loops: one will do, in a third of the time, with both of these.
        kernels = self.folder / "csrc/kernels.c"
        only_baseline = kernels.read_text().replace("#ifdef __x86_64__", "#if 0")
        kernels.write_text(only_baseline.replace("#define EACH EACH_IN_TURN", "#define EACH EACH_IN_REGISTERS", 1))
        self.sources = [path.name for path in sorted(self.folder.glob("csrc/*.c"))]
        for name in [*self.sources, *C_TEST_FILES]:
            assert self.compile(name), name

    def run(self, command: list[str | Path], timeout: float) -> bool:
        try:
            done = subprocess.run(command, cwd=self.folder / "csrc", env=ENVIRONMENT, capture_output=True, timeout=timeout)
            return done.returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def compile(self, name: str) -> bool:
        return self.run(["gcc", *FLAGS, "-fPIC", "-I.", "-c", name, "-o", Path(name).stem + ".o"], 120)

    def killer(self, mutant: Mutant) -> str | None:
        """What notices the mutant; None if nothing does."""
        path = self.folder / "csrc" / mutant.file
        lines = path.read_text().split("\n")
        before = lines[mutant.line - 1]
        lines[mutant.line - 1] = mutant.after
        path.write_text("\n".join(lines))
        unit = mutant.file if mutant.file.endswith(".c") else "kernels.c"
        try:
            return self.judge(unit)
        finally:
            lines[mutant.line - 1] = before
            path.write_text("\n".join(lines))
            self.compile(unit)

    def judge(self, unit: str) -> str | None:
        if not self.compile(unit):
            return "the compiler"
        objects = [Path(name).stem + ".o" for name in self.sources]
        program = "./test_fusedstep"
        link = ["-fopenmp", "-Wl,--wrap=calloc,--wrap=fs_team_run", "-lm", "-lpthread"]
        tests = [Path(name).stem + ".o" for name in C_TEST_FILES]
        if not self.run(["gcc", *objects, *tests, "-o", program, *link], 60):
            return "the linker"
        for test in C_TESTS:
            if not self.run([program, test], 15):
                return f"C {test}"
        return None if self.c_only else self.python_killer(objects)

    def python_killer(self, objects: list[str]) -> str | None:
        core = self.folder / "csrc/_core.o"
        if not core.exists():
            source = self.folder / "csrc/_core.c"
            assert self.run(["cython", "-3", ROOT / "src/fusedstep/_core.pyx", "-o", source], 120)
            include = ["-I", sysconfig.get_path("include"), "-I", numpy.get_include(), "-I."]
            flags = ["-O1", "-fPIC", '-DFUSEDSTEP_FLAGS="mutant"', "-fopenmp"]
            assert self.run(["gcc", *flags, *include, "-c", source, "-o", core], 120)
        library = self.folder / "fusedstep" / ("_core" + sysconfig.get_config_var("EXT_SUFFIX"))
        assert self.run(["gcc", "-shared", "-fopenmp", core, *objects, "-o", library, "-lm"], 60)
        command = ["env", f"PYTHONPATH={self.folder}", sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        for test in PYTHON_TESTS:
            if not self.run([*command, ROOT / "tests" / test], 300):
                return f"Python {test}"
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many mutants, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-least", type=float, default=0.95, help="the score below which the exit status is 1")
    parser.add_argument("--only", help="FILE or FILE:LINE")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--c-only", action="store_true", help="leave the Python tests out")
    arguments = parser.parse_args()
    mutants = [mutant for file in FILES for mutant in mutants_of(file)]
    stale = [entry for entry in EXPLAINED if not any(mutant.is_explained_by(*entry) for mutant in mutants)]
    if stale:
        sys.exit("\n".join(["EXPLAINED has entries that fit no mutant any more:", *map(str, stale)]))
    if arguments.only:
        file, _, line = arguments.only.partition(":")
        mutants = [mutant for mutant in mutants if mutant.file == file and line in ("", str(mutant.line))]
    explained = [mutant for mutant in mutants if mutant.is_explained()]
    mutants = [mutant for mutant in mutants if not mutant.is_explained()]
    if arguments.sample and arguments.sample < len(mutants):
        mutants = random.Random(arguments.seed).sample(mutants, arguments.sample)

    workers: queue.Queue[Worker] = queue.Queue()
    for _ in range(arguments.jobs):
        workers.put(Worker(arguments.c_only))
    bar = tqdm(total=len(mutants), unit="mutant", desc="mutants", smoothing=0.02)

    def judge(mutant: Mutant) -> str | None:
        worker = workers.get()
        try:
            found = worker.killer(mutant)
        finally:
            workers.put(worker)
        if found is None:
            bar.write(f"survived: {mutant}")
        bar.update()
        return found

    with ThreadPoolExecutor(arguments.jobs) as pool:
        killers = list(pool.map(judge, mutants))
    bar.close()
    while not workers.empty():
        shutil.rmtree(workers.get().folder)

    print(f"\n{'file':22} {'mutants':>8} {'killed':>8} {'score':>7}")
    for file in FILES:
        own = [killer for mutant, killer in zip(mutants, killers) if mutant.file == file]
        if own:
            killed = sum(killer is not None for killer in own)
            print(f"{file:22} {len(own):8} {killed:8} {killed / len(own):7.1%}")
    killed = sum(killer is not None for killer in killers)
    score = killed / len(mutants) if mutants else 1.0
    print(f"{'all':22} {len(mutants):8} {killed:8} {score:7.1%}")
    print(f"killed by: {', '.join(f'{name} {n}' for name, n in count(killers))}")
    print(f"explained, and left out: {len(explained)} that change no result")
    for mutant, killer in zip(mutants, killers):
        if killer is None:
            print(f"survived: {mutant}")
    return 0 if score >= arguments.at_least else 1


def count(killers: list[str | None]) -> list[tuple[str, int]]:
    names = [killer or "nothing" for killer in killers]
    return sorted(((name, names.count(name)) for name in set(names)), key=lambda item: -item[1])


if __name__ == "__main__":
    sys.exit(main())
