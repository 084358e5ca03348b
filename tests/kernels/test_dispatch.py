"""Which back end runs, what is said about it, and that a named one runs or raises with its reasons."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace

import pytest
import torch
from support import available, over_backends

from posmlp_kernels import backends, dispatch, explain, pos_gate, use_backend
from posmlp_kernels.testing import find_case, make_inputs, run

NAMES = ("cuda", "triton", "cpu", "reference")
CASE = find_case("tiles")


def arguments():
    inputs = make_inputs(CASE)
    return {"x": inputs["x"], "table": inputs["table"], "bias": inputs["bias"], "window": 4, "softmax": True}


def chosen_by(text):
    (line,) = [line for line in text.splitlines() if "<- runs" in line]
    return line.split()[0]


@pytest.fixture
def broken(monkeypatch):
    """A function that gives a back end reasons not to serve."""

    def breaks(name, **reasons):
        changed = tuple(
            replace(b, **{k: (lambda *a, v=v: [v]) for k, v in reasons.items()}) if b.name == name else b
            for b in dispatch.BACKENDS
        )
        monkeypatch.setattr(dispatch, "BACKENDS", changed)

    return breaks


def test_backends_are_the_available_names_in_order():
    assert tuple(b.name for b in dispatch.BACKENDS) == NAMES
    assert backends() == tuple(name for name in NAMES if available(name))
    assert backends()[-1] == "reference"


def test_explain_of_this_machine_has_a_line_for_each():
    lines = explain().splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
    for line, name in zip(lines, NAMES, strict=True):
        assert ("yes" in line) == available(name)
        assert available(name) or len(line.split("no:")[1]) > 10, "a refusal needs a reason"


@over_backends()
def test_explain_names_what_runs(backend):
    if torch.cuda.is_available() and backend in ("cuda", "triton"):
        pytest.skip("its tensors are elsewhere")
    text = explain(**arguments(), backend=backend)
    assert chosen_by(text) == backend
    with use_backend(backend):
        assert chosen_by(explain(**arguments())) == backend


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
def test_the_compiled_back_end_is_the_automatic_choice_for_cpu_tensors():
    assert chosen_by(explain(**arguments())) == "cpu"
    inputs = make_inputs(CASE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(CASE, inputs), run(CASE, inputs, "cpu"))


def test_every_unavailable_back_end_raises_with_its_reason(broken):
    broken("cpu", unavailable="it went for lunch")
    with pytest.raises(
        NotImplementedError, match="backend 'cpu' cannot run this pos_gate: it went for lunch"
    ):
        pos_gate(**arguments(), backend="cpu")
    assert "cpu" not in backends()
    assert "cpu        no: it went for lunch" in explain()


def test_an_unsupported_problem_raises_with_its_reason(broken):
    broken("reference", unsupported="no such windows")
    with pytest.raises(NotImplementedError, match=r"backend 'reference' cannot run .*: no such windows"):
        pos_gate(**arguments(), backend="reference")
    with use_backend("reference"), pytest.raises(NotImplementedError, match="no such windows"):
        pos_gate(**arguments())


def test_wrong_device_is_a_reason():
    meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in arguments().items()}
    text = explain(**meta)
    assert chosen_by(text) == "reference"
    if available("cpu"):
        assert "cpu        no: it runs on cpu tensors, x is on meta" in text
        with pytest.raises(NotImplementedError, match="it runs on cpu tensors, x is on meta"):
            pos_gate(**meta, backend="cpu")
    assert pos_gate(**meta, backend="reference").device.type == "meta"


def test_declined_runs_only_by_name(broken):
    broken("cpu", unavailable="not here")
    broken("triton", unavailable="not here")
    broken("reference", declined="it is slow")
    assert "only by name: it is slow" in explain(**arguments(), backend="reference")
    assert pos_gate(**arguments(), backend="reference").shape == (2, 8, 8, 24)


def test_the_slow_choice_is_announced_once(broken, monkeypatch):
    broken("cpu", unavailable="not built")
    monkeypatch.setattr(dispatch, "_announced", set())
    with pytest.warns(UserWarning, match="slow reference back end for cpu tensors .*cpu: not built"):
        pos_gate(**arguments())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pos_gate(**arguments())
        pos_gate(**arguments(), backend="reference")


def test_no_warning_where_the_reference_was_asked_for(broken, monkeypatch):
    broken("cpu", unavailable="not built")
    monkeypatch.setattr(dispatch, "_announced", set())
    with warnings.catch_warnings(), use_backend("reference"):
        warnings.simplefilter("error")
        pos_gate(**arguments())


def test_use_backend_nests_and_survives_exceptions():
    unforced = chosen_by(explain(**arguments()))
    with use_backend("reference"):
        assert chosen_by(explain(**arguments())) == "reference"
        with pytest.raises(RuntimeError, match="inner"), use_backend(None):
            assert chosen_by(explain(**arguments())) == unforced
            raise RuntimeError("inner")
        assert chosen_by(explain(**arguments())) == "reference"
    assert chosen_by(explain(**arguments())) == unforced


def test_use_backend_decorates():
    @use_backend("reference")
    def inside():
        return chosen_by(explain(**arguments()))

    assert inside() == inside() == "reference"


def test_the_argument_is_stronger_than_the_context(broken):
    broken("cpu", unavailable="not built")
    with use_backend("cpu"):
        assert pos_gate(**arguments(), backend="reference").shape == (2, 8, 8, 24)


@pytest.mark.parametrize("call", [use_backend, lambda n: pos_gate(**arguments(), backend=n)])
def test_unknown_names(call):
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, cpu, reference, got 'cpuu'"):
        call("cpuu")


def test_use_backend_is_of_its_own_thread():
    """One thread's choice does not change what another thread runs."""
    seen, entered, done = [], threading.Event(), threading.Event()

    def other():
        with use_backend("reference"):
            entered.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    unforced = chosen_by(explain(**arguments()))
    thread.start()
    entered.wait(10)
    seen.append(chosen_by(explain(**arguments())))
    done.set()
    thread.join()
    assert seen == [unforced]
