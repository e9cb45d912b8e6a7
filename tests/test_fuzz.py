"""Anything a caller may do, in any order: the compiled optimizer and the reference stay equal, bit for bit.

    pytest tests/test_fuzz.py                              a fixed budget
    pytest tests/test_fuzz.py --hypothesis-profile=long    hours

The checkpoint file has its own fuzz test in test_checkpoint.py, under the same profiles.
"""

import math

import ml_dtypes
import numpy as np
from conftest import LEVELS, SETTINGS, assert_same_bits
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import fusedstep as fs
from fusedstep import _core, database

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
SHAPES = [(), (0,), (1,), (17,), (1025,), (3, 5), (70, 33), (33, 70), (2, 0, 3), (4, 3, 2), (130, 2), (2, 3, 4, 5)]
SPECIAL = [0.0, -0.0, 1e-42, 1e30, -1e30, 1.0]
POLICIES = st.sampled_from(["raise", "skip", "zero", "propagate"])


def laid_out(values, layout):
    """A copy of an array in another layout; `layout` is any number."""
    if values.ndim == 0:
        return values.copy()
    order = np.random.default_rng(layout).permutation(values.ndim)
    room = np.zeros([values.shape[d] * (1 + layout % 3) + layout % 2 for d in order], values.dtype)
    view = room[tuple(slice(0, values.shape[d] * (1 + layout % 3), 1 + layout % 3) for d in order)]
    if layout % 5 == 4:
        view = view[tuple(slice(None, None, -1) for _ in order)]
    view = np.moveaxis(view, range(values.ndim), order)
    view[...] = values
    return view


def outcome(call):
    """What a call returns or raises."""
    try:
        return call()
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        return type(error), str(error)


