"""The ablations: what is compared, that it is fair, and that no run is done twice or differently."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from posmlp import create_model
from posmlp.ablate import runs as performing
from posmlp.ablate.plan import Plan
from posmlp.ablate.report import encoding_numbers
from posmlp.ablate.runs import Outcome, finished, perform, perform_all
from posmlp.ablate.scales import SCALES, Base, Elsewhere, Scale
from posmlp.ablate.tables import FORMULAS, TABLES, make_row
from posmlp.cli import main
from posmlp.train.trainer import StoppedError, Trainer

SMALL = Scale(
    Base("gMLP", "gmlp_s16", (2,), (4,), {"dims": (8,), "depths": 1, "ratios": 2, "patch_size": 4}, "_ggqpe"),
    Base("PosMLP", "posmlp_nano", (2, 4), (4, 2), {"dims": (8, 16), "depths": 1}),
    side=16,
    recipe="digits",
    epochs=2,
    groups=((1, 1), (2, 4)),
    windows=((2, 2), (4, 2)),
    elsewhere=(Elsewhere(24, (6, 3)),),
)


@pytest.fixture
def small(monkeypatch, images, tmp_path) -> Plan:
    """Two runs of two epochs of five updates: GGQPE, isotropic and general."""
    monkeypatch.setitem(SCALES, "digits", SMALL)
    plan = Plan(str(images), str(tmp_path / "out"), "digits", ("transfer",), seeds=1, batch_size=8)
    rows = TABLES["transfer"].rows
    quadratic = dataclasses.replace(TABLES["transfer"], rows=lambda scale: list(rows(scale))[-1:])
    monkeypatch.setitem(TABLES, "transfer", quadratic)
    return plan


def command(plan: Plan, *more: str) -> list[str]:
    return ["ablate", plan.data, "--out", plan.out, "--scale", "digits", "--batch-size", "8", *more]


# ---- what is compared ----


@pytest.mark.parametrize("name", SCALES)
def test_rows_are_what_they_say(name):
    scale, models = SCALES[name], {}
    with torch.device("meta"):
        for table in TABLES.values():
            for row in table.rows(scale):
                options = {**row.options, "img_size": scale.side}
                assert models.setdefault(row.name, (row.model, options)) == (row.model, options)
        described = [str(sorted(create_model(m, **o).state_dict())) + str(o) + m for m, o in models.values()]
    assert len(set(described)) == len(models)  # another name is another model
    own = make_row(scale.posmlp, {})
    for table in ("bias", "groups", "windows", "covariance", "transfer"):
        assert own.name in [row.name for row in TABLES[table].rows(scale)], table


def test_the_table_of_the_paper():
    rows = list(TABLES["encodings"].rows(SCALES["tiny"]))
    assert [(row.cells["model"], row.cells["encoding"]) for row in rows] == [
        (family, encoding) for family in ("gMLP", "PosMLP") for encoding in FORMULAS
    ]
    models = {row.model for row in rows}
    assert {"gmlp_s16_sgu", "gmlp_s16_ggqpe", "posmlp_tiny", "posmlp_tiny_lrpe_m"} <= models


def test_bias_and_embedding_are_those_of_the_table():
    for row in TABLES["bias"].rows(SCALES["digits"]):
        with torch.device("meta"):
            model = create_model(row.model, **row.options)
        has_bias = any(name.endswith("gate.bias") for name in model.state_dict())
        assert ("yes" if has_bias else "no") == row.cells["gate bias"]
        assert ("yes" if hasattr(model.stem, "position") else "no") == row.cells["absolute embedding"]


@pytest.mark.parametrize("row", list(TABLES["encodings"].rows(SCALES["digits"])), ids=lambda row: row.name)
def test_formulas_count_the_parameters(row):
    with torch.device("meta"):
        model = create_model(row.model, **row.options)
    python = row.cells["numbers a gate"].strip("`").replace("^", "**").replace(")(", ")*(")
    python = python.replace("(2h-1)", "(2*h-1)").replace("(2w-1)", "(2*w-1)").replace("S (", "S*(")
    python = python.replace("6 S", "6*S")
    gates = [block.gate for level in model.levels for block in level.blocks]
    sizes = [dict(zip("hw", gate.window, strict=True)) | {"S": gate.groups} for gate in gates]
    numbers = sum(eval(python, {}, size | {"N": size["h"] * size["w"]}) for size in sizes)
    assert numbers == encoding_numbers(model)


def test_rows_differ_in_nothing_but_the_model():
    plan = Plan()
    assert len(plan.runs()) == 22 * 3  # the tables share what they can
    shared = {
        (run.settings.recipe.seed, str(dataclasses.replace(run.settings, out="", model="", options={})))
        for run in plan.runs()
    }
    assert len(shared) == 3


# ---- the runs ----


def test_the_command_writes_tables_and_goes_on(small, capsys):
    more = ["--seeds", "2", "--epochs", "1", "--tables", "groups", "transfer"]
    assert main(command(small, *more)) == 0
    assert "4 runs to do" in capsys.readouterr().out
    out = Path(small.out)
    text, table = (out / "ablation.md").read_text(), (out / "ablation.csv").read_text()
    assert text.count("±") == 2 * 2 + 2 and "| 1 1 |" in text and "one image is 7.14" in text
    rows = list(csv.DictReader(table.splitlines()))
    assert len(rows) == 2 * 2 + 2 and {row["seed"] for row in rows} == {"0", "1"}
    assert all(0 <= float(row["top1"]) <= 100 for row in rows) and rows[-1]["elsewhere"].startswith(
        "24, windows 6 3: "
    )

    # One run again, in this process and alone: nothing depends on what runs beside it.
    plan = dataclasses.replace(small, seeds=2, epochs=1, tables=("groups", "transfer"))
    run = next(run for run in plan.runs() if "groups=1_1" in run.row)
    shutil.rmtree(run.settings.out)
    perform(run)
    assert main(command(small, *more)) == 0
    assert "0 runs to do" in capsys.readouterr().out
    assert (out / "ablation.csv").read_text() == table


def test_an_interrupted_run_ends_as_one_that_was_not(small, monkeypatch, tmp_path):
    (run,) = small.runs()
    whole = dataclasses.replace(run, settings=dataclasses.replace(run.settings, out=str(tmp_path / "whole")))
    expected = perform(whole)
    assert finished(whole) == expected and finished(run) is None

    end = Trainer._end_epoch

    def stop(trainer: Trainer) -> None:
        end(trainer)
        raise StoppedError(15)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(Trainer, "_end_epoch", stop)
        perform(run)
    assert finished(run) is None
    assert perform(run) == expected == finished(run)


def test_the_same_size_gives_the_same_score(small):
    (run,) = small.runs()
    outcome = perform(dataclasses.replace(run, elsewhere=[Elsewhere(SMALL.side, SMALL.posmlp.windows)]))
    assert outcome.elsewhere == {"16, windows 4 2": outcome.top1}
    assert finished(run) is None  # another size is missing


def test_a_run_that_fails_is_named(small, monkeypatch):
    base = dataclasses.replace(SMALL.posmlp, groups=(3, 3))
    monkeypatch.setitem(SCALES, "digits", dataclasses.replace(SMALL, posmlp=base))
    with pytest.raises(ValueError, match=r"^posmlp_nano, seed 0: groups must divide"):
        perform_all(small.runs(), 1, lambda run, outcome: None)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (BrokenProcessPool("x"), ValueError, "its process was killed"),
        (StoppedError(15), ValueError, "stopped by signal 15"),
        (FloatingPointError("the loss is nan"), ValueError, "seed 0: the loss is nan"),
        (TypeError("a bug"), RuntimeError, "seed 0 failed"),
    ],
)
def test_what_a_process_may_come_to(error, kind, text, small):
    future: Future = Future()
    future.set_exception(error)
    with pytest.raises(kind, match=text):
        performing._result(future, small.runs()[0])


# ---- mistakes ----


def refuse(capsys, arguments: list[str], named: str) -> None:
    try:
        status = main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status == 2 and named in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--seeds", "0"], "seeds"),
        (["--jobs", "0"], "jobs"),
        (["--epochs", "0"], "epochs"),
        (["--batch-size", "0"], "batch_size"),
        (["--tables", "encoding"], "encodings"),
        (["--scale", "huge"], "digits"),
        (["--val-split", "0.5"], "val"),
    ],
)
def test_mistakes_take_one_line(more, named, small, capsys):
    refuse(capsys, command(small, *more), named)


def test_a_folder_of_other_runs_is_left_alone(small, capsys):
    (run,) = small.runs()
    outcome = perform(run)
    refuse(capsys, command(small, "--seeds", "1", "--tables", "transfer", "--epochs", "5"), "epochs 2, not 5")
    assert finished(run) == outcome
    path = Path(run.settings.out) / "outcome.json"
    for content in ("[]", "{", json.dumps({"top1": 3})):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"outcome\.json is not what a run came to"):
            finished(run)
    (Path(small.out) / "versions.json").write_text('{"torch": "0.1"}')
    refuse(capsys, command(small), "'0.1'")
    refuse(capsys, ["ablate", "nowhere", "--out", small.out], "nowhere")


def test_an_outcome_of_fewer_sizes_is_looked_at_again(small):
    (run,) = small.runs()
    outcome = perform(dataclasses.replace(run, elsewhere=()))
    assert outcome == Outcome(outcome.top1, outcome.loss, {})
    again = perform(run)
    assert again.top1 == outcome.top1 and again.loss == outcome.loss and "24, windows 6 3" in again.elsewhere


@pytest.mark.parametrize(
    ("row", "place", "margin"),
    [("posmlp_nano", "32, windows 10 5", 5), ("posmlp_nano_glrpe", "48, windows 12 6", 20)],
)
def test_accuracy_survives_other_windows_and_sizes(row, place, margin, tmp_path):
    """Digits, without more training. The margins, in percent, are for six epochs; more lose less."""
    pytest.importorskip("sklearn", reason="needs the demo extra")
    plan = Plan(out=str(tmp_path), tables=("transfer",), seeds=1, epochs=6)
    (run,) = (run for run in plan.runs() if run.row == row)
    (there,) = (other for other in run.elsewhere if str(other) == place)
    outcome = perform(dataclasses.replace(run, elsewhere=[there]))
    assert outcome.top1 > 85 and outcome.elsewhere[place] > outcome.top1 - margin
