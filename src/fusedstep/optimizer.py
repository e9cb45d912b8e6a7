"""What all optimizers share: parameters, groups, state, the step, saving and loading."""

from __future__ import annotations

import importlib
import inspect
import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _arrays, _backends, _hyper, reference
from ._arrays import Change, assign
from ._hyper import Hyper
from .errors import NonFiniteGradientError

Array = NDArray[Any]

STATE_DICT_VERSION = 1
FLOAT32 = np.dtype(np.float32)
AVERAGE = "average"  # the state array that `ema_decay` calls for
SCALE = "_scale"  # ends the name of the array that goes with an 8-bit state
SAVED_OPTIONS = ("clip_norm", "seed", "nonfinite")  # of the whole optimizer; groups save theirs


class StepReport(NamedTuple):
    """What a step did."""

    step: int
    """Number of steps applied so far, this one included."""
    applied: bool
    """False if the step was skipped; nothing has changed then."""
    grad_norm: float | None
    """Norm of all (unscaled) gradients before clipping; None if nothing needed it."""
    clip_factor: float
    """Smallest factor a gradient was multiplied by to clip its norm; 1.0 if none was."""
    nonfinite: dict[str, int]
    """Names of the arrays whose gradients held inf or nan, with the number of such elements."""


class StateSpec(NamedTuple):
    """What a state array of a parameter is to be."""

    like: Array
    """Of its shape, and in its memory layout."""
    dtype: np.dtype[Any]
    fill: float | Array


class Kernel(NamedTuple):
    """A compiled rule and the state arrays it works on, in its order."""

    name: str
    states: tuple[str, ...]
    averages: bool
    """Whether the average of the parameters follows, which is a further state array."""


