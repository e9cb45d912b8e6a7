"""What all optimizers share: parameters, groups, state, the step."""

from __future__ import annotations

import functools
import inspect
import operator
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _arrays, _extension, _hyper, reference, saving, state
from ._arrays import Change, assign, assignment
from ._hyper import Hyper
from .errors import NonFiniteGradientError
from .groups import is_groups
from .parameters import Parameters
from .reference import stages, storage
from .reference.plan import ReferencePlan, Rule, keywords, loaded
from .state import AVERAGE, RESIDUALS, Kernel, Need, Operands
from .telemetry import Stats

Array = NDArray[Any]


# Options that plans and state are made by.
FIXED = ("backend", "convention", "state_dtype", "low_precision", "accumulate_dtype", "seed", "stats")


def as_parameters(defaults: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """Options as signatures show them."""
    return {n: inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=value) for n, value in defaults.items()}


OPTIONS = as_parameters(_hyper.OPTION_DEFAULTS)


class Part(NamedTuple):
    """A group of the plan: arrays with the same rule, an optimizer class, and the same hyper-parameters."""

    rule: type[Optimizer]
    hyper: Mapping[str, Any]


class Noting(Mapping[str, Any]):
    """Hyper-parameters that note which of them are looked at."""

    def __init__(self, hyper: Mapping[str, Any]) -> None:
        self.hyper = hyper
        self.noted: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        self.noted[key] = self.hyper[key]
        return self.noted[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.hyper)

    def __len__(self) -> int:
        return len(self.hyper)


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
    stats: Stats | None
    """With ``stats=True``, norms and counts by array; None if the step was skipped."""


class Shown(NamedTuple):
    """What the parameters' arrays hold for a while."""

    what: str
    averages: dict[str, Array]
    """The parameters' own averages meanwhile."""


