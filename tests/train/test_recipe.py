"""Recipes, and what the command line makes of them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from posmlp.cli import build_parser, main
from posmlp.train.recipe import RECIPES, Recipe, Settings, recipe_name
from posmlp.train.run import resolve


def given(*arguments: str) -> dict:
    options = vars(build_parser().parse_args(["train", *arguments]))
    options.pop("run")
    return options


def test_the_imagenet_recipe():
    tiny, small = RECIPES["tiny"], RECIPES["small"]
    assert (tiny.epochs, tiny.cooldown_epochs, tiny.warmup_epochs) == (300, 10, 10)
    assert (tiny.lr, tiny.lr_batch, tiny.warmup_lr, tiny.min_lr) == (2e-3, 4 * 128, 1e-5, 1e-6)
    assert (tiny.eps, tiny.weight_decay, tiny.clip_grad) == (1e-5, 0.067, 1.0)
    assert (tiny.drop, tiny.drop_path, tiny.mixup, tiny.cutmix, tiny.smoothing) == (
        0.0233,
        0.1,
        0.5,
        1.0,
        0.1,
    )
    assert (tiny.auto_augment, tiny.ema, tiny.crop) == ("rand-m6-n3-mstd1", 0.99992, 0.9)
    assert tiny.precision == "bfloat16"
    assert (small.lr, small.batch_size) == (1e-3, 60)
    assert [recipe_name("folder", f"posmlp_{size}") for size in ("tiny", "small", "base")] == [
        "tiny", "small", "small",
    ]  # fmt: skip
    assert recipe_name("digits", "posmlp_small") == "digits"


def test_every_field_is_an_option(tmp_path):
    values = {
        int: lambda v: v + 2,
        float: lambda v: v / 2,
        str: lambda v: "rand-m1" if v.startswith("rand") else "float32",
    }  # fmt: skip
    for field in dataclasses.fields(Recipe):
        default = field.default
        if isinstance(default, tuple):
            new, text = (0.5, 0.75), ["0.5", "0.75"]
        else:
            new = values[type(default)](default)
            text = [str(new)]
        out = tmp_path / field.name
        settings = resolve(
            given("folder", "--out", str(out), f"--{field.name.replace('_', '-')}", *text), None, False
        )
        assert getattr(settings.recipe, field.name) == new
        assert settings.recipe == Recipe().changed(**{field.name: new})


def test_other_epochs_keep_the_share_of_warm_up():
    assert Recipe().changed(epochs=30).warmup_epochs == 1
    assert Recipe().changed(epochs=30).cooldown_epochs == 1
    assert Recipe().changed(epochs=30, warmup_epochs=5).warmup_epochs == 5
    assert RECIPES["digits"].changed(epochs=1).warmup_epochs == 0


def test_settings_survive_json(settings):
    again = Settings.from_json(settings.to_json())
    assert Settings.from_json(again.to_json()) == again
    assert again.recipe == settings.recipe
    for text in ("[]", "{}", json.dumps({"data": "a", "out": "b", "recipe": {"wings": 2}})):
        with pytest.raises(ValueError):
            Settings.from_json(text)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "DATA"),
        (["folder", "--wings", "2"], "--wings"),
        (["folder", "--lr"], "--lr"),
        (["folder", "--lr", "fast"], "fast"),
        (["folder", "--lr", "-1"], "lr must be"),
        (["folder", "--drop", "1.5"], "drop must be"),
        (["folder", "--scale", "0.9", "0.1"], "scale must"),
        (["folder", "--precision", "float8"], "precision must be"),
        (["folder", "--batch-size", "7"], "batch_size must be even"),
        (["folder", "--warmup-epochs", "300"], "warmup_epochs must be"),
        (["folder", "--recipe", "secret"], "secret"),
        (["digits", "--img-size", "0"], "img_size must be"),
        (["digits", "--windows", "8", "0"], "windows must be"),
        (["digits", "--workers", "-1"], "workers must be"),
        (["digits", "--threads", "0"], "threads must be"),
        (["nowhere"], "nowhere"),
        (["digits", "--model", "posmlp_tinny"], "posmlp_tiny"),
        (["digits", "--windows", "8", "4", "2", "--model", "posmlp_nano"], "windows"),
        (["digits", "--weights", "none.safetensors", "--model", "posmlp_nano"], "none.safetensors"),
        (["digits", "--device", "abacus"], "abacus"),
        (["digits", "--batch-size", "2000", "--model", "posmlp_nano"], "2000"),
    ],
)
def test_mistakes_take_one_line(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["train", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("posmlp: error: ") and error.count("\n") == 1, error
    assert named in error
