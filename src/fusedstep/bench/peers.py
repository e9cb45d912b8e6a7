"""Who else makes such a step. Each way is made by a function of the work and copies of parameters and gradients."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _extension, _threads, clipping, database
from ..state import Operands
from .works import Work

Array = NDArray[Any]


class Way(NamedTuple):
    """A way to make a step."""

    step: Callable[[], object]
    params: Callable[[], list[Array]]
    """The parameters as they are now."""


Maker = Callable[[Work, list[Array], list[Array]], "Way | None"]
"""Makes a way; None where the peer has none for this work."""

IN_PYTHON_UP_TO = 10_000_000
"""Elements; beyond that, plain NumPy takes seconds for a step."""


def fusedstep(work: Work, params: list[Array], grads: list[Array], backend: str = "c") -> Way:
    optimizer, settings = database.TRAIN[work.rule]
    # Peers do not look for inf and nan either.
    opt = optimizer(params, **settings, nonfinite="propagate", clip_norm=work.clip_norm, backend=backend)
    return Way(functools.partial(opt.step, grads), lambda: params)


def reference(work: Work, params: list[Array], grads: list[Array]) -> Way | None:
    return fusedstep(work, params, grads, "reference") if work.n_elements <= IN_PYTHON_UP_TO else None


def roofline(work: Work, params: list[Array], grads: list[Array]) -> Way | None:
    """Reads as many arrays first as are read before a step, for one norm; then reads and writes as many, with one addition
    each."""
    states = [tuple(np.zeros_like(param) for _ in range(work.n_states)) for param in params]
    operands = [Operands(own) for own in states]
    plan = _extension.require_core().Plan(params, operands, [0] * len(params), [f"roofline{work.n_states}"])
    plan.bind(grads)
    plan.set_group(0, {"lr": 0.0})
    plan.measure(nonfinite="propagate")
    alike = [grads, *([grads] if work.clip_norm is not None else []), params, *zip(*states)]
    first = clipping.Gradients([array for arrays in alike[: work.n_read_first] for array in arrays], writeable=False)

    def read_and_step() -> None:
        first.plan.measure()
        plan.update(True, False)

    return Way(read_and_step if work.n_read_first > 0 else lambda: plan.update(True, False), lambda: params)


def torch(work: Work, params: list[Array], grads: list[Array], **how: bool) -> Way | None:
    torch = importlib.import_module("torch")
    made = [torch.from_numpy(param) for param in params]
    for tensor, grad in zip(made, grads):
        tensor.grad = torch.from_numpy(grad)
    optimizer, settings = database.TRAIN[work.rule]
    known = ("SGD", "Adagrad", "Adam", "AdamW") if "fused" in how else dir(torch.optim)
    if optimizer.__name__ not in known:
        return None
    opt = getattr(torch.optim, optimizer.__name__)(made, **settings, **how)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(made, work.clip_norm, foreach=True)
        opt.step()

    return Way(opt.step if work.clip_norm is None else clip_and_step, lambda: params)


def torch_fused(work: Work, params: list[Array], grads: list[Array]) -> Way | None:
    return torch(work, params, grads, fused=True)


def torch_foreach(work: Work, params: list[Array], grads: list[Array]) -> Way | None:
    return torch(work, params, grads, foreach=True)


def optax(work: Work, params: list[Array], grads: list[Array]) -> Way | None:
    """Compiled, and given its old arrays to reuse."""
    if work.threads is not None:
        return None  # XLA's number of threads is fixed when it starts
    jax, optax = importlib.import_module("jax"), importlib.import_module("optax")
    jax.config.update("jax_enable_x64", True)
    s = work.settings
    rules: dict[str, Callable[[], Any]] = {
        "sgd": lambda: optax.sgd(s["lr"]),
        "momentum": lambda: optax.sgd(s["lr"], momentum=s["momentum"]),
        "nesterov": lambda: optax.sgd(s["lr"], momentum=s["momentum"], nesterov=True),
        "rmsprop": lambda: optax.rmsprop(s["lr"], decay=s["alpha"], eps=s["eps"], eps_in_sqrt=False),
        "adam": lambda: optax.adam(s["lr"], *s["betas"], eps=s["eps"]),
        "adamw": lambda: optax.adamw(s["lr"], *s["betas"], eps=s["eps"], weight_decay=s["weight_decay"]),
    }
    if work.rule not in rules:
        return None
    rule = rules[work.rule]()
    opt = rule if work.clip_norm is None else optax.chain(optax.clip_by_global_norm(work.clip_norm), rule)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    on_device = [jax.numpy.array(grad) for grad in grads]
    now = [jax.numpy.array(param) for param in params]
    held = [now, opt.init(now)]

    def step() -> None:
        held[:] = update(*held, on_device)
        jax.block_until_ready(held)

    return Way(step, lambda: [np.asarray(param) for param in held[0]])


def numba(work: Work, params: list[Array], grads: list[Array]) -> Way | None:
    """Loops as one would write them by hand, parallel and with fastmath."""
    loop = loops().get(work.rule)
    if loop is None or work.clip_norm is not None:
        return None
    s, real = work.settings, np.dtype(work.dtype).type
    flat = [(param.reshape(-1), grad.reshape(-1)) for param, grad in zip(params, grads)]
    states = [[np.zeros_like(param) for _ in range(work.n_states)] for param, _ in flat]
    steps = itertools.count(1)

    def coefs(t: int) -> tuple[float, ...]:
        if work.rule == "momentum":
            return s["lr"], s["momentum"]
        if work.rule == "rmsprop":
            return s["lr"], s["alpha"], s["eps"]
        beta1, beta2 = s["betas"]
        decay = 1 - s["lr"] * s["weight_decay"]
        return s["lr"] / (1 - beta1**t), 1 / (1 - beta2**t) ** 0.5, beta1, beta2, s["eps"], decay

    def step() -> None:
        rounded = [real(c) for c in coefs(next(steps))]
        for (param, grad), own in zip(flat, states):
            loop(param, grad, *own, *rounded)

    return Way(step, lambda: params)


@functools.cache
def loops() -> dict[str, Any]:
    numba = importlib.import_module("numba")
    compiled, prange = numba.njit(parallel=True, fastmath=True), numba.prange

    def momentum(p, g, b, lr, momentum):  # type: ignore[no-untyped-def]
        for i in prange(p.size):
            b[i] = momentum * b[i] + g[i]
            p[i] -= lr * b[i]

    def rmsprop(p, g, v, lr, alpha, eps):  # type: ignore[no-untyped-def]
        one = type(alpha)(1)
        for i in prange(p.size):
            v[i] = alpha * v[i] + (one - alpha) * g[i] * g[i]
            p[i] -= lr * g[i] / (np.sqrt(v[i]) + eps)

    def adamw(p, g, m, v, step_size, correction, beta1, beta2, eps, decay):  # type: ignore[no-untyped-def]
        one = type(eps)(1)
        for i in prange(p.size):
            m[i] = beta1 * m[i] + (one - beta1) * g[i]
            v[i] = beta2 * v[i] + (one - beta2) * g[i] * g[i]
            p[i] = p[i] * decay - step_size * m[i] / (np.sqrt(v[i]) * correction + eps)

    adam = compiled(adamw)  # which without decay it is
    return {"momentum": compiled(momentum), "rmsprop": compiled(rmsprop), "adam": adam, "adamw": adam}


def keras(work: Work, params: list[Array], grads: list[Array]) -> Way | None:
    os.environ.setdefault("KERAS_BACKEND", "torch" if importlib.util.find_spec("torch") else "jax")
    keras = importlib.import_module("keras")
    s, clip = work.settings, {"global_clipnorm": work.clip_norm}
    rules: dict[str, Callable[[Any], Any]] = {
        "sgd": lambda o: o.SGD(s["lr"], **clip),
        "momentum": lambda o: o.SGD(s["lr"], momentum=s["momentum"], **clip),
        "nesterov": lambda o: o.SGD(s["lr"], momentum=s["momentum"], nesterov=True, **clip),
        "rmsprop": lambda o: o.RMSprop(s["lr"], rho=s["alpha"], epsilon=s["eps"], **clip),
        "adam": lambda o: o.Adam(s["lr"], *s["betas"], epsilon=s["eps"], **clip),
        "adamw": lambda o: o.AdamW(s["lr"], s["weight_decay"], *s["betas"], epsilon=s["eps"], **clip),
    }
    if work.rule not in rules:
        return None
    made = [keras.Variable(param, dtype=work.dtype) for param in params]
    opt = rules[work.rule](keras.optimizers)
    tensors = [keras.ops.convert_to_tensor(grad) for grad in grads]

    def step() -> None:
        opt.apply(tensors, made)
        for variable in made:
            if hasattr(variable.value, "block_until_ready"):  # JAX returns before it is done
                variable.value.block_until_ready()

    return Way(step, lambda: [keras.ops.convert_to_numpy(v.value) for v in made])


def scikit_learn(work: Work, params: list[Array], grads: list[Array]) -> Way | None:
    """The solvers of its MLPClassifier."""
    if work.clip_norm is not None or work.rule not in ("momentum", "adam") or work.n_elements > IN_PYTHON_UP_TO:
        return None
    solvers, s = importlib.import_module("sklearn.neural_network._stochastic_optimizers"), work.settings
    if work.rule == "momentum":
        opt = solvers.SGDOptimizer(params, s["lr"], momentum=s["momentum"], nesterov=False)
    else:
        opt = solvers.AdamOptimizer(params, s["lr"], *s["betas"], s["eps"])
    return Way(lambda: opt.update_params(params, grads), lambda: params)


def thinc(work: Work, params: list[Array], grads: list[Array]) -> Way | None:
    if work.clip_norm is not None or work.rule not in ("adam", "adamw") or work.dtype != "float32":
        return None
    optimizers, s = importlib.import_module("thinc.optimizers"), work.settings
    how = {"grad_clip": 0.0, "use_averages": False, "L2": s["weight_decay"], "L2_is_weight_decay": True}
    opt = optimizers.Optimizer(s["lr"], beta1=s["betas"][0], beta2=s["betas"][1], eps=s["eps"], **how)
    held = list(params)

    def step() -> None:
        for i, grad in enumerate(grads):
            held[i], _ = opt((i, "w"), held[i], grad.copy())  # it clears the gradient it is given

    return Way(step, lambda: held)


def deepspeed(work: Work, params: list[Array], grads: list[Array]) -> Way | None:
    if work.clip_norm is not None or work.rule not in ("adam", "adamw") or work.dtype != "float32":
        return None
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for others, and says so
    torch, adam = importlib.import_module("torch"), importlib.import_module("deepspeed.ops.adam")
    made = [torch.nn.Parameter(torch.from_numpy(param)) for param in params]
    for tensor, grad in zip(made, grads):
        tensor.grad = torch.from_numpy(grad)
    names = ("lr", "betas", "eps", "weight_decay")
    opt = adam.DeepSpeedCPUAdam(made, **{name: work.settings[name] for name in names}, adamw_mode=True)
    return Way(opt.step, lambda: params)


class Peer(NamedTuple):
    name: str
    package: str
    module: str
    make: Maker


OURS = Peer("fusedstep", "fusedstep", "fusedstep", fusedstep)
ROOFLINE = Peer("roofline", "fusedstep", "fusedstep", roofline)
PEERS = [
    Peer("torch fused", "torch", "torch", torch_fused),
    Peer("torch foreach", "torch", "torch", torch_foreach),
    Peer("optax jit", "optax", "optax", optax),
    Peer("numba", "numba", "numba", numba),
    Peer("DeepSpeed", "deepspeed", "deepspeed", deepspeed),
    Peer("Keras", "keras", "keras", keras),
    Peer("scikit-learn", "scikit-learn", "sklearn", scikit_learn),
    Peer("Thinc", "thinc", "thinc", thinc),
    Peer("NumPy", "numpy", "numpy", reference),
]


def installed() -> list[Peer]:
    return [peer for peer in PEERS if importlib.util.find_spec(peer.module)]


def versions() -> dict[str, str]:
    """Of the peers' packages."""
    return {package: importlib.metadata.version(package) for package in sorted({peer.package for peer in installed()})}


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Set the number of threads, of this library and of the peers that can be told, within a ``with`` block."""
    modules = [importlib.import_module(name) for name in ("torch", "numba") if importlib.util.find_spec(name)]
    before = [module.get_num_threads() for module in modules]
    with _threads.threads(n):
        for module in modules:
            module.set_num_threads(n)
        try:
            yield
        finally:
            for module, number in zip(modules, before):
                module.set_num_threads(number)