class Optimizer(ABC):
    """Base of all optimizers: parameters, groups, state, the step.

    Every optimizer takes these keyword options besides its own hyper-parameters. A hyper-parameter is a number or a
    callable ``steps taken so far -> number`` (0 at the first step).

    Parameters
    ----------
    params : array, sequence or mapping of arrays (nested too), or sequence of groups
        Changed in place by :meth:`step`. Writeable arrays of float32, float64, float16 or bfloat16, of any layout, that do
        not share memory. A group is a dict with the key ``"params"`` and any hyper-parameters of its own;
        :func:`fusedstep.group` makes groups by patterns of names.
    weight_decay : float
        Adds ``weight_decay * param`` to the gradient (L2 regularisation).
    decoupled_weight_decay : bool
        Multiply the parameter by ``1 - lr * weight_decay`` before the update instead.
    decay_mode : {None, "coupled", "decoupled", "independent", "decoupled_after"}
        Which of the two, in place of `decoupled_weight_decay`; or multiply by ``1 - weight_decay``, independent of the
        learning rate; or by ``1 - lr * weight_decay`` after the update.
    l1 : float
        Adds ``l1 * sign(param)`` to the gradient.
    maximize : bool
        Follow the gradient up instead of down.
    clip_norm : float, optional
        Scale all gradients by ``min(1, clip_norm / (norm + 1e-6))``, where norm is that of all of them together; without the
        1e-6 in conventions other than "torch".
    clip_norm_per_array : float, optional
        The same with each array's own norm; comes before `clip_norm`.
    clip_adaptive : float, optional
        Then scale the gradient of each unit of a parameter by ``max_norm / max(norm, 1e-6)``, where it has a norm above
        ``max_norm = clip_adaptive * max(norm of the unit, 1e-3)``. What a unit is says `unit_axes`.
    clip_value : float, optional
        Then bound each element to ``[-clip_value, clip_value]``.
    max_norm : float, optional
        After the update, scale each unit of a parameter that has a norm above this by ``max_norm / norm``.
    unit_axes : int or tuple of int, optional
        The axes that count the units, for `clip_adaptive` and `max_norm`: a unit has one index along these, and all along
        the others; with ``()`` it is the whole array. By default it is what leads to one output: of weights in "torch" and
        "thinc", the axis is the first; in other conventions, where inputs come first, it is the last, but of 3 dimensions
        the last two, as in optax. Arrays of at most one dimension are one unit each.
    bounds : pair of float, optional
        Then bound each parameter to ``[lower, upper]``; None in either place for no bound.
    ema_decay : float, optional
        Keep an average of the parameters, ``average += (1 - ema_decay) * (param - average)`` after each update, from their
        present values on, as the state ``average``; see :attr:`averages` and :meth:`averaged`. Where it is 1, averages are
        not touched. ``ema_warmup`` and ``equal_average`` in :mod:`fusedstep.schedules` make averages that forget the start.
        In "keras" the first step copies the parameter.
    state_dtype : {None, "float32", "bfloat16", "int8"}
        What state is kept in, if not in the compute type: "int8" takes a byte for each element, and 4 for the scale of each
        256 neighbours, as two arrays (``exp_avg`` and ``exp_avg_scale``); "bfloat16" two (and needs ml_dtypes). Each step
        computes with exact values and then rounds both at random, up as often as the distance to the value below calls for:
        rounding to the nearest would freeze averages that change by less than a last digit. Averages of parameters and what
        a rule subtracts from one another are not rounded.
    low_precision : {"nearest", "stochastic", "kahan", "split", "master"}
        How float16 and bfloat16 parameters, which are computed in float32, are stored: rounded to the nearest, which loses
        small updates; rounded at random as states are; or with the rest kept as a state: ``compensation`` in the parameter's
        type, which the next step adds ("kahan"); ``remainder``, the 16 bits that make a bfloat16 a float32 ("split");
        ``master``, a float32 copy that steps go on from, with the parameter rounded from it ("master").
    accumulate_dtype : {None, "float32", "bfloat16"}
        What :meth:`accumulate` keeps sums in, if not in the compute type; "bfloat16" is rounded at random, as states are.
    seed : int
        Of what is rounded at random: the same for each seed, step, array and element, with any number of threads.
    stats : bool
        Have reports with norms of gradients, parameters and updates by array; see :class:`Stats`.
    nonfinite : {"raise", "skip", "zero", "propagate"}
        What an inf or nan in a gradient does: raise :class:`NonFiniteGradientError`, leave out the step, count as 0, or go
        on unchecked, which saves reading the gradients once more. In the first two cases nothing changes.
    convention : {"torch", "keras", "optax", "tf", "sklearn", "thinc"}
        Whose equations and defaults to follow; :func:`fusedstep.conventions` has those of each rule.
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
        ``state[name][state name]``; float64 for float64 parameters, else float32, unless `state_dtype` or `low_precision`
        says otherwise. What a rule keeps for a whole array is a float64 of shape ``()``. The arrays may be edited in place.
    steps : int
        Number of steps applied.
    """

    # What a rule's class defines.
    _rule: ClassVar[Callable[..., None]]
    _option_defaults: ClassVar[dict[str, Any]] = {}
    _non_negative_states: ClassVar[tuple[str, ...]] = ()
    _direction: ClassVar[Callable[..., Array] | None] = None
    """Of rules with steps along what is made of the whole array: how it is; kernels have it after their states."""
    _of_all: ClassVar[Callable[..., None] | None] = None
    """Of rules with steps that depend on sums over all arrays: that of one among them, given what makes these sums."""
    _has_others: ClassVar[bool] = False
    """Whether parameters for which `_is_own` is false, like those that are no matrices, are left to `_others`."""
    _deciding: ClassVar[tuple[str, ...]] = ()
    """Hyper-parameters that `_is_own` looks at."""
    _is_scaled: ClassVar[bool] = False
    """Whether steps depend on norms of whole arrays."""
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {"torch": {}}
    """Whose equations there are, with the defaults that are not those of the signature; REQUIRED for those to be given."""
    _lengths: ClassVar[dict[str, int]] = {}  # of the hyper-parameters that are several numbers

    @staticmethod
    @abstractmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the state arrays these hyper-parameters call for, in the order of the rule's arguments."""

    @staticmethod
    def _exact_states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        """Those of them that are never kept in a smaller type."""
        return ()

    _numbers: ClassVar[tuple[str, ...]] = ()
    """Names of the numbers that a rule keeps for each array, likewise after the states."""

    @classmethod
    def _kernel_name(cls, states: tuple[str, ...], hyper: Mapping[str, Any]) -> str:
        """The C kernel for these state arrays."""
        return cls._rule.__name__

    @staticmethod
    def _is_own(param: Array, hyper: Mapping[str, Any], label: str = "param") -> bool:
        return True

    @classmethod
    def _others(cls, hyper: Mapping[str, Any]) -> Part:
        """Rule and hyper-parameters of the others."""
        return Part(cls, hyper)

    @classmethod
    def _parts(cls, values: list[dict[str, Any]]) -> list[Part]:
        """The groups of the plan: of each group, if need be, matrices and others."""
        parts = []
        for hyper in values:
            parts.append(Part(cls, hyper))
            if cls._has_others:
                parts.append(cls._others(hyper))
        return parts

    def _kernel(self, part: Part) -> Kernel:
        """What the parameters of a group of the plan need."""
        rule, hyper = part
        states = rule._states(hyper)
        needs = [Need(name, self._state_type(name, part), rule._initial_state(name, hyper)) for name in states]
        needs += [Need(name, "number", rule._initial_state(name, hyper)) for name in rule._numbers]
        residual = RESIDUALS[self.low_precision]
        if residual is not None:
            needs.append(residual)
        if hyper["ema_decay"] is not None:
            needs.append(Need(AVERAGE, "compute", None))
        name = rule._kernel_name(states, hyper)
        return Kernel(rule, name, states, rule._numbers, tuple(needs), state.has_units(hyper), hyper["unit_axes"])

    def _kernel_at(self, place: int, part: Part) -> Kernel:
        """The same for this place in the plan: that of last time, unless something that decides on it has changed."""
        kernel, decisive = self._kernel_by.get(place, (None, {}))
        if kernel is None or kernel.rule is not part.rule or not decisive.items() <= part.hyper.items():
            hyper = Noting(part.hyper)
            kernel = self._kernel(Part(part.rule, hyper))
            self._kernel_by[place] = kernel, hyper.noted
        return kernel

    def _state_type(self, name: str, part: Part) -> str:
        if self.state_dtype is None or name in part.rule._exact_states(part.hyper):
            return "compute"
        if self.state_dtype == "int8":
            return "uint8" if name in part.rule._non_negative_states else "int8"
        return self.state_dtype

    @staticmethod
    def _initial_state(name: str, hyper: Mapping[str, Any]) -> float | None:
        """What a state array is filled with at first, None for the parameter's values; or what a number is."""
        return 0.0

    @classmethod
    def _average(cls, param: Array, own: Mapping[str, Array], hyper: Mapping[str, Any]) -> Array | None:
        """The average that is a rule's result, in the compute type as `param` is, if that is not the parameter itself."""
        return None

    def __init_subclass__(cls) -> None:
        signature = inspect.signature(cls.__init__)
        if "__init__" in cls.__dict__:
            cls.__init__ = with_defaults_of_convention(cls.__init__, signature)  # type: ignore[method-assign]
        # Show the common options in help() and in editors.
        own = [p for p in signature.parameters.values() if p.name not in ("self", "options")]
        cls._lengths = cls._lengths | {p.name: len(p.default) for p in own if isinstance(p.default, tuple)}
        options = OPTIONS | as_parameters(cls._option_defaults)
        cls.__signature__ = inspect.Signature([*own, *options.values()])  # type: ignore[attr-defined]

    def __init__(self, params: Any, hyper: dict[str, Any], options: _hyper.Options) -> None:
        known = _hyper.OPTION_DEFAULTS | self._option_defaults
        for name in options:
            if name not in known:
                raise TypeError(f"{type(self).__name__}: unknown option {name!r}; it has {', '.join([*hyper, *known])}")
        defaults = {**hyper, **known, **options}
        for name in _hyper.CHOICES:
            _hyper.choice(name, defaults[name])
        self._check_convention(defaults["convention"])
        if defaults["num_threads"] is not None:
            _hyper.check_num_threads(defaults["num_threads"])
        self.nonfinite: str = defaults["nonfinite"]
        self.convention: str = defaults["convention"]
        self.backend: str = defaults["backend"]
        self.num_threads: int | None = defaults["num_threads"]
        self.clip_norm: Hyper | None = defaults["clip_norm"]
        self.seed = _hyper.seed(defaults["seed"])
        self.stats: bool = _hyper.boolean(defaults["stats"], "stats")
        self.low_precision: str = defaults["low_precision"]
        self.state_dtype: str | None = defaults["state_dtype"]
        self.accumulate_dtype: str | None = defaults["accumulate_dtype"]
        if "bfloat16" in (self.state_dtype, self.accumulate_dtype):
            state.require_bfloat16()
        self._allocate_state: Callable[[str, tuple[int, ...], Any], Any] | None = defaults["allocate_state"]
        if self._allocate_state is not None and not callable(self._allocate_state):
            raise TypeError(f"allocate_state: expected a callable or None, got {self._allocate_state!r}")
        if self.backend == "c":
            _extension.require_core()

        self._group_defaults = {k: v for k, v in defaults.items() if k not in _hyper.GLOBAL_OPTIONS}
        self._group_keys = {"params", "names", *self._group_defaults}
        given = [{k: v for k, v in group.items() if k != "params"} for group in params] if is_groups(params) else [{}]
        for i, own in enumerate(given):
            self._refuse_unknown(own, f"param_groups[{i}]")
        self._params = Parameters(params)
        self.param_groups: list[dict[str, Any]] = [
            {"params": arrays.copy(), "names": names.copy(), **self._group_defaults, **own}
            for (names, arrays), own in zip(self._params.groups, given)
        ]
        self._spec = self._params.spec
        names, arrays = self._params.names, self._params.arrays
        self._stats_of = {name: i for i, name in enumerate(names)}, [array.size for array in arrays]
        for label, array in self._params.labelled("params"):
            if self.low_precision == "split" and array.dtype == np.float16:
                raise TypeError(f'{label}: expected bfloat16 for low_precision="split", which halves a float32, got float16')
        _hyper.resolve("clip_norm", self.clip_norm, 0, "clip_norm")

        self.state: Mapping[str, Mapping[str, Array]] = {name: {} for name in names}
        self._lock = _extension.make_lock()
        # By group: its hyper-parameters as given, and checked, and which of them to look at anew for each step.
        self._resolved: dict[int, tuple[list[Any], dict[str, Any], list[str]]] = {}
        self._in_plan: list[dict[str, Any]] = []  # those the plan has
        self._scheduled: list[list[str]] = []  # by group: which the plan is to be told before each step
        self._kernels: list[Kernel] = []
        self._kernel_by: dict[int, tuple[Kernel, dict[str, Any]]] = {}  # by place, with the hyper-parameters that decided
        self._part_of: list[int] = []
        self._plan: Any = None
        self._shown: Shown | None = None  # what the parameters' arrays hold for a while in place of the parameters
        self._sums: Any = None  # the plan that adds up gradients, in its params
        self._sums_scale = 1.0  # what the last step with them divided their mean by
        self._prepare_plan(self._resolve(self.param_groups, 0), 0)

    def _refuse_unknown(self, keys: Iterable[str], label: str) -> None:
        for key in keys:
            if key not in self._group_defaults:
                raise TypeError(f"{label}: unknown key {key!r}; a group has params, {', '.join(self._group_defaults)}")

    def _check_keys(self, group: Mapping[str, Any], label: str) -> None:
        """That a group has the keys it had at first."""
        if group.keys() == self._group_keys:
            return
        self._refuse_unknown([key for key in group if key not in ("params", "names")], label)
        raise ValueError(f"{label}[{min(self._group_keys - group.keys())!r}]: expected a value, got none")

    # ---- Hyper-parameters and plan ----

    def _resolve(self, groups: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """The values of each group's hyper-parameters at this step, checked: those of last time if none has changed."""
        n_groups = len(self._params.groups)
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise TypeError(f"param_groups: expected a list of dicts, got {groups!r}")
        if len(groups) != n_groups:
            raise ValueError(
                f"param_groups: expected {n_groups} as at first, got {len(groups)}: for other parameters make "
                "another optimizer"
            )
        resolved = []
        for i, group in enumerate(groups):
            self._check_keys(group, f"param_groups[{i}]")
            raw = [group[key] for key in self._group_defaults]
            known = self._resolved.get(i)
            if known is None or not all(map(operator.is_, raw, known[0])):
                values = self._with({"convention": self.convention}, i, group, self._group_defaults, step)
                self._resolved[i] = raw, values, [key for key in self._group_defaults if not is_constant(group[key])]
            else:
                _, values, keys = known
                values = self._with(values, i, group, keys, step)
            resolved.append(values)
        return resolved

    def _with(
        self, values: dict[str, Any], i: int, group: Mapping[str, Any], keys: Collection[str], step: int
    ) -> dict[str, Any]:
        """Hyper-parameters with those of a group at this step for some of them, checked."""
        if not keys:
            return values
        label = f"param_groups[{i}]." if self._params.is_grouped else ""
        now = {key: _hyper.resolve(key, group[key], step, label + key, self._lengths.get(key)) for key in keys}
        values = values | now
        _hyper.check_known(values)
        self._check_hyper(values)
        return values

    def _follow_schedules(self) -> bool:
        """Have the plan know the hyper-parameters of this step, if only schedules change what it was told to `remember`.

        Returns whether it still is the same plan.
        """
        plan = self._plan
        groups = enumerate(zip(self._in_plan, self.param_groups, self._scheduled))
        values = [self._with(before, i, group, keys, plan.steps) for i, (before, group, keys) in groups]
        self._prepare_plan(values, plan.steps)
        return self._plan is plan

    @classmethod
    def _check_convention(cls, convention: str) -> None:
        if convention not in cls._conventions:
            known = ", ".join(map(repr, cls._conventions))
            raise ValueError(f"convention: expected one of {known} for {cls.__name__}, got {convention!r}")

    @staticmethod  # noqa: B027 - most rules have nothing to refuse
    def _check_hyper(values: Mapping[str, Any]) -> None:
        """Refuse combinations of hyper-parameters that have no meaning."""

    def _places(self, values: list[dict[str, Any]]) -> list[int]:
        """Of each parameter, the place of its group among those of the plan."""
        if not self._has_others:
            return self._params.group_of
        decisive, before = ([[hyper[key] for key in self._deciding] for hyper in own] for own in (values, self._in_plan))
        if decisive == before:
            return self._part_of
        params = zip(self._params.labelled("params"), self._params.group_of)
        return [2 * i + (not self._is_own(param, values[i], label)) for (label, param), i in params]

    def _prepare_plan(self, values: list[dict[str, Any]], steps: int) -> None:
        """Have a plan, with the state arrays it needs, that knows these hyper-parameters."""
        if len(values) == len(self._in_plan) and all(map(operator.is_, values, self._in_plan)):
            return
        parts = self._parts(values)
        kernels, part_of = list(map(self._kernel_at, range(len(parts)), parts)), self._places(values)
        if kernels != self._kernels or part_of != self._part_of:
            owned = self._completed(self._specs(kernels, part_of))
            assign(self._adoption(self._make_plan(kernels, part_of, owned, steps, self.seed), kernels, part_of, owned))
        before = self._in_plan.copy() or [{}] * len(values)
        self._in_plan.clear()
        per_group = len(parts) // len(values)
        for i, part in enumerate(parts):
            if values[i // per_group] is not before[i // per_group]:
                self._plan.set_group(i, part.hyper)
        self._in_plan.extend(values)

    def _axes(self, param: Array) -> list[int]:
        """The order in which small states and residuals have the elements of a parameter, and statistics add them up."""
        return list(range(param.ndim)) if self._in_c_order else _arrays.memory_axes(param)

    @property
    def _in_c_order(self) -> bool:
        return self.stats or self._is_scaled

    def _specs(self, kernels: list[Kernel], part_of: list[int]) -> dict[str, dict[str, state.Spec]]:
        """The state arrays of each parameter by name."""
        owners = zip(self._params.names, self._params.arrays, part_of)
        return {name: state.specs_of(kernels[part], param, self._axes(param)) for name, param, part in owners}

    def _completed(self, specs: dict[str, dict[str, state.Spec]]) -> dict[str, dict[str, Array]]:
        """The state arrays that are called for: those there, and new ones for the others."""
        completed = state.completed(specs, self.state, self._allocate_state)
        if self._allocate_state is not None:
            written = [*self._params.labelled("params"), *state.labels(completed)]
            _arrays.check_overlaps(written)
            if self._plan is not None and self._plan.grads is not None:
                _arrays.check_overlaps(written, self._params.labelled("grads", self._plan.grads))
        return completed

    def _make_plan(self, kernels: list[Kernel], part_of: list[int], owned: state.State, steps: int, seed: int) -> Any:
        operands = [
            state.operands_of(
                kernels[part], owned[name], param, self.low_precision, self._unit_axes(kernels[part], group, param, name)
            )
            for name, param, group, part in zip(self._params.names, self._params.arrays, self._params.group_of, part_of)
        ]
        if self.backend == "c":
            for i, (param, part) in enumerate(zip(self._params.arrays, part_of)):
                if kernels[part].rule._direction is not None:
                    direction = np.empty(param.shape, storage.compute_dtype(param.dtype))
                    operands[i] = operands[i].and_state(direction)
            rules: list[Any] = [kernel.name for kernel in kernels]
            plan = _extension.core.Plan(self._params.arrays, operands, part_of, rules, seed, self.stats)
        else:
            rules = [Rule(kernel.rule._rule, kernel.states + kernel.numbers, kernel.rule._of_all) for kernel in kernels]
            plan = ReferencePlan(self._params.arrays, operands, part_of, rules, seed, self.stats, self._in_c_order)
        plan.steps = steps
        if self._plan is not None and self._plan.grads is not None:
            plan.bind(self._plan.grads)
        return plan

    def _unit_axes(self, kernel: Kernel, group: int, param: Array, name: str) -> tuple[int, ...] | None:
        """The axes that count the units of a parameter; None if their norms do not matter."""
        if not kernel.has_units:
            return None
        label = f"param_groups[{group}].unit_axes" if self._params.is_grouped else "unit_axes"
        return stages.axes_of_units(param.shape, kernel.unit_axes, self.convention, label, name)

    def _adoption(
        self, plan: Any, kernels: list[Kernel], part_of: list[int], owned: dict[str, dict[str, Array]]
    ) -> list[Change]:
        """What to assign to have another plan and its state."""
        read_only = MappingProxyType({name: MappingProxyType(own) for name, own in owned.items()})
        new = {"_plan": plan, "_kernels": kernels, "_part_of": part_of, "_in_plan": [], "state": read_only}
        return [(self.__dict__, key, value) for key, value in new.items()]

    @property
    def steps(self) -> int:
        """Number of steps applied."""
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
            Set the gradients to 0 afterwards, also if the step is skipped; but not those that :meth:`accumulate` was given.

        Returns
        -------
        StepReport

        Raises
        ------
        NonFiniteGradientError
            If a gradient holds inf or nan and ``nonfinite="raise"``.
        TypeError, ValueError
            If a gradient or hyper-parameter is not what it should be. Nothing has changed then.

        Examples
        --------
        >>> import numpy as np, fusedstep as fs
        >>> w = np.zeros(2)
        >>> opt = fs.SGD(w, lr=1.0)
        >>> report = opt.step(np.array([3.0, 4.0]))
        >>> w, report.step, report.grad_norm
        (array([-3., -4.]), 1, 5.0)
        """
        report: StepReport | None = self._plan.repeat(self._lock, self, grads, grad_scale, zero_grads, StepReport)
        if report is None:
            _hyper.boolean(zero_grads, "zero_grads")
            with self._lock:
                if self.accumulated:
                    report = self._step_with_sums(grads, grad_scale)
                else:
                    report = self._step(grads, grad_scale, zero_grads)
        return report

    def _step_with_sums(self, grads: Any, grad_scale: float) -> StepReport:
        """A step with the mean of the accumulated gradients."""
        if grads is not None:
            raise ValueError(
                "grads: expected none after accumulate(), got gradients: add them with accumulate(), or reset_accumulated()"
            )
        bound = self._plan.grads
        try:
            self._plan.bind(self._sums.params)
            self._sums_scale = _hyper.grad_scale(grad_scale, "grad_scale")
            return self._step(None, self._sums_scale * self.accumulated, True, self._sums)
        finally:
            self._plan.forget()
            if bound is None:
                self._plan.unbind()
            else:
                self._plan.bind(bound)

    def _step(self, grads: Any, grad_scale: float, zero_grads: bool, used: Any = None) -> StepReport:
        """A step with all there may be to look at."""
        self._check_not_shown("step")
        grad_scale = _hyper.grad_scale(grad_scale, "grad_scale")
        _hyper.choice("nonfinite", self.nonfinite)
        if self.num_threads is not None:
            _hyper.check_num_threads(self.num_threads)
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
            clip_eps=1e-6 if self.convention == "torch" else 0.0,
            nonfinite=self.nonfinite,
            num_threads=self.num_threads,
            clear_grads=zero_grads,
            sums=used,
        )
        nonfinite = {self._params.names[i]: count for i, count in bad}
        if not applied and self.nonfinite == "raise":
            raise NonFiniteGradientError(nonfinite)
        stats = self._new_stats() if applied else None
        report = StepReport(steps + applied, applied, grad_norm, clip_factor, nonfinite, stats)
        if is_constant(self.clip_norm) and self._direction is None:
            self._scheduled = [keys for _, _, keys in self._resolved.values()]
            self._plan.remember(self.param_groups, self.clip_norm, self.nonfinite, self.num_threads, any(self._scheduled))
        rows = None if stats is None else stats.rows
        if applied and self._direction is not None and self.backend == "c":
            self._make_directions(grad_scale)
        self._plan.update(applied, zero_grads, used, rows)  # last of all, so that nothing can go wrong afterwards
        return report

    def _new_stats(self) -> Stats | None:
        """Statistics for a step to fill in, if there are to be any."""
        return Stats(*self._stats_of) if self.stats else None

    def _make_directions(self, grad_scale: float) -> None:
        """Have kernels with steps along what is made of whole arrays find that, made of the measured gradients."""
        parts = self._parts(self._in_plan)
        for i, (param, place) in enumerate(zip(self._params.arrays, self._part_of)):
            rule, hyper = parts[place]
            if rule._direction is None:
                continue
            operands = self._plan.operands[i]
            exact, (*states, _) = loaded(param, operands, self._axes(param))
            own = {key: value for key, value in hyper.items() if key in keywords(rule._direction)}
            own |= {"grad_scale": grad_scale, "zero_nonfinite": self.nonfinite == "zero"}
            own |= {"clip_factor": self._plan.clip_factor(i), "unit_axes": operands.unit_axes}
            own["step"] = self._plan.steps + 1
            operands.states[-1][...] = rule._direction(exact, self._plan.grads[i], *states, **own)

    def accumulate(self, grads: Any = None) -> None:
        """Add gradients to those of earlier calls, for the next :meth:`step` to use their mean.

        The sum is kept in the compute type of each parameter, or in `accumulate_dtype`; its division by the number of calls
        is part of the step, which then takes no gradients and starts anew: also if it is skipped, but not if it raises; then
        :meth:`reset_accumulated` does. For a sum in place of the mean, ``opt.step(grad_scale=1 / opt.accumulated)``. Sums
        are no part of the state dict, and loading one forgets them: save between steps.

        Where the step will need the norm of this mean, its squares are added up on the way, so that the step reads the sums
        only once; again for arrays that are not in C order, and where `grad_scale` is another than at the last such step.

        Averages of equal batches are that of the large batch but for the rounding of each sum, by at most half a last digit.
        Sums in "bfloat16" are off by up to a whole one, 1/128 of them, but up or down with a probability that makes their
        expectation exact; rounded to the nearest they would lose whatever is less than half a digit.

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
            if self.num_threads is not None:
                _hyper.check_num_threads(self.num_threads)
            bound = self._plan.grads
            if grads is None and bound is None:
                raise ValueError("grads: expected gradients, got none, and none are bound")
            if self._sums is None:
                self._sums = self._make_sums()
            self._bind_arrays(self._sums, bound if grads is None else self._params.collected(grads))
            self._plan.forget()
            self._sums.seed = (self.seed - 1 - self._plan.steps) % 2**64  # other bits in each step, and than the step's own
            measures = self.nonfinite != "propagate" or self.clip_norm is not None or self.stats
            divisor = self._sums_scale * (self.accumulated + 1) if measures else 0.0
            self._sums.measure(nonfinite="propagate", num_threads=self.num_threads, squares_divisor=divisor)
            self._sums.update(True, False)

    def _make_sums(self) -> Any:
        dtype = self.accumulate_dtype
        sums = _arrays.zeros_together(
            (param, _arrays.memory_axes(param), np.dtype(dtype or storage.compute_dtype(param.dtype)))
            for param in self._params.arrays
        )
        operands = [Operands(low_precision="stochastic" if dtype == "bfloat16" else "nearest")] * len(sums)
        if self.backend == "c":
            plan = _extension.core.Plan(sums, operands, [0] * len(sums), ["sgd"])
        else:
            plan = ReferencePlan(sums, operands, [0] * len(sums), [Rule(reference.sgd, ())])
        plan.set_group(0, {"lr": -1.0, "momentum": 0.0, "dampening": 0.0})  # p - -1 * g
        return plan

    @property
    def accumulated(self) -> int:
        """How many gradients :meth:`accumulate` has added up since the last step."""
        return 0 if self._sums is None else int(self._sums.steps)

    def reset_accumulated(self) -> None:
        """Forget the gradients added up so far, for example after one that was not finite.

        Examples
        --------
        >>> import numpy as np, fusedstep as fs
        >>> opt = fs.SGD(np.zeros(2), lr=1.0)
        >>> opt.accumulate(np.array([1.0, np.inf]))
        >>> opt.reset_accumulated()
        >>> opt.accumulated
        0
        """
        with self._lock:
            self._sums = None

    def bind(self, grads: Any) -> None:
        """Use these gradient arrays from now on: later calls of :meth:`step` without gradients read what they then hold.

        A step keeps the arrays it was given until it is given others, and so does this.

        Parameters
        ----------
        grads : same structure as `params`, or None
            As for :meth:`step`; None lets go of those there are.

        Raises
        ------
        TypeError, ValueError
            If a gradient is not what it should be. Nothing has changed then.

        Examples
        --------
        >>> import numpy as np, fusedstep as fs
        >>> w, g = np.zeros(2), np.zeros(2)
        >>> opt = fs.SGD(w, lr=1.0)
        >>> opt.bind(g)
        >>> g[:] = [1.0, 2.0]
        >>> opt.step().step
        1
        >>> w
        array([-1., -2.])
        """
        with self._lock:
            if grads is None:
                self._plan.forget()
                self._plan.unbind()
            else:
                self._bind(grads)

    def _bind(self, grads: Any) -> None:
        self._bind_arrays(self._plan, self._params.collected(grads))

    def _bind_arrays(self, plan: Any, grads: list[Any]) -> None:
        bad, near = plan.look_at(grads)
        if bad >= 0:
            grads = self._params.as_gradients(grads)  # not plain arrays of the right shapes
            _, near = plan.look_at(grads)
        if near:
            written = [*self._params.labelled("params"), *state.labels(self.state)]
            if plan is self._sums:
                written = self._params.labelled("accumulated", plan.params)
            _arrays.check_overlaps(written, self._params.labelled("grads", grads))
        plan.bind(grads)

    def _check_writeable(self, grads_too: bool) -> None:
        moved = self._plan.first_moved()
        if moved >= 0:
            raise ValueError(f"params[{self._params.names[moved]!r}]: expected the memory and shape it had, got others")
        read_only = self._plan.first_read_only()
        if read_only >= 0:
            raise ValueError(f"params[{self._params.names[read_only]!r}]: expected a writeable array, got a read-only one")
        for label, array in state.labels(self.state):
            if not array.flags.writeable:
                raise ValueError(f"{label}: expected a writeable array, got a read-only one")
        for label, grad in self._params.labelled("grads", self._plan.grads) if grads_too else ():
            if not grad.flags.writeable:
                raise ValueError(f"{label}: expected a writeable array for zero_grads=True, got a read-only one")

    # ---- Averages ----

    @property
    def averages(self) -> dict[str, Array]:
        """The averages of the parameters by name: of those in groups with an `ema_decay`, else those a rule makes itself."""
        with self._lock:
            return self._averages()

    def _averages(self) -> dict[str, Array]:
        if self._shown is not None:
            return dict(self._shown.averages)
        values = self._resolve(self.param_groups, self._plan.steps)
        found = {}
        for name, param, group in zip(self._params.names, self._params.arrays, self._params.group_of):
            own = self.state[name]
            average = own.get(AVERAGE)
            if average is None:
                average = self._average(state.exact(param, own, self.low_precision), own, values[group])
            if average is not None:
                found[name] = average
        return found

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the averages in the parameters' arrays within a ``with`` block, to evaluate or save them; no steps there.

        Parameters that have none, in groups without `ema_decay`, stay as they are. At the end all are what they were.

        Raises
        ------
        ValueError
            If none has an average.

        Examples
        --------
        >>> import numpy as np, fusedstep as fs
        >>> w = np.zeros(1)
        >>> opt = fs.SGD(w, lr=1.0, ema_decay=0.5)
        >>> _ = opt.step(np.ones(1))
        >>> with opt.averaged():
        ...     print(w)
        [-0.5]
        >>> w
        array([-1.])
        """
        restore = None
        try:
            with self._lock:
                averages = self._averages()
                pairs = [(param, averages[name]) for name, param in self._params.items() if name in averages]
                if not pairs:
                    raise ValueError("ema_decay: expected a number in some parameter group, got none")
                show, restore = self._showing("their averages (within opt.averaged())", pairs)
                show()
            yield
        finally:
            if restore is not None and self._shown is not None:
                restore()  # at once: an interrupt can come when a lock is taken

    def _showing(self, what: str, values: list[tuple[Array, Array]]) -> tuple[Callable[[], None], Callable[[], None]]:
        """Two functions: to have other values in parameters' arrays, and what they held before. No steps in between."""
        self._check_not_shown("params")
        self._check_writeable(False)
        self._plan.forget()
        back: list[Change] = [(param, ..., param.copy()) for param, _ in values]
        shown = Shown(what, self._averages())
        show = assignment([(self.__dict__, "_shown", shown), *((param, ..., value) for param, value in values)])
        return show, assignment([*back, (self.__dict__, "_shown", None)])

    def _check_not_shown(self, label: str) -> None:
        if self._shown is not None:
            raise RuntimeError(f"{label}: expected the parameters in their arrays, got {self._shown.what}")

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of all state arrays, by name of the state; and, once there are any, of sums of gradients: "accumulated"."""
        sizes: Counter[str] = Counter()
        for own in self.state.values():
            for key, array in own.items():
                sizes[key] += array.nbytes
        if self._sums is not None:
            sizes["accumulated"] = sum(array.nbytes for array in self._sums.params)
        return dict(sizes)

    # ---- Saving and loading ----

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: copies of all state, the step number, the hyper-parameters that are numbers.

        Examples
        --------
        >>> import numpy as np, fusedstep as fs
        >>> opt = fs.SGD({"w": np.zeros(2)}, lr=1.0, momentum=0.5)
        >>> _ = opt.step({"w": np.ones(2)})
        >>> opt.state_dict()["state"]
        {'w': {'momentum_buffer': array([1., 1.])}}
        """
        with self._lock:
            live = saving.live_state_dict(self)
            return {**live, "state": {name: {k: a.copy() for k, a in own.items()} for name, own in live["state"].items()}}

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

        Examples
        --------
        >>> import numpy as np, fusedstep as fs
        >>> opt = fs.SGD({"w": np.zeros(2)}, lr=1.0, momentum=0.5)
        >>> _ = opt.step({"w": np.ones(2)})
        >>> other = fs.SGD({"w": np.zeros(2)}, lr=1.0, momentum=0.5)
        >>> other.load_state_dict(opt.state_dict())
        >>> other.steps, other.state["w"]["momentum_buffer"]
        (1, array([1., 1.]))
        """
        with self._lock:
            assign(saving.loading(self, state_dict, strict))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and name in self.__dict__:
            raise AttributeError(f"{name}: cannot be changed any more: make another optimizer and load the state dict")
        if name in self.__dict__.get("_group_defaults", ()):
            raise AttributeError(f"{name}: expected to be set for a group: opt.param_groups[0][{name!r}]")
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"{type(self).__name__} belongs to its arrays and cannot be copied or pickled: use its state_dict()")

    def __repr__(self) -> str:
        groups = "".join(
            f"\n  ({', '.join(f'{k}={v!r}' for k, v in group.items() if k not in ('params', 'names'))}) "
            f"of {len(group['names'])} arrays, {sum(a.size for a in group['params']):,} elements"
            for group in self.param_groups
        )
        return f"<{type(self).__name__} after {self.steps} steps{groups}>"


REQUIRED = "to be given"


def with_defaults_of_convention(init: Any, signature: inspect.Signature) -> Any:
    """An optimizer's ``__init__`` for which arguments left out have the defaults of its convention."""
    kinds = [(name, p.kind) for name, p in signature.parameters.items()]
    unnamed = [name for name, kind in kinds if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][1:]  # without self
    takes_any = any(kind is inspect.Parameter.VAR_POSITIONAL for _, kind in kinds)

    @functools.wraps(init)
    def wrapped(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(unnamed) and not takes_any:
            raise TypeError(
                f"{type(self).__name__}: expected all but {' and '.join(unnamed)} by name, got {len(args)} without"
            )
        own = self._conventions.get(_hyper.choice("convention", kwargs.get("convention", "torch")))
        if own:
            given = {*signature.bind(self, *args, **kwargs).arguments, *kwargs}
            missing = {name: value for name, value in own.items() if name not in given}
            for name, value in missing.items():
                if value is REQUIRED:
                    raise TypeError(
                        f"{name}: expected a number, got none: convention={kwargs['convention']!r} has no default"
                    )
            kwargs |= missing
        init(self, *args, **kwargs)

    return wrapped


def is_constant(value: Any) -> bool:
    """Whether a hyper-parameter keeps its value as long as it is the same object."""
    if isinstance(value, tuple):
        return all(is_constant(v) for v in value)
    return value is None or isinstance(value, (int, float, str))