class Optimizer:
    """Base of all optimizers: parameters, groups, state, the step.

    Every optimizer takes these keyword options besides its own hyper-parameters. A hyper-parameter is a number or a
    callable ``steps taken so far -> number`` (0 at the first step).

    Parameters
    ----------
    params : array, sequence or mapping of arrays (nested too), or sequence of groups
        Changed in place by :meth:`step`. Writeable arrays of float32, float64, float16 or bfloat16, of any layout, that do
        not share memory. A group is a dict with the key ``"params"`` and any hyper-parameters of its own.
    weight_decay : float
        Adds ``weight_decay * param`` to the gradient (L2 regularisation).
    decoupled_weight_decay : bool
        Decay the parameter by ``1 - lr * weight_decay`` before the update instead.
    l1 : float
        Adds ``l1 * sign(param)`` to the gradient.
    maximize : bool
        Follow the gradient up instead of down.
    clip_norm : float, optional
        Scale all gradients by ``min(1, clip_norm / (norm + 1e-6))``, where norm is that of all of them together.
    clip_norm_per_array : float, optional
        The same with each array's own norm; comes before `clip_norm`.
    clip_value : float, optional
        Then bound each element to ``[-clip_value, clip_value]``.
    bounds : pair of float, optional
        Bound each parameter to ``[lower, upper]`` after the update; None in either place for no bound.
    ema_decay : float, optional
        Keep an average of the parameters, ``average += (1 - ema_decay) * (param - average)`` after each update, from their
        present values on, as the state ``average``; see :attr:`averages` and :meth:`averaged`. ``ema_warmup`` and
        ``equal_average`` in :mod:`fusedstep.schedules` make averages that forget the start.
    state_dtype : {None, "float32", "bfloat16", "int8"}
        What state is kept in, if not in the compute type: "int8" takes a byte for each element, and 4 for the scale of each
        256 neighbours, as two arrays (``exp_avg`` and ``exp_avg_scale``); "bfloat16" two (and needs ml_dtypes). Each step
        computes with exact values and then rounds both at random, up as often as the distance to the value below calls for:
        rounding to the nearest would freeze averages that change by less than a last digit. Averages of parameters and what
        a rule subtracts from one another are not rounded.
    seed : int
        Of that: the same for each seed, step, array and element, with any number of threads.
    nonfinite : {"raise", "skip", "zero", "propagate"}
        What an inf or nan in a gradient does: raise :class:`NonFiniteGradientError`, leave out the step, count as 0, or go
        on unchecked, which saves reading the gradients once more. In the first two cases nothing changes.
    convention : {"torch"}
        Whose equations and defaults to follow.
    backend : {"c", "reference"}
        Compiled kernels, or NumPy. Both give the same bits.
    num_threads : int, optional
        Threads for this optimizer; by default :func:`fusedstep.get_num_threads`.
    allocate_state : callable, optional
        ``(name, shape, dtype) -> array`` makes each state array, for example a ``np.memmap`` or one in shared memory; its
        content is overwritten. The name is that of the parameter and of the state: ``"w1.exp_avg"``. By default state is in
        memory, in the layout of its parameter.

    Attributes
    ----------
    param_groups : list of dict
        ``"params"`` (arrays), ``"names"`` and the hyper-parameters of each group; the latter may be edited between steps.
    state : mapping of mappings of ndarray
        ``state[name][state name]``; float64 for float64 parameters, else float32. The arrays may be edited in place.
    steps : int
        Number of steps applied.
    """

    # What a rule's class defines.
    _rule: ClassVar[Callable[..., None]]
    _option_defaults: ClassVar[dict[str, Any]] = {}
    _non_negative_states: ClassVar[tuple[str, ...]] = ()
    _lengths: ClassVar[dict[str, int]]  # of the hyper-parameters that are several numbers

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the state arrays these hyper-parameters call for, in the order of the rule's arguments."""
        raise NotImplementedError

    @staticmethod
    def _exact_states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        """Those of them that are never kept in a smaller type."""
        return ()

    @classmethod
    def _kernel_name(cls, states: tuple[str, ...], hyper: Mapping[str, Any]) -> str:
        """The C kernel for these state arrays."""
        return cls._rule.__name__

    @classmethod
    def _kernel(cls, hyper: Mapping[str, Any]) -> Kernel:
        states = cls._states(hyper)
        return Kernel(cls._kernel_name(states, hyper), states, hyper["ema_decay"] is not None)

    @staticmethod
    def _initial_state(name: str, hyper: Mapping[str, Any]) -> float:
        """What a state array is filled with at first."""
        return 0.0

    def __init_subclass__(cls) -> None:
        # Show the common options in help() and in editors.
        own = [p for p in inspect.signature(cls.__init__).parameters.values() if p.name not in ("self", "options")]
        cls._lengths = {p.name: len(p.default) for p in own if isinstance(p.default, tuple)}
        defaults = _hyper.OPTION_DEFAULTS | cls._option_defaults
        options = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=value) for n, value in defaults.items()]
        cls.__signature__ = inspect.Signature(own + options)  # type: ignore[attr-defined]

    def __init__(self, params: Any, hyper: dict[str, Any], options: _hyper.Options) -> None:
        known = _hyper.OPTION_DEFAULTS | self._option_defaults
        for name in options:
            if name not in known:
                raise TypeError(f"{type(self).__name__}: unknown option {name!r}; it has {', '.join([*hyper, *known])}")
        defaults = {**hyper, **known, **options}
        for name in _hyper.CHOICES:
            _hyper.check_choice(name, defaults[name])
        if defaults["num_threads"] is not None:
            _hyper.check_num_threads(defaults["num_threads"])
        self.nonfinite: str = defaults["nonfinite"]
        self.convention: str = defaults["convention"]
        self.backend: str = defaults["backend"]
        self.num_threads: int | None = defaults["num_threads"]
        self.clip_norm: Hyper | None = defaults["clip_norm"]
        _hyper.check_seed(defaults["seed"])
        self.seed: int = defaults["seed"]
        self.state_dtype: str | None = defaults["state_dtype"]
        if self.state_dtype == "bfloat16":
            require_bfloat16()
        self._allocate_state: Callable[[str, tuple[int, ...], Any], Any] | None = defaults["allocate_state"]
        if self._allocate_state is not None and not callable(self._allocate_state):
            raise TypeError(f"allocate_state: expected a callable or None, got {self._allocate_state!r}")
        if self.backend == "c":
            _backends.require_core()

        self.param_groups: list[dict[str, Any]] = []
        self._structures: list[_arrays.Structure] = []
        self._is_grouped = is_groups(params)
        self._group_defaults = {k: v for k, v in defaults.items() if k not in _hyper.GLOBAL_OPTIONS}
        for group in list(params) if self._is_grouped else [{"params": params}]:
            self._add_group(group)
        self._names = [name for group in self.param_groups for name in group["names"]]
        self._params = [array for group in self.param_groups for array in group["params"]]
        self._group_of = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        specs = [structure.spec() for structure in self._structures]
        self._spec = specs if self._is_grouped else specs[0]
        repeated = [name for name, count in Counter(self._names).items() if count > 1]
        if repeated:
            raise ValueError(f"params[{repeated[0]!r}]: expected names of their own, got one name twice")
        _arrays.check_overlaps(self._labelled("params", self._params))
        _hyper.resolve("clip_norm", self.clip_norm, 0, "clip_norm")

        self.state: Mapping[str, Mapping[str, Array]] = {name: {} for name in self._names}
        self._lock: Any = _backends.core.Lock() if _backends.core is not None else threading.Lock()
        self._resolved: dict[int, tuple[list[Any], dict[str, Any]]] = {}  # hyper-parameters as given, and checked
        self._in_plan: list[dict[str, Any]] = []  # those the plan has
        self._kernels: list[Kernel] = []
        self._plan: Any = None
        self._shows_averages = False
        self._sums: Any = None  # the plan that adds up gradients, in its params
        self._prepare_plan(self._resolve(self.param_groups, 0), 0)

    def _add_group(self, group: Mapping[str, Any]) -> None:
        label = f"param_groups[{len(self.param_groups)}]"
        for key in group:
            if key != "params" and key not in self._group_defaults:
                raise TypeError(f"{label}: unknown key {key!r}; a group has params, {', '.join(self._group_defaults)}")
        n_before = sum(len(structure.names) for structure in self._structures)
        structure = _arrays.Structure(group["params"], first_index=n_before)
        arrays = [_arrays.as_writeable(leaf, f"params[{name!r}]") for name, leaf in zip(structure.names, structure.leaves)]
        self._structures.append(structure)
        own = {key: value for key, value in group.items() if key != "params"}
        self.param_groups.append({"params": arrays, "names": list(structure.names), **self._group_defaults, **own})

    def _labelled(self, what: str, arrays: list[Array]) -> list[tuple[str, Array]]:
        return [(f"{what}[{name!r}]", array) for name, array in zip(self._names, arrays)]

    # ---- Hyper-parameters and plan ----

    def _resolve(self, groups: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """The values of each group's hyper-parameters at this step, checked: those of last time if none has changed."""
        resolved = []
        for i, group in enumerate(groups):
            raw = [group[key] for key in self._group_defaults]
            raw_before, values = self._resolved.get(i, ([None] * len(raw), {}))
            if not values or not all(map(operator.is_, raw, raw_before)):
                label = f"param_groups[{i}]." if self._is_grouped else ""
                values = {
                    key: _hyper.resolve(key, group[key], step, label + key, self._lengths.get(key))
                    for key in self._group_defaults
                }
                self._check_hyper(values)
                if all(is_constant(value) for value in raw):
                    self._resolved[i] = raw, values
                else:
                    self._resolved.pop(i, None)
            resolved.append(values)
        return resolved

    @staticmethod
    def _check_hyper(values: Mapping[str, Any]) -> None:
        """Refuse combinations of hyper-parameters that have no meaning."""

    def _prepare_plan(self, values: list[dict[str, Any]], steps: int) -> None:
        """Have a plan, with the state arrays it needs, that knows these hyper-parameters."""
        if len(values) == len(self._in_plan) and all(new is old for new, old in zip(values, self._in_plan)):
            return
        kernels = [self._kernel(v) for v in values]
        if kernels != self._kernels:
            state = self._completed(kernels, values)
            assign(self._adoption(self._make_plan(kernels, state, steps, self.seed), kernels, state))
        self._in_plan = []
        for i, group_values in enumerate(values):
            self._plan.set_group(i, group_values)
        self._in_plan = values

    def _specs(self, kernel: Kernel, values: Mapping[str, Any], param: Array) -> dict[str, StateSpec]:
        """The state arrays of a parameter by name."""
        real = reference.compute_dtype(param.dtype)
        specs: dict[str, StateSpec] = {}
        for key in kernel.states:
            dtype = real if key in self._exact_states(values) else self._state_dtype_of(key, real)
            specs[key] = StateSpec(param, dtype, self._initial_state(key, values))
            if dtype in reference.LEAST:
                specs[key + SCALE] = StateSpec(np.empty(-(-param.size // reference.SCALED), np.float32), FLOAT32, 0.0)
        if kernel.averages:
            specs[AVERAGE] = StateSpec(param, real, param)
        return specs

    def _state_dtype_of(self, key: str, real: np.dtype[Any]) -> np.dtype[Any]:
        if self.state_dtype is None:
            return real
        if self.state_dtype == "int8":
            return np.dtype(np.uint8 if key in self._non_negative_states else np.int8)
        return np.dtype(self.state_dtype)

    def _completed(self, kernels: list[Kernel], values: list[dict[str, Any]]) -> dict[str, dict[str, Array]]:
        """The state arrays that the kernels need: those there, and new ones for the others."""
        owners = list(zip(self._names, self._params, self._group_of))
        specs = {name: self._specs(kernels[group], values[group], param) for name, param, group in owners}
        there = {(name, key): array for name, own in self.state.items() for key, array in own.items()}
        wanted = [(name, key, spec) for name, own in specs.items() for key, spec in own.items()]
        missing = [w for w in wanted if w[:2] not in there or there[w[:2]].dtype != w[2].dtype]
        new = self._new_states([(f"{name}.{key}", spec) for name, key, spec in missing])
        there.update(zip([(name, key) for name, key, _ in missing], new))
        completed = {name: {key: there[name, key] for key in own} for name, own in specs.items()}
        if self._allocate_state is not None:
            for array in new:
                array[...] = 0
        for name, key, (param, dtype, fill) in missing:
            axes = reference.memory_axes(param)
            if key in self.state[name]:  # in another type
                as_wanted = in_form_of(specs[name], key, dict(self.state[name]), param, axes, f"state[{name!r}][{key!r}]")
                for k, array in as_wanted.items():
                    completed[name][k][...] = array
            elif dtype in reference.LEAST and np.any(fill):
                full = np.full_like(param, fill, FLOAT32)
                reference.store_state(full, completed[name][key], completed[name][key + SCALE], axes)
            elif np.any(fill):
                completed[name][key][...] = fill
        if self._allocate_state is not None:
            written = [*self._labelled("params", self._params), *state_labels(completed)]
            _arrays.check_overlaps(written)
            if self._plan is not None and self._plan.grads is not None:
                _arrays.check_overlaps(written, self._labelled("grads", self._plan.grads))
        return completed

    def _new_states(self, wanted: list[tuple[str, StateSpec]]) -> list[Array]:
        allocate = self._allocate_state
        if allocate is None:
            return _arrays.zeros_together((spec.like, spec.dtype) for _, spec in wanted)
        arrays = []
        for name, (like, dtype, _) in wanted:
            label = f"allocate_state({name!r})"
            array = _arrays.as_writeable(allocate(name, like.shape, dtype), label, any_dtype=dtype in reference.LEAST)
            _arrays.check_state(array, like.shape, dtype, label)
            in_order = np.shares_memory(reference.in_order(array, reference.memory_axes(like)), array)
            if reference.is_small(array) and array.size and not in_order:
                raise ValueError(f"{label}: expected the order of its parameter in memory, got strides {array.strides}")
            arrays.append(array)
        return arrays

    def _make_plan(self, kernels: list[Kernel], state: dict[str, dict[str, Array]], steps: int, seed: int) -> Any:
        keys = [[(name, key) for key in kernels[group].states] for name, group in zip(self._names, self._group_of)]
        states = [tuple(state[name][key] for name, key in own) for own in keys]
        scales = [tuple(state[name].get(key + SCALE) for name, key in own) for own in keys]
        averages = [state[name].get(AVERAGE) for name in self._names]
        if self.backend == "c":
            names = [kernel.name for kernel in kernels]
            plan = _backends.core.Plan(self._params, states, self._group_of, names, averages, scales, seed)
        else:
            rules = [(type(self)._rule, kernel.states) for kernel in kernels]
            plan = _backends.ReferencePlan(self._params, states, self._group_of, rules, averages, scales, seed)
        plan.steps = steps
        if self._plan is not None and self._plan.grads is not None:
            plan.bind(self._plan.grads)
        return plan

    def _adoption(self, plan: Any, kernels: list[Kernel], state: dict[str, dict[str, Array]]) -> list[Change]:
        """What to assign to have another plan and its state."""
        read_only = MappingProxyType({name: MappingProxyType(own) for name, own in state.items()})
        new = {"_plan": plan, "_kernels": kernels, "_in_plan": [], "state": read_only}
        return [(self.__dict__, key, value) for key, value in new.items()]

    @property
    def steps(self) -> int:
        return int(self._plan.steps)

    # ---- The step ----

    def step(self, grads: Any = None, *, grad_scale: float = 1.0, zero_grads: bool = False) -> StepReport:
        """Update the parameters in place.

        Parameters
        ----------
        grads : same structure as `params`, optional
            Gradients of the parameters' shapes; may be of another of the supported dtypes. Left out after :meth:`bind`.
        grad_scale : float
            Gradients are divided by this first: the loss scale, or the number of accumulated batches.
        zero_grads : bool
            Set the gradients to 0 afterwards, also if the step is skipped.

        Returns
        -------
        StepReport

        Raises
        ------
        NonFiniteGradientError
            If a gradient holds inf or nan and ``nonfinite="raise"``.
        TypeError, ValueError
            If a gradient or hyper-parameter is not what it should be. Nothing has changed then.
        """
        report: StepReport | None = self._plan.repeat(self._lock, self.__dict__, grads, grad_scale, zero_grads, StepReport)
        if report is None:
            with self._lock:
                if self.accumulated:
                    report = self._step_with_sums(grads, grad_scale)
                else:
                    report = self._step(grads, grad_scale, zero_grads)
        return report

    def _step_with_sums(self, grads: Any, grad_scale: float) -> StepReport:
        """A step with the mean of the accumulated gradients."""
        if grads is not None:
            raise ValueError("grads: expected none after accumulate(), got gradients")
        bound = self._plan.grads
        try:
            self._plan.bind(self._sums.params)
            return self._step(None, _hyper.grad_scale(grad_scale, "grad_scale") * self.accumulated, True, self._sums)
        finally:
            self._plan.forget()
            if bound is None:
                self._plan.unbind()
            else:
                self._plan.bind(bound)

    def _step(self, grads: Any, grad_scale: float, zero_grads: bool, used: Any = None) -> StepReport:
        """A step with all there may be to look at."""
        if self._shows_averages:
            raise RuntimeError("step: expected the parameters in their arrays, got their averages (within opt.averaged())")
        grad_scale = _hyper.grad_scale(grad_scale, "grad_scale")
        _hyper.check_choice("nonfinite", self.nonfinite)
        steps = self._plan.steps
        values = self._resolve(self.param_groups, steps)
        clip_norm = _hyper.resolve("clip_norm", self.clip_norm, steps, "clip_norm")
        self._prepare_plan(values, steps)
        if grads is not None:
            self._bind(grads)
        elif self._plan.grads is not None:
            self._bind_arrays(self._plan, self._plan.grads)  # are they still what they were?
        else:
            raise ValueError("grads: expected gradients, got none, and none are bound")
        self._check_writeable(zero_grads)
        applied, grad_norm, clip_factor, bad = self._plan.measure(
            grad_scale=grad_scale,
            clip_norm=clip_norm,
            nonfinite=self.nonfinite,
            num_threads=self.num_threads,
            clear_grads=zero_grads,
        )
        nonfinite = {self._names[i]: count for i, count in bad}
        if not applied and self.nonfinite == "raise":
            raise NonFiniteGradientError(nonfinite)
        report = StepReport(steps + applied, applied, grad_norm, clip_factor, nonfinite)
        if len(self._resolved) == len(self.param_groups) and is_constant(self.clip_norm):
            self._plan.remember(self.param_groups, self.clip_norm, self.nonfinite, self.num_threads)
        self._plan.update(applied, zero_grads, used)  # last of all, so that nothing can go wrong afterwards
        return report

    def accumulate(self, grads: Any = None) -> None:
        """Add gradients to those of earlier calls, for the next :meth:`step` to use their mean.

        The sum is kept in the compute type of each parameter; its division by the number of calls is part of the step, which
        then takes no gradients and starts anew: also if it is skipped, but not if it raises. For a sum in place of the mean,
        ``opt.step(grad_scale=1 / opt.accumulated)``. Averages of equal batches are that of the large batch but for rounding.

        Parameters
        ----------
        grads : same structure as `params`, optional
            As for :meth:`step`. They are not changed.

        Raises
        ------
        TypeError, ValueError
            If a gradient is not what it should be. Nothing has changed then.

        Examples
        --------
        >>> import numpy as np, fusedstep as fs
        >>> w = np.zeros(2)
        >>> opt = fs.SGD(w, lr=1.0)
        >>> for grads in np.array([1.0, 4.0]), np.array([3.0, 0.0]):
        ...     opt.accumulate(grads)
        >>> opt.accumulated
        2
        >>> _ = opt.step()
        >>> w
        array([-2., -2.])
        """
        with self._lock:
            bound = self._plan.grads
            if grads is None and bound is None:
                raise ValueError("grads: expected gradients, got none, and none are bound")
            if self._sums is None:
                self._sums = self._make_sums()
            self._bind_arrays(self._sums, bound if grads is None else self._collected(grads))
            self._plan.forget()
            self._sums.measure(nonfinite="propagate", num_threads=self.num_threads)
            self._sums.update(True, False)

    def _make_sums(self) -> Any:
        dtypes = [reference.compute_dtype(param.dtype) for param in self._params]
        sums = _arrays.zeros_together(zip(self._params, dtypes))
        n = len(sums)
        if self.backend == "c":
            plan = _backends.core.Plan(sums, [()] * n, [0] * n, ["sgd"])
        else:
            plan = _backends.ReferencePlan(sums, [()] * n, [0] * n, [(reference.sgd, ())])
        plan.set_group(0, {"lr": -1.0, "momentum": 0.0, "dampening": 0.0})  # p - -1 * g
        return plan

    @property
    def accumulated(self) -> int:
        """How many gradients :meth:`accumulate` has added up since the last step."""
        return 0 if self._sums is None else int(self._sums.steps)

    def bind(self, grads: Any) -> None:
        """Use these gradient arrays from now on: later calls of :meth:`step` without gradients read what they then hold."""
        with self._lock:
            self._bind(grads)

    def _bind(self, grads: Any) -> None:
        self._bind_arrays(self._plan, self._collected(grads))

    def _collected(self, grads: Any) -> list[Any]:
        """The gradients of a tree that has the structure of the parameters, in their order."""
        if self._is_grouped:
            grads = [grads] if isinstance(grads, Mapping) else list(grads)
            if len(grads) != len(self._structures):
                raise ValueError(f"grads: expected {len(self._structures)} groups, got {len(grads)}")
            parts = [g["params"] if isinstance(g, Mapping) and set(g) == {"params"} else g for g in grads]
        else:
            parts = [grads]
        return [leaf for structure, part in zip(self._structures, parts) for leaf in structure.collect(part)]

    def _bind_arrays(self, plan: Any, grads: list[Any]) -> None:
        bad, near = plan.look_at(grads)
        if bad >= 0:
            # Not plain arrays of the right shapes: find out what they are, or what is wrong with them.
            grads = [_arrays.as_gradient(grad, label) for label, grad in self._labelled("grads", grads)]
            for (label, grad), param in zip(self._labelled("grads", grads), self._params):
                if grad.shape != param.shape:
                    raise ValueError(f"{label}: expected shape {param.shape}, got {grad.shape}")
            _, near = plan.look_at(grads)
        if near:
            written = [*self._labelled("params", self._params), *state_labels(self.state)]
            if plan is self._sums:
                written = self._labelled("accumulated", plan.params)
            _arrays.check_overlaps(written, self._labelled("grads", grads))
        plan.bind(grads)

    def _check_writeable(self, grads_too: bool) -> None:
        moved = self._plan.first_moved()
        if moved >= 0:
            raise ValueError(f"params[{self._names[moved]!r}]: expected the memory and shape it had, got others")
        read_only = self._plan.first_read_only()
        if read_only >= 0:
            raise ValueError(f"params[{self._names[read_only]!r}]: expected a writeable array, got a read-only one")
        for label, grad in self._labelled("grads", self._plan.grads) if grads_too else ():
            if not grad.flags.writeable:
                raise ValueError(f"{label}: expected a writeable array for zero_grads=True, got a read-only one")

    # ---- Averages ----

    @property
    def averages(self) -> dict[str, Array]:
        """The averages of the parameters by name, of those in groups with an `ema_decay`."""
        return {name: own[AVERAGE] for name, own in self.state.items() if AVERAGE in own}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the averages in the parameters' arrays within a ``with`` block, to evaluate or save them; no steps there.

        Parameters of groups without `ema_decay` stay as they are. At the end the parameters are what they were.

        Raises
        ------
        ValueError
            If no group has an `ema_decay`.
        """
        with self._lock:
            pairs = [(p, self.state[n][AVERAGE]) for n, p in zip(self._names, self._params) if AVERAGE in self.state[n]]
            if not pairs:
                raise ValueError("ema_decay: expected a number in some parameter group, got none")
            if self._shows_averages:
                raise RuntimeError("averaged: expected the parameters in their arrays, got their averages")
            self._check_writeable(False)
            self._plan.forget()
            back: list[Change] = [(param, ..., param.copy()) for param, _ in pairs]
            back.append((self.__dict__, "_shows_averages", False))
            assign([(self.__dict__, "_shows_averages", True), *((param, ..., average) for param, average in pairs)])
        try:
            yield
        finally:
            with self._lock:
                assign(back)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of all state arrays, by name of the state."""
        sizes: Counter[str] = Counter()
        for own in self.state.values():
            for key, array in own.items():
                sizes[key] += array.nbytes
        return dict(sizes)

    # ---- Saving and loading ----

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: copies of all state, the step number, the hyper-parameters that are numbers."""
        with self._lock:
            live = self._state_dict()
            return {**live, "state": {name: {k: a.copy() for k, a in own.items()} for name, own in live["state"].items()}}

    def _state_dict(self) -> dict[str, Any]:
        """The same with the state arrays themselves."""
        steps = self._plan.steps
        self._prepare_plan(self._resolve(self.param_groups, steps), steps)  # state that fits edited hyper-parameters
        return {
            "version": STATE_DICT_VERSION,
            "rule": type(self).__name__,
            "convention": self.convention,
            "step": steps,
            "options": {key: value for key in SAVED_OPTIONS if not has_callable(value := getattr(self, key))},
            "state": {name: dict(own) for name, own in self.state.items()},
            "memory_axes": {name: reference.memory_axes(param) for name, param in zip(self._names, self._params)},
            "param_groups": [
                {key: value for key, value in group.items() if key != "params" and not has_callable(value)}
                for group in self.param_groups
            ],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Go on from a :meth:`state_dict`. Matched by name; everything is checked before anything changes.

        Parameters
        ----------
        state_dict : mapping
            Of an optimizer of the same rule and convention. Hyper-parameters that are callables here stay.
        strict : bool
            Whether the names must be the same on both sides; else those on both sides are loaded.

        Raises
        ------
        TypeError, ValueError
            If rule, convention, version, names, shapes or dtypes do not fit. Nothing has changed then.
        """
        with self._lock:
            assign(self._loading(state_dict, strict))

    def _loading(self, state_dict: Mapping[str, Any], strict: bool) -> list[Change]:
        """What to assign to go on from a state dict."""
        label = "state_dict"
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"{label}: expected a mapping, got {type(state_dict).__name__}")
        for key in ("version", "rule", "convention", "step", "options", "state", "param_groups"):
            if key not in state_dict:
                raise ValueError(f"{label}[{key!r}]: expected a value, got none")
        for key, wanted in (
            ("version", STATE_DICT_VERSION), ("rule", type(self).__name__), ("convention", self.convention),
        ):  # fmt: skip
            if state_dict[key] != wanted:
                raise ValueError(f"{label}[{key!r}]: expected {wanted!r}, got {state_dict[key]!r}")
        step = state_dict["step"]
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or not 0 <= step < 2**53:
            raise ValueError(f"{label}['step']: expected a whole number from 0 to 2**53, got {step!r}")
        changes = self._loaded_options(state_dict["options"])
        groups = self._loaded_groups(state_dict["param_groups"], strict)
        values = self._resolve(groups, int(step))
        kernels = [self._kernel(v) for v in values]
        loaded = self._loaded_states(state_dict["state"], state_dict.get("memory_axes", {}), kernels, values, strict)
        state = self._completed(kernels, values)
        seed = state_dict["options"].get("seed", self.seed)
        changes += self._adoption(self._make_plan(kernels, state, int(step), seed), kernels, state)
        changes += [(group, key, new[key]) for group, new in zip(self.param_groups, groups) for key in new]
        return changes + [(state[name][key], ..., array) for name, own in loaded.items() for key, array in own.items()]

    def _loaded_options(self, loaded: Any) -> list[Change]:
        label = "state_dict['options']"
        if not isinstance(loaded, Mapping) or not set(loaded) <= set(SAVED_OPTIONS):
            raise ValueError(f"{label}: expected a mapping with keys among {', '.join(SAVED_OPTIONS)}, got {loaded!r}")
        if "clip_norm" in loaded:
            _hyper.resolve("clip_norm", loaded["clip_norm"], 0, f"{label}['clip_norm']")
        if "seed" in loaded:
            _hyper.check_seed(loaded["seed"], f"{label}['seed']")
        if "nonfinite" in loaded:
            _hyper.check_choice("nonfinite", loaded["nonfinite"], f"{label}['nonfinite']")
        return [(self.__dict__, key, value) for key, value in loaded.items() if not has_callable(getattr(self, key))]

    def _loaded_groups(self, loaded: Any, strict: bool) -> list[dict[str, Any]]:
        """The present groups with the hyper-parameters of the loaded ones."""
        label = "state_dict['param_groups']"
        if not isinstance(loaded, (list, tuple)) or not all(isinstance(group, Mapping) for group in loaded):
            raise TypeError(f"{label}: expected a list of mappings, got {loaded!r}")
        names = [group["names"] for group in self.param_groups]
        loaded_names = [list(group.get("names", ())) for group in loaded]
        if strict and names != loaded_names:
            raise ValueError(f"{label}: expected the names {names}, got {loaded_names}")
        groups = [dict(group) for group in self.param_groups]
        for group, given in zip(groups, loaded):
            for key, value in given.items():
                if key == "names":
                    continue
                if key not in self._group_defaults:
                    raise ValueError(f"{label}: expected hyper-parameters of {type(self).__name__}, got {key!r}")
                if not has_callable(group[key]):
                    group[key] = value
        return groups

    def _loaded_states(
        self, loaded: Any, memory_axes: Any, kernels: list[Kernel], values: list[dict[str, Any]], strict: bool
    ) -> dict[str, dict[str, Array]]:
        """The loaded state arrays, checked, in the types they have here."""
        if not isinstance(memory_axes, Mapping):
            raise TypeError(f"state_dict['memory_axes']: expected a mapping, got {memory_axes!r}")
        if not isinstance(loaded, Mapping) or not all(isinstance(own, Mapping) for own in loaded.values()):
            raise TypeError(f"state_dict['state']: expected a mapping of mappings, got {loaded!r}")
        states: dict[str, dict[str, Array]] = {}
        for name in loaded:
            if strict and name not in self.state:
                raise ValueError(f"state_dict['state'][{name!r}]: expected a parameter's name, got a name that none has")
        for name, param, group in zip(self._names, self._params, self._group_of):
            if name not in loaded:
                if strict:
                    raise ValueError(f"state_dict['state'][{name!r}]: expected state arrays, got none")
                continue
            specs = self._specs(kernels[group], values[group], param)
            own = {k: _arrays.as_array(a, f"state_dict['state'][{name!r}][{k!r}]") for k, a in loaded[name].items()}
            wanted = {key for key in specs if not key.endswith(SCALE)}
            scales = {key + SCALE for key in wanted if key in own and own[key].dtype in reference.LEAST}
            if set(own) != wanted | scales:
                raise ValueError(f"state_dict['state'][{name!r}]: expected {sorted(wanted | scales)}, got {sorted(own)}")
            axes = memory_axes.get(name, reference.memory_axes(param))
            if not isinstance(axes, (list, tuple)) or sorted(axes) != list(range(param.ndim)):
                raise ValueError(f"state_dict['memory_axes'][{name!r}]: expected an order of the axes, got {axes!r}")
            states[name] = {}
            for key in sorted(wanted):
                label = f"state_dict['state'][{name!r}][{key!r}]"
                states[name] |= in_form_of(specs, key, own, param, list(axes), label)
        return states

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"{type(self).__name__} belongs to its arrays and cannot be copied or pickled: use its state_dict()")

    def __repr__(self) -> str:
        groups = "".join(
            f"\n  ({', '.join(f'{k}={v!r}' for k, v in group.items() if k not in ('params', 'names'))}) "
            f"of {len(group['names'])} arrays, {sum(a.size for a in group['params']):,} elements"
            for group in self.param_groups
        )
        return f"<{type(self).__name__} after {self.steps} steps{groups}>"


def in_form_of(
    specs: dict[str, StateSpec], key: str, own: dict[str, Array], param: Array, axes: list[int], label: str
) -> dict[str, Array]:
    """A loaded state, and its scales if it is of 8 bits, as a parameter wants it; from another type to the nearest."""
    array, scales, wanted, here = own[key], own.get(key + SCALE), specs[key].dtype, reference.memory_axes(param)
    real = reference.compute_dtype(param.dtype)
    is_known = reference.is_small(array) or array.dtype == real
    _arrays.check_state(array, param.shape, array.dtype if is_known else wanted, label)
    if scales is not None:
        _arrays.check_state(scales, (-(-param.size // reference.SCALED),), FLOAT32, label + SCALE)
    if array.dtype == wanted and (scales is None or axes == here):
        return {key: array} if scales is None else {key: array, key + SCALE: scales}
    exact = reference.load_state(array, scales, axes, real)
    if wanted not in reference.LEAST:
        return {key: exact.astype(wanted)}
    codes, new_scales = np.empty(param.shape, wanted), np.empty(specs[key + SCALE].like.shape, np.float32)
    reference.store_state(exact, codes, new_scales, here)
    return {key: codes, key + SCALE: new_scales}


def state_labels(state: Mapping[str, Mapping[str, Array]]) -> list[tuple[str, Array]]:
    return [(f"state[{name!r}][{key!r}]", array) for name, own in state.items() for key, array in own.items()]


def is_groups(params: Any) -> bool:
    """Whether `params` is a sequence of groups."""
    return (
        isinstance(params, (list, tuple))
        and len(params) > 0
        and all(isinstance(item, Mapping) and "params" in item for item in params)
    )


def require_bfloat16() -> None:
    try:
        importlib.import_module("ml_dtypes")  # which tells NumPy of the type
    except ImportError as error:
        raise ImportError(f'state_dtype="bfloat16" needs ml_dtypes ({error}): pip install ml_dtypes') from None


def has_callable(value: Any) -> bool:
    return callable(value) or (isinstance(value, (tuple, list)) and any(callable(v) for v in value))


def is_constant(value: Any) -> bool:
    """Whether a hyper-parameter keeps its value as long as it is the same object."""
    if isinstance(value, tuple):
        return all(is_constant(v) for v in value)
    return value is None or isinstance(value, (int, float))
