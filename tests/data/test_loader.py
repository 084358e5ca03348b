"""Batches: every image where it belongs, whatever the number of processes, and distorted the same."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import CARD, RECIPE

pytest.importorskip("hypothesis", reason="hypothesis draws the numbers of images and processes")

from hypothesis import given, settings
from hypothesis import strategies as st

from posmlp.data import (
    EvaluationLoader,
    TrainingLoader,
    evaluation_transform,
    open_all,
    training_transform,
)

HERE = Path(__file__).resolve().parent


class Numbers:
    """A source whose images are their own numbers; some cannot be read."""

    classes = ("even", "odd")

    def __init__(self, count: int, broken: range = range(0)) -> None:
        self.labels = np.arange(count) % 2
        self.broken = broken

    def name(self, index: int) -> str:
        return f"number {index}"

    def open(self, index: int) -> int:
        if index in self.broken:
            raise ValueError(f"{self.name(index)} is broken")
        return index


class Killer(Numbers):
    """A source that ends the process that opens its image 9."""

    def open(self, index: int) -> int:
        if index == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def draw(number: int) -> torch.Tensor:
    """`[1, 2, 2]`: the number, and a draw from each generator that distortions may use."""
    values = [number, random.random(), np.random.random(), torch.rand(()).item()]
    return torch.tensor(values).view(1, 2, 2)


def pixels(batches) -> torch.Tensor:
    return torch.cat([batch.pixels for batch in batches])


def indices(batches) -> list[int]:
    return [index for batch in batches for index in batch.indices.tolist()]


# ---- order ----


@given(
    count=st.integers(1, 60), batch=st.integers(1, 5), world=st.integers(1, 3), accumulate=st.integers(1, 3),
    start=st.integers(0, 5), epoch=st.integers(0, 1000), seed=st.integers(0, 2**31 - 1),
)  # fmt: skip
@settings(max_examples=80, deadline=None, derandomize=True)
def test_processes_and_accumulation_share_out_an_epoch(count, batch, world, accumulate, start, epoch, seed):
    per_update = batch * world * accumulate
    if per_update > count:
        with pytest.raises(ValueError, match=f"the {count} training images"):
            TrainingLoader(Numbers(count), draw, batch=batch, seed=seed, world=world, accumulate=accumulate)
        return
    together = TrainingLoader(Numbers(count), draw, batch=per_update, seed=seed)
    expected = list(together.epoch(epoch, start))
    assert sorted(indices(together.epoch(epoch))) == sorted(set(indices(together.epoch(epoch))))
    assert len(expected) == max(0, together.updates - start) and together.updates == count // per_update

    loaders = [
        TrainingLoader(
            Numbers(count), draw, batch=batch, seed=seed, rank=rank, world=world, accumulate=accumulate
        )
        for rank in range(world)
    ]
    apart = [list(loader.epoch(epoch, start)) for loader in loaders]
    for update, whole in enumerate(expected):
        steps = range(update * accumulate, (update + 1) * accumulate)
        parts = [apart[rank][step] for step in steps for rank in range(world)]
        assert all(len(part) == batch for part in parts)
        assert torch.equal(pixels(parts), whole.pixels)  # the same images, and the same distortions
        assert indices(parts) == whole.indices.tolist()
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert {loader.updates for loader in loaders} == {together.updates}
    assert all(len(batches) == len(expected) * accumulate for batches in apart)


def test_epochs_and_seeds_differ():
    def epoch(seed: int, number: int) -> list[list[float]]:
        loader = TrainingLoader(Numbers(40), draw, batch=40, seed=seed)
        (batch,) = loader.epoch(number)
        assert batch.indices.tolist() == batch.pixels[:, 0, 0, 0].tolist()
        return batch.pixels[batch.indices.argsort()].flatten(1).tolist(), batch.indices.tolist()

    draws, orders = zip(*(epoch(*key) for key in ((0, 0), (0, 1), (1, 0), (1, 1))), strict=True)
    assert len({tuple(order) for order in orders}) == 4
    for column in (1, 2, 3):  # no image is distorted as another one, or as in another epoch
        assert len({image[column] for images in draws for image in images}) == 4 * 40
    assert epoch(0, 1) == (draws[1], orders[1])


def test_loading_leaves_the_generators_alone():
    def state() -> list:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

    before = state()
    list(TrainingLoader(Numbers(8), draw, batch=2, seed=0).epoch(0))
    list(EvaluationLoader(Numbers(8), torch.tensor, batch=2))
    assert state() == before


# ---- workers ----


@pytest.fixture
def images(make_folders):
    return open_all(str(make_folders({"cat": 14, "dog": 13})))


def test_workers_change_nothing(images):
    """Real distortions, epochs in any order, and one that is left early."""
    pytest.importorskip("timm", reason="needs the train extra")
    transform = training_transform(RECIPE, CARD)
    alone, helped = (
        TrainingLoader(images, transform, batch=4, seed=5, workers=workers) for workers in (0, 2)
    )
    for epoch, start in ((0, 0), (7, 2), (1, 5)):
        expected, got = list(alone.epoch(epoch, start)), list(helped.epoch(epoch, start))
        assert indices(got) == indices(expected) and torch.equal(pixels(got), pixels(expected))
        assert next(helped.epoch(3)).indices.tolist() == next(alone.epoch(3)).indices.tolist()
    assert torch.equal(pixels(helped.epoch(0, 3)), pixels(alone.epoch(0))[12:])


def test_workers_that_are_spawned(images):
    """As where forking is not the habit: everything that workers get can be pickled."""
    pytest.importorskip("timm", reason="needs the train extra")
    transform = training_transform(RECIPE, CARD)
    expected = pixels(TrainingLoader(images, transform, batch=9, seed=5).epoch(0))
    habit = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        got = pixels(TrainingLoader(images, transform, batch=9, seed=5, workers=1).epoch(0))
    finally:
        multiprocessing.set_start_method(habit, force=True)
    assert torch.equal(got, expected)


def test_a_killed_worker_is_an_error():
    """In a process of its own, since torch reports it wherever the main thread happens to be."""
    loader = "TrainingLoader(Killer(40), draw, batch=4, seed=0, workers=2)"
    code = f"from test_loader import *; list({loader}.epoch(0))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=HERE,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )  # fmt: skip
    assert done.returncode == 1 and re.search(r"DataLoader worker|Connection|EOFError", done.stderr), done


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_memory(workers):
    options = {"batch": 4, "workers": workers, "pin_memory": True}
    batches = [*TrainingLoader(Numbers(8), draw, seed=0, **options).epoch(0)]
    batches += EvaluationLoader(Numbers(8, range(1)), torch.tensor, **options)
    assert all(tensor.is_pinned() for b in batches for tensor in (b.pixels, b.labels, b.indices))
    assert batches[-2].broken == ("number 0 is broken",)


# ---- evaluation ----


@given(
    count=st.integers(1, 40), batch=st.integers(1, 7), world=st.integers(1, 5),
    broken=st.sets(st.integers(0, 39)),
)  # fmt: skip
@settings(max_examples=80, deadline=None, derandomize=True)
def test_evaluation_sees_every_image_once(count, batch, world, broken):
    source = Numbers(count, broken)
    seen, said = [], []
    for rank in range(world):
        mine = range(rank, count, world)
        loader = EvaluationLoader(source, torch.tensor, batch=batch, rank=rank, world=world)
        if mine and broken.issuperset(mine):
            with pytest.raises(ValueError, match="none of the images can be read; the last: number"):
                list(loader)
            said += [f"number {index} is broken" for index in mine]
            continue
        batches = list(loader)
        assert all(0 < len(part) <= batch for part in batches)
        assert indices(batches) == [index for index in mine if index not in broken]
        for part in batches:
            assert torch.equal(part.pixels, part.indices) and torch.equal(part.labels, part.indices % 2)
        seen += indices(batches)
        said += [message for part in batches for message in part.broken]
    assert sorted(seen) == sorted(set(range(count)) - broken)
    assert sorted(said) == sorted(f"number {index} is broken" for index in broken if index < count)


# ---- unreadable images ----


def test_the_next_image_stands_in_for_an_unreadable_one():
    def epoch(broken: range):
        return next(TrainingLoader(Numbers(10, broken), draw, batch=10, seed=0).epoch(0))

    whole, holed = epoch(range(0)), epoch(range(8, 10))
    stand_ins = [0 if index in (8, 9) else index for index in whole.indices.tolist()]
    assert holed.indices.tolist() == stand_ins == holed.pixels[:, 0, 0, 0].int().tolist()
    assert holed.labels.tolist() == [index % 2 for index in stand_ins]
    assert sorted(holed.broken) == ["number 8 is broken"] + 2 * ["number 9 is broken"]
    kept = torch.tensor([index < 8 for index in whole.indices.tolist()])
    assert torch.equal(holed.pixels[kept], whole.pixels[kept])


@pytest.mark.parametrize(("count", "broken"), [(300, range(300)), (3, range(3)), (300, range(100, 201))])
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images(count, broken, workers):
    loader = TrainingLoader(Numbers(count, broken), draw, batch=3, seed=0, workers=workers)
    try:
        list(loader.epoch(0))
    except ValueError as error:  # not by pytest, which would keep the loader, and workers then end slowly
        said = str(error)
    assert re.fullmatch(r"too many images in a row cannot be read; the last: number \d+ is broken", said)


def test_corrupt_files(make_folders):
    root = make_folders({"cat": 6})
    corrupt = root / "cat" / "2.png"
    corrupt.write_bytes(corrupt.read_bytes()[:100])
    source, prepare = open_all(str(root)), evaluation_transform(CARD)
    (batch,) = EvaluationLoader(source, prepare, batch=6, workers=1)
    assert batch.indices.tolist() == [0, 1, 3, 4, 5]
    assert batch.broken == (f"{corrupt} is not an image that can be read",)
    (batch,) = TrainingLoader(source, prepare, batch=6, seed=0).epoch(0)
    assert sorted(batch.indices.tolist()) == [0, 1, 3, 3, 4, 5] and len(batch.broken) == 1
