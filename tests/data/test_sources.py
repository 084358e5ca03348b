"""What DATA may be, and what is refused before anything is trained."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="hypothesis draws the splits")

from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import tensor

from posmlp.data import open_all, open_data
from posmlp.data.names import Names
from posmlp.data.split import stratified

ROOT = Path(__file__).resolve().parents[2]


def names(source) -> list[str]:
    return [source.name(index) for index in range(len(source.labels))]


def pixels(source) -> list[bytes]:
    return [source.open(index).tobytes() for index in range(len(source.labels))]


# ---- folders ----


@pytest.mark.parametrize("val", ["val", "validation"])
def test_training_and_validation_folders(make_folders, val):
    root = make_folders({"train/dog": 2, "train/cat": 3, f"{val}/cat": 1, f"{val}/dog": 1, "test/other": 1})
    train, held_out = open_data(str(root))
    assert list(train.classes) == list(held_out.classes) == ["cat", "dog"]
    assert list(train.labels) == [0, 0, 0, 1, 1] and list(held_out.labels) == [0, 1]
    assert names(train)[:2] == [str(root / "train/cat/0.png"), str(root / "train/cat/1.png")]
    assert names(open_all(str(root))) == names(held_out)
    assert train.open(3).size == (12, 12) and train.open(3).mode == "RGB"


def test_what_is_no_image_is_passed_over(make_folders):
    root = make_folders({"cat": 2, "dog/young/at play": 2, ".cache": 1})
    for stray in ("cat/Thumbs.db", "cat/._0.png", "notes.txt"):
        (root / stray).write_bytes(b"")
    (root / "cat" / "0.png").rename(root / "cat" / "0.PNG")
    source = open_all(str(root))
    assert list(source.classes) == ["cat", "dog"] and list(source.labels) == [0, 0, 1, 1]
    assert names(source)[0].endswith("0.PNG") and names(source)[2].endswith("dog/young/at play/0.png")


def test_a_class_may_be_called_train(make_folders):
    root = make_folders({"bus": 2, "train": 2})
    assert list(open_all(str(root)).classes) == ["bus", "train"]


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"train/cat": 1, "val/cat": 0}, ["no images in", "val"]),
        ({"train/cat": 1, "train/dog": 0, "val/cat": 1, "val/dog": 1}, ["class 'dog'", "train"]),
        ({"train/cat": 1, "train/dog": 1, "val/cat": 1, "val/dog": 0}, ["class 'dog'", "val"]),
        ({"train/cat": 1, "train/dog": 1, "val/cat": 1}, ["'dog' only in the part for training"]),
        ({"train/cat": 1, "val/cat": 1, "val/owl": 1}, ["'owl' only in the part for validation"]),
        ({"train/cat": 1}, ["no val/"]),
        ({"train/cat": 1, "test/cat": 1}, ["no val/"]),
        ({"val/cat": 1}, ["no train/"]),
        ({"train": 2, "val": 2}, ["folder of images per class", "train"]),
        ({"train/cat": 1, "val/cat": 1, "validation/cat": 1}, ["both val/ and validation/"]),
        ({"cat": 2, "dog": 1}, ["class 'dog'", "two images"]),
        ({"cat": 2, "dog": 0}, ["class 'dog'"]),
        ({"cat": 0}, ["no images"]),
        ({".": 2}, ["folder of images per class"]),
    ],
)
def test_mistakes_in_folders(counts, said, make_folders):
    root = make_folders(counts)
    with pytest.raises(ValueError) as error:
        open_data(str(root))
    message = str(error.value)
    assert all(words in message for words in said) and str(root) in message and "\n" not in message


def test_mistakes_in_arguments(make_folders, tmp_path):
    parts = str(make_folders({"train/cat": 1, "val/cat": 1}))
    whole = str(make_folders({"cat": 4}, "whole"))
    (tmp_path / "notes.txt").write_text("no data")
    for data, share, said in (
        (str(tmp_path / "nowhere"), None, "nowhere"),
        (str(tmp_path / "notes.txt"), None, "notes.txt"),
        ("https://example.org/train-{0..3}.tar", None, "example.org"),
        ("pipe:cat a.tar", None, "pipe:cat"),
        ("", None, "no folder"),
        (parts, 0.2, "its own part for validation"),
        ("digits", 0.2, "its own part for validation"),
        (whole, 0.0, "between 0 and 1"),
        (whole, float("nan"), "between 0 and 1"),
        (whole, 1.0, "between 0 and 1"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            open_data(data, share)


def test_a_corrupt_image_is_found_when_it_is_opened(make_folders):
    root = make_folders({"cat": 3})
    (root / "cat/1.png").write_bytes((root / "cat/1.png").read_bytes()[:60])
    (root / "cat/2.png").unlink()
    (root / "cat/2.png").symlink_to(root / "gone.png")
    source = open_all(str(root))
    for index in (1, 2):
        with pytest.raises(ValueError, match=f"{index}.png"):
            source.open(index)
    assert source.open(0)


# ---- the split ----


def test_a_folder_is_split_by_class(make_folders):
    root = str(make_folders({"cat": 20, "dog": 10, "owl": 2}))
    train, val = open_data(root, 0.2)
    assert np.bincount(val.labels).tolist() == [4, 2, 1]
    assert sorted(names(train) + names(val)) == sorted(names(open_all(root)))
    assert pixels(train) + pixels(val) != pixels(open_all(root))
    assert all(f"/{source.classes[label]}/" in source.name(i)
               for source in (train, val) for i, label in enumerate(source.labels))  # fmt: skip
    assert names(open_data(root, 0.2)[1]) == names(val)
    assert names(open_data(root, 0.2, seed=1)[1]) != names(val)
    assert len(open_data(root)[1].labels) == 2 + 1 + 1


@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=6),
    share=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**31 - 1),
)
@example(counts=[2, 30], share=0.999, seed=0)
@example(counts=[2, 30], share=0.001, seed=0)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_class_is_in_both_parts(counts, share, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    train, held_out = (part.tolist() for part in stratified(tensor(labels), share, seed))
    assert sorted(train + held_out) == list(range(len(labels)))
    held = np.bincount(labels[held_out], minlength=len(counts))
    for count, out in zip(counts, held, strict=True):
        assert 1 <= out <= count - 1 and abs(out - share * count) <= 1


# ---- digits ----


def test_the_digits_are_a_source():
    pytest.importorskip("sklearn", reason="needs the demo extra")
    train, val = open_data("digits")
    assert (len(train.labels), len(val.labels)) == (1438, 359) and list(train.classes) == list("0123456789")
    assert val.open(5).size == (32, 32) and val.open(5).mode == "RGB" and val.name(5) == "digits:test/5"
    assert pixels(open_all("digits")) == pixels(val)


def test_a_folder_called_digits(make_folders, monkeypatch):
    monkeypatch.chdir(make_folders({"digits/one": 2, "digits/two": 2}))
    assert list(open_all("./digits").classes) == ["one", "two"]


# ---- any source ----


@pytest.mark.parametrize("kind", ["folders", "shards", "digits", "split"])
def test_sources_can_be_pickled(kind, make_folders, make_shard):
    if kind == "digits":
        pytest.importorskip("sklearn", reason="needs the demo extra")
        source = open_all("digits")
    elif kind == "shards":
        source = open_all(str(make_shard("a.tar", [0, 1, 1])))
    else:
        root = str(make_folders({"cat": 4}))
        source = open_all(root) if kind == "folders" else open_data(root)[0]
    source.open(0)  # whatever that leaves behind must be fit for another process
    copy = pickle.loads(pickle.dumps(source))
    assert names(copy) == names(source) and pixels(copy)[:4] == pixels(source)[:4]
    assert list(copy.labels) == list(source.labels) and list(copy.classes) == list(source.classes)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_names_are_kept(texts):
    kept = Names([*texts, "\udcff.png"])  # a file's name may be no text
    assert [kept[index] for index in range(len(kept))] == [*texts, "\udcff.png"]


def test_the_package_waits_for_what_is_optional():
    code = "import sys, posmlp.data; print({'timm', 'torchvision', 'PIL', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