class Optimizers(RuleBasedStateMachine):
    """A compiled optimizer and a reference one, treated alike."""

    @initialize(
        case=st.sampled_from(SETTINGS),
        options=st.sampled_from([*database.OPTIONS, *database.LOW_PRECISION, {"state_dtype": "bfloat16", "seed": 7}]),
        arrays=st.lists(
            st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.integers(0, 99)), min_size=1, max_size=5
        ),
        seed=st.integers(0, 2**32),
    )
    def make(self, case, options, arrays, seed):
        entry, settings = case
        self.rng = np.random.default_rng(seed)
        self.optimizer, self.settings = entry.optimizer, {**settings, **options}
        if options.get("low_precision") == "split" and np.float16 in [dtype for _, dtype, _ in arrays]:
            self.settings["low_precision"] = "kahan"
        values = [self.rng.standard_normal(shape).astype(dtype) for shape, dtype, _ in arrays]
        self.params = {f"p{i}": laid_out(v, layout) for i, (v, (_, _, layout)) in enumerate(zip(values, arrays))}
        # Random rounding belongs to places in the parameter's memory; all else to elements, wherever they lie.
        alike = options.get("state_dtype", "float32") != "float32" or "low_precision" in options
        self.twins = {
            f"p{i}": laid_out(v, layout) if alike else v.copy() for i, (v, (_, _, layout)) in enumerate(zip(values, arrays))
        }
        self.opt = self.optimizer(self.params, **self.settings)
        self.twin = self.optimizer(self.twins, **self.settings, backend="reference")
        self.bound = None
        _core.insist_on_threads(True)

    def both(self, call):
        """The same with both: the same outcome."""
        found, wanted = outcome(lambda: call(self.opt)), outcome(lambda: call(self.twin))
        if isinstance(wanted, fs.StepReport):
            assert isinstance(found, fs.StepReport), found
            for a, b in zip(found, wanted):
                if isinstance(b, fs.Stats):
                    assert_same_bits([a.rows], [b.rows])
                else:
                    assert a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)), (found, wanted)
        elif isinstance(wanted, tuple):
            assert found == wanted
        return wanted

    def gradients(self, dtype, layout, specials=()):
        grads = {}
        for i, (name, p) in enumerate(self.params.items()):
            values = self.rng.standard_normal(p.shape).astype(p.dtype if dtype is None else dtype)
            for special in specials:
                if values.size:
                    with np.errstate(over="ignore"):
                        values.flat[self.rng.integers(values.size)] = special
            grads[name] = laid_out(values, layout + i)
        return grads

    @rule(
        dtype=st.sampled_from([None, None, *DTYPES]),
        layout=st.integers(0, 99),
        specials=st.lists(st.sampled_from([*SPECIAL, np.nan, np.inf, -np.inf]), max_size=2),
        scale=st.sampled_from([1.0, 1.0, 3.0, 0.5, 65536.0]),
    )
    def step(self, dtype, layout, specials, scale):
        grads = self.gradients(dtype, layout, specials)
        before = {name: g.tobytes() for name, g in grads.items()}
        self.both(lambda opt: opt.step(grads, grad_scale=scale))
        assert {name: g.tobytes() for name, g in grads.items()} == before
        self.bound = grads

    @rule(dtype=st.sampled_from([None, *DTYPES]), layout=st.integers(0, 99), with_clear=st.booleans())
    def accumulate(self, dtype, layout, with_clear):
        """Micro-batches; what a step then uses they do not change."""
        for _ in range(2):
            grads = self.gradients(dtype, layout)
            self.both(lambda opt: opt.accumulate(grads))  # noqa: B023
        assert self.opt.accumulated == self.twin.accumulated == 2
        assert isinstance(self.both(lambda opt: opt.step(grads)), tuple)
        self.both(lambda opt: opt.step(zero_grads=with_clear))
        assert self.opt.accumulated == self.twin.accumulated == 0
        self.bound = None

    @rule()
    def averaged(self):
        """The averages in the arrays, and back."""

        before = [p.copy() for p in self.params.values()]
        found, wanted = outcome(lambda: self.opt.averages), outcome(lambda: self.twin.averages)
        assert found.keys() == wanted.keys()
        assert_same_bits([*found.values()], [*wanted.values()])
        if found:
            with self.opt.averaged(), self.twin.averaged():
                self.equal()
                assert isinstance(self.both(lambda opt: opt.step(self.gradients(None, 0))), tuple)
        assert_same_bits([*self.params.values()], before)

    @rule(layout=st.integers(0, 99))
    def step_and_clear(self, layout):
        grads = self.gradients(None, layout, [])
        twins = {name: g.copy() for name, g in grads.items()}
        assert self.opt.step(grads, zero_grads=True).applied == self.twin.step(twins, zero_grads=True).applied
        assert not any(g.astype(bool).any() for g in grads.values())
        self.bound = None

    @precondition(lambda self: self.bound is not None)
    @rule()
    def step_with_bound(self):
        for g in self.bound.values():
            g += g.dtype.type(0.5)
        self.both(lambda opt: opt.step())

    @rule(layout=st.integers(0, 99))
    def bind(self, layout):
        self.bound = self.gradients(None, layout)
        self.both(lambda opt: opt.bind(self.bound))

    @rule(
        what=st.sampled_from(["shape", "dtype", "missing", "extra", "none", "list", "kind", "scale"]),
        which=st.integers(0, 4),
    )
    def wrong(self, what, which):
        grads = self.gradients(None, 0)
        name = list(grads)[which % len(grads)]
        if what == "shape":
            grads[name] = np.zeros((*grads[name].shape, 2))
        elif what == "dtype":
            grads[name] = grads[name].astype(complex)
        elif what == "missing":
            del grads[name]
        elif what == "extra":
            grads["q"] = grads[name]
        elif what == "none":
            grads[name] = None
        elif what == "kind":
            grads[name] = "gradient"
        elif what == "list":
            grads = list(grads.values())
        scale = 0.0 if what == "scale" else 1.0
        assert isinstance(self.both(lambda opt: opt.step(grads, grad_scale=scale)), tuple)

    @rule(which=st.integers(0, 4))
    def shared(self, which):
        """A gradient that is its parameter."""
        name = list(self.params)[which % len(self.params)]
        if self.params[name].size:
            grads, twins = self.gradients(None, 0), self.gradients(None, 0)
            grads[name], twins[name] = self.params[name], self.twins[name]
            found, wanted = outcome(lambda: self.opt.step(grads)), outcome(lambda: self.twin.step(twins))
            assert found == wanted
            assert found[0] is ValueError

    @rule(
        edit=st.sampled_from(
            [
                ("lr", 0.5), ("lr", 0.0), ("lr", -1.0), ("lr", float("nan")), ("lr", "x"), ("weight_decay", 0.1), ("weight_decay", 2.5), ("l1", 0.01),
                ("decay_mode", "decoupled"), ("decay_mode", "independent"), ("decay_mode", None),
                ("maximize", True), ("clip_value", 0.2), ("clip_value", None), ("clip_norm_per_array", 0.5), ("amsgrad", True),
                ("ema_decay", 0.5), ("ema_decay", None), ("ema_decay", 1.0), ("clip_adaptive", 0.05), ("clip_adaptive", None), ("max_norm", 0.5), ("max_norm", None), ("unit_axes", 0),
                ("momentum", 0.5), ("momentum", 0.0), ("centered", True), ("betas", (0.5, 0.25)), ("eps", 1e-3),
                ("lr", lambda step: 0.1 / (1 + step)), ("lr", lambda step: None), ("lr", lambda step: float("inf")),
            ]
        )
    )  # fmt: skip
    def edit(self, edit):
        key, value = edit
        before = self.opt.param_groups[0].get(key)
        if key not in self.opt.param_groups[0]:
            return
        for opt in (self.opt, self.twin):
            opt.param_groups[0][key] = value
        grads = self.gradients(None, 0)
        if isinstance(self.both(lambda opt: opt.step(grads)), tuple) and not callable(before):
            for opt in (self.opt, self.twin):
                opt.param_groups[0][key] = before
        self.bound = None

    @rule(policy=POLICIES, clip_norm=st.sampled_from([None, 0.5, 1e-3, 1e9]))
    def policy(self, policy, clip_norm):
        for opt in (self.opt, self.twin):
            opt.nonfinite, opt.clip_norm = policy, clip_norm

    @rule(level=st.sampled_from(LEVELS), n_threads=st.integers(1, 4))
    def machine(self, level, n_threads):
        _core.set_level(level)
        self.opt.num_threads = n_threads

    @rule()
    def exchange_state(self):
        """Each goes on from the other's state, in a new optimizer."""
        state_dicts = self.twin.state_dict(), self.opt.state_dict()
        self.opt = self.optimizer(self.params, **self.settings)
        self.twin = self.optimizer(self.twins, **self.settings, backend="reference")
        for opt, state_dict in zip((self.opt, self.twin), state_dicts):
            opt.load_state_dict(state_dict)
        self.bound = None

    @invariant()
    def equal(self):
        if not hasattr(self, "opt"):
            return
        assert self.opt.steps == self.twin.steps
        for name, twin in self.twins.items():
            states = [(self.opt.state[name][key], array) for key, array in self.twin.state[name].items()]
            for found, wanted in [(self.params[name], twin), *states]:
                assert_same_bits([np.asarray(found)], [np.asarray(wanted)])

    def teardown(self):
        _core.set_level(LEVELS[-1])
        _core.insist_on_threads(False)


TestOptimizers = Optimizers.TestCase
