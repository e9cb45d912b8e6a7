"""``fusedstep bench``."""

from __future__ import annotations

import argparse

from .. import _extension, _hyper
from ..arguments import CommandError, check_cpus, checked, output, picture
from ..config import show_config
from ..progress import progress
from . import show
from .measure import Result, measure
from .peers import PEERS, Peer, installed, versions
from .works import RULES, SHAPES, Work, works


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="AdamW up to 1 M elements, in under a minute")
    parser.add_argument("--rule", choices=RULES, metavar="NAME", help="only this rule, of those that train has but Muon")
    sizes = ", ".join(map(repr, SHAPES))
    parser.add_argument("--size", choices=SHAPES, action="append", metavar="SIZE", help=f"only this, of {sizes}; repeatable")
    parser.add_argument("--dtype", choices=["float32", "float64"], help="only this type")
    parser.add_argument(
        "--clip-norm", type=checked(float, _hyper.above_0), metavar="NORM", help="clip all gradients by their norm"
    )
    parser.add_argument("--threads", type=checked(int, check_cpus), metavar="N", help="threads (default: all)")
    known = [peer.name for peer in PEERS]
    listed = ", ".join(map(repr, known))
    parser.add_argument("--peer", choices=known, action="append", metavar="NAME", help=f"only this, of {listed}; repeatable")
    parser.add_argument(
        "--seconds", type=checked(float, _hyper.above_0), metavar="S", help="for each line (default: 5, quick: 2)"
    )
    parser.add_argument("--json", type=output, metavar="FILE", help="save every measurement")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="save a picture")


def chosen_works(args: argparse.Namespace) -> list[Work]:
    if not (args.rule or args.size or args.dtype or args.clip_norm or args.threads):
        return works(args.quick)
    sizes = args.size or [work.size for work in works(args.quick) if work == Work("adamw", work.size)]
    return [Work(args.rule or "adamw", size, args.dtype or "float32", args.clip_norm, args.threads) for size in sizes]


def chosen_peers(args: argparse.Namespace) -> list[Peer]:
    found = installed()
    names = [peer.name for peer in found]
    for name in args.peer or []:
        if name not in names:
            raise CommandError(f"--peer: expected what is installed, {', '.join(map(repr, names))}, got {name!r}")
    return [peer for peer in found if not args.peer or peer.name in args.peer]


def main(args: argparse.Namespace) -> int:
    _extension.require_core()
    peers = chosen_peers(args)
    seconds = args.seconds or (2.0 if args.quick else 5.0)
    show_config()
    print("peers:", ", ".join(f"{module} {version}" for module, version in versions().items()))
    print("Times of one step; of the others, how many times as long. Medians, taken in turn.\n", flush=True)
    results: list[Result] = []
    for work in progress(chosen_works(args), desc="timing", unit="work"):
        results.append(measure(work, peers, seconds))
    print(show.table(results))
    if args.json:
        show.save(results, args.json)
        print(f"measurements in {args.json}")
    if args.plot:
        show.plot(results, args.plot)
        print(f"picture in {args.plot}")
    return 0
