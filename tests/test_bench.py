"""``fusedstep bench``: what it prints and saves, and that it compares like with like. No times are judged."""

import itertools
import json
import re

import numpy as np
import pytest

import fusedstep as fs
from fusedstep.__main__ import main
from fusedstep.bench import command, measure, show
from fusedstep.bench.peers import OURS, Peer, Way, installed
from fusedstep.bench.works import RULES, Work


def bench(*arguments):
    return main(["bench", "--seconds", "0.001", *arguments])


def test_bench(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    data, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    assert bench("--size", "1 k", "--size", "10 k", "--peer", "NumPy", "--json", str(data), "--plot", str(picture)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^adamw, float32, 1 k .* x$", printed, re.M)
    assert re.search(r"^adamw, float32, 10 k .* x$", printed, re.M)
    assert picture.read_bytes().startswith(b"\x89PNG")
    saved = json.loads(data.read_text())
    assert saved["machine"]["numpy"] == np.__version__
    for result, elements in zip(saved["results"], (1_000, 10_000)):
        assert (result["rule"], result["elements"], result["bytes_per_element"]) == ("adamw", elements, 28)
        assert set(result["seconds"]) == {"fusedstep", "roofline", "NumPy"}
        assert len({len(times) for times in result["seconds"].values()}) == 1
        assert all(time > 0 for times in result["seconds"].values() for time in times)


def test_bench_restores_the_number_of_threads(capsys):
    fs.set_num_threads(None)
    before = fs.get_num_threads()
    assert bench("--size", "1 k", "--threads", "1", "--peer", "NumPy") == 0
    assert fs.get_num_threads() == before


def test_bench_refuses(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        bench("--size", "1 light-year")
    assert "invalid choice: '1 light-year'" in capsys.readouterr().err
    monkeypatch.setattr(command, "installed", lambda: [peer for peer in installed() if peer.name == "NumPy"])
    assert bench("--peer", "DeepSpeed") == 2
    assert capsys.readouterr().err == "fusedstep bench: --peer: expected what is installed, 'NumPy', got 'DeepSpeed'\n"


@pytest.mark.parametrize("peer", installed(), ids=lambda peer: peer.name)
@pytest.mark.parametrize("rule", RULES)
def test_bench_compares_like_with_like(rule, peer):
    """Peers' steps are ours, but for rounding, wherever they have the rule; what differs is known."""
    for dtype, clip_norm in itertools.product(("float32", "float64"), (None, 1.0)):
        work = Work(rule, "MLP, 6 arrays", dtype, clip_norm)
        _, refused = measure.make_ways(work, [OURS, peer])
        known = {("torch foreach", "nesterov"), ("Keras", "rmsprop")}  # changes the gradients; has eps in the root
        assert not refused or (peer.name, rule) in known


def test_bench_tells_wrong_results():
    wrong = Peer("wrong", "numpy", "numpy", lambda work, params, grads: Way(lambda: None, lambda: params))
    broken = Peer("broken", "numpy", "numpy", lambda work, params, grads: 1 / 0)
    ways, refused = measure.make_ways(Work("sgd", "1 k"), [OURS, wrong, broken])
    assert list(ways) == ["fusedstep"]
    assert refused == {"wrong": "gave other results", "broken": "ZeroDivisionError: division by zero"}


def test_bench_says_who_is_left_out_where():
    wrong = Peer("wrong", "numpy", "numpy", lambda work, params, grads: Way(lambda: None, lambda: params))
    results = [measure.measure(Work("sgd", size), [wrong], 0.001) for size in ("1 k", "10 k")]
    assert show.table(results[:1]).splitlines()[-1] == "wrong: gave other results (sgd, float32, 1 k)"
    assert show.table(results).splitlines()[-1] == "wrong: gave other results (sgd, float32, 1 k) and 1 more"
