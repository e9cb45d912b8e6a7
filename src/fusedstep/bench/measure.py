"""Times of ways, taken in turn in one process."""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import _threads
from .peers import OURS, ROOFLINE, Peer, Way, threads
from .works import Work

MIN_ROUNDS = 7
SECONDS_PER_TIMING = 4e-3
PAUSE = 0.06  # seconds; XLA's threads spin for 30 to 50 ms
STEPS_COMPARED = 3


class Result(NamedTuple):
    """What was found for one work."""

    work: Work
    threads: int
    seconds: dict[str, list[float]]
    """Of one step, by way; the rounds correspond."""
    refused: dict[str, str]
    """Ways that failed or gave other results, and how."""

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str) -> float | None:
        """How many times as long a way takes as ours: the median over rounds."""
        if name not in self.seconds:
            return None
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[OURS.name]))

    @property
    def bytes_per_second(self) -> float:
        return self.work.bytes_per_element * self.work.n_elements / self.median(OURS.name)


def measure(work: Work, peers: list[Peer], seconds: float) -> Result:
    """Make all ways, compare what they do, then time them in turn."""
    n = work.threads or _threads.get_num_threads()
    with threads(n):
        ways, refused = make_ways(work, [OURS, ROOFLINE, *peers])
        return Result(work, n, take_turns(ways, seconds), refused)


def make_ways(work: Work, peers: list[Peer]) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The steps, and why peers have none."""
    ways: dict[str, Callable[[], object]] = {}
    refused: dict[str, str] = {}
    wanted: list[Any] = []
    params, grads = work.params(), work.grads()
    for peer in peers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                way = peer.make(work, [p.copy() for p in params], [g.copy() for g in grads])
                found = run(way) if way else []
        except Exception as error:  # whatever a peer may not like about this machine
            if peer is OURS:
                raise
            refused[peer.name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            continue
        if way is None:
            continue
        if peer is OURS:
            wanted = found
        elif peer is not ROOFLINE and not agree(found, wanted, work):
            refused[peer.name] = "gave other results"
            continue
        ways[peer.name] = way.step
    return ways, refused


def run(way: Way) -> list[Any]:
    """The parameters after some steps."""
    for _ in range(STEPS_COMPARED):
        way.step()
    return [param.copy() for param in way.params()]


def agree(found: list[Any], wanted: list[Any], work: Work) -> bool:
    """Whether parameters are ours, but for rounding: a hundredth of the length of a step."""
    close = functools.partial(np.allclose, rtol=1e-6, atol=work.settings["lr"] / 100)
    return all(map(close, found, wanted))


def timed(step: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def repeats_of(step: Callable[[], object]) -> int:
    """How many steps fill a timing once they have warmed up: the first may take a hundred times as long as the others."""
    repeats = 1
    while timed(step, repeats) * repeats < SECONDS_PER_TIMING:
        repeats *= 2
    return repeats


def take_turns(ways: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Each begins with a pause, until the threads of the one before, which may be another runtime's, no longer spin. What
    takes milliseconds at most then runs once untimed, for its own threads to be awake."""
    repeats = {name: repeats_of(step) for name, step in ways.items()}
    found: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[OURS.name]) < MIN_ROUNDS:
        for name, step in ways.items():
            time.sleep(PAUSE)
            if repeats[name] > 1:
                timed(step, repeats[name])
            found[name].append(timed(step, repeats[name]))
    return found
