"""WebDataset shards: read by position, whatever their layout; what is wrong with them is named."""

from __future__ import annotations

import gzip
import io
import os

import pytest
from data_support import picture, samples

from posmlp.data import open_all, open_data
from posmlp.data.shards import find_shards


@pytest.mark.parametrize(
    "files",
    [
        ("train-000.tar", "train-001.tar", "val-000.tar"),
        ("train/a.tar", "train/b.tar", "val/a.tar"),
        ("in1k-train-0000.tar", "in1k-train-0001.tar", "in1k-validation-00.tar"),
    ],
)
def test_layouts(files, make_shard):
    first, second, held_out = files
    make_shard(first, [0, 1])
    make_shard(second, [2, 0, 1])
    root = make_shard(held_out, [2, 1, 0]).parent
    root = root.parent if root.name == "val" else root
    train, val = open_data(str(root))
    assert list(train.labels) == [0, 1, 2, 0, 1] and list(val.labels) == [2, 1, 0]
    assert list(train.classes) == ["0", "1", "2"]
    assert train.name(3) == f"{root}/{second}:001.png"
    assert list(open_all(str(root)).labels) == [2, 1, 0]
    with pytest.raises(ValueError, match="its own part"):
        open_data(str(root), 0.1)


def test_images_are_those_of_the_members(make_shard):
    shard = make_shard("a.tar", [0, 1, 0, 1])
    source = open_all(str(shard))
    image = pytest.importorskip("PIL.Image", reason="needs pillow, of the demo extra")
    for index in (2, 0, 3, 1):
        expected = image.open(io.BytesIO(picture(f"a.tar:{index}")))
        assert source.open(index).tobytes() == expected.tobytes()


def test_shards_without_parts_are_split(make_shard):
    make_shard("a-0.tar", [0, 0, 0, 1, 1])
    root = make_shard("a-1.tar", [1, 0, 1, 0, 1]).parent
    train, val = open_data(str(root), 0.2, seed=3)
    assert sorted(val.labels) == [0, 1] and sorted(train.labels) == [0] * 4 + [1] * 4
    both = {source.name(i) for source in (train, val) for i in range(len(source.labels))}
    assert len(both) == 10
    assert len(open_all(f"{root}/a-{{0..1}}.tar").labels) == len(open_all(f"{root}/*.tar").labels) == 10
    assert len(open_all(f"{root}/a-{{1..1}}.tar").labels) == 5


def test_names_of_classes(make_shard):
    root = make_shard("train/a.tar", [0, 1]).parent.parent
    make_shard("val/a.tar", [1, 0])
    (root / "classes.txt").write_text("cat\ndog\n\n")
    assert list(open_data(str(root))[1].classes) == ["cat", "dog"]
    for text, said in (("cat\n", "1 classes"), ("cat\ndog\nowl\n", "class 'owl'")):
        (root / "classes.txt").write_text(text)
        with pytest.raises(ValueError, match=said):
            open_data(str(root))
    (root / "classes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"classes\.txt"):
        open_data(str(root))


def test_what_a_sample_may_hold(make_shard):
    """Folders, further files, capital letters; hidden files are none of a sample's."""
    members = {
        "a/x.JPG": picture("1"), "a/x.cls": b" 1 ", "a/x.json": b"{}", "b/x.cls": b"0",
        "b/x.webp": picture("2"), "b/._x.webp": b"", "b/x.seg.png": b"",
    }  # fmt: skip
    shard = make_shard("a.tar", members)
    source = open_all(str(shard))
    assert list(source.labels) == [1, 0] and source.name(1) == f"{shard}:b/x.webp"
    assert source.open(0).tobytes() != source.open(1).tobytes()


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.jpg": b"1", "a.cls": b"0", "b.jpg": b"1"}, r"'b' has no \.cls"),
        ({"a.cls": b"0"}, "'a' has no image"),
        ({"a.b.jpg": b"1", "a.b.cls": b"0"}, "'a' has no image"),
        ({"a.jpg": b"1", "a.cls": b"cat"}, r"a\.cls must be the number of a class, got 'cat'"),
        ({"a.jpg": b"1", "a.cls": b"-1"}, "got '-1'"),
        ({"a.jpg": b"1", "a.cls": b""}, "got ''"),
        ({"a.jpg": b"1", "a.cls": b"\xff\x00"}, "the number of a class"),
        ({"a.jpg": b"1", "a.cls": b"999999999"}, "999999999"),
        ({"a.jpg": b"1", "a.png": b"1", "a.cls": b"0"}, "two images"),
        ({"a.jpg": b"1", "a.cls": b"1", "b.jpg": b"1", "b.cls": b"1"}, "no images of class '0'"),
        ({}, "no images"),
    ],
)
def test_mistakes_in_samples(members, said, make_shard):
    shard = make_shard("odd.tar", members)
    with pytest.raises(ValueError, match=said) as error:
        open_data(str(shard))
    assert "odd.tar" in str(error.value) and "\n" not in str(error.value)


def test_no_truncation_or_damage_goes_unnoticed(make_shard):
    """Cut anywhere before the end's mark, and with a header spoilt, a shard is refused."""
    shard = make_shard("a.tar", [0, 1, 2])
    content = shard.read_bytes()
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    damaged = [content[:cut] for cut in range(0, end + 1, 128)]
    for at in (0, 1024, 3 * 1024):  # a header's first byte, and then its checksum no longer fits
        assert content[at : at + 3] in (b"000", b"001")
        damaged.append(content[:at] + b"?" + content[at + 1 :])
    damaged += [content[:512] + content[1024:], content + content, gzip.compress(content), b"no tar" * 200]
    for bad in damaged:
        shard.write_bytes(bad)
        with pytest.raises(ValueError, match=r"a\.tar"):
            open_all(str(shard))
    shard.write_bytes(content[: end + 512])
    assert list(open_all(str(shard)).labels) == [0, 1, 2]


def test_a_corrupt_image_is_found_when_it_is_opened(make_shard):
    members = samples("a.tar", [0, 1])
    members["001.png"] = members["001.png"][:80]
    shard = make_shard("a.tar", members)
    source = open_all(str(shard))
    assert source.open(0)
    with pytest.raises(ValueError, match=r"a\.tar:001\.png"):
        source.open(1)
    shard.unlink()
    with pytest.raises(ValueError, match=r"a\.tar:000\.png"):
        source.open(0)


def test_no_files_stay_open(make_shard):
    source = open_all(str(make_shard("a.tar", [0])))
    before = len(os.listdir("/proc/self/fd"))
    source.open(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_patterns(make_shard):
    root = make_shard("t-008.tar", [0]).parent
    for number in ("009", "010"):
        make_shard(f"t-{number}.tar", [0])
    make_shard("t-{1}.tar", [0])
    (root / "t-011.tar.gz").write_bytes(b"")
    expected = [f"{root}/t-{number}.tar" for number in ("008", "009", "010")]
    for pattern in (
        "t-{008..010}.tar",
        "t-0*.tar",
        "t-0{08,09,10}.tar",
        "t-0{0{8..9},10}.tar",
        "{t,t}-0*.tar",
    ):
        assert find_shards(f"{root}/{pattern}") == expected, pattern
    assert find_shards(f"{root}/t-{{1}}.tar") == [f"{root}/t-{{1}}.tar"]
    for pattern, said in (
        ("t-{008..012}.tar", r"t-011\.tar"), ("u-*.tar", r"u-\*\.tar"),
        ("t-011.tar.gz", r"got the file .*t-011"),
        ("t-{9..1}.tar", "count up"), ("t-{0..999999999999}.tar", "at most"),
    ):  # fmt: skip
        with pytest.raises((ValueError, OSError), match=said):
            find_shards(f"{root}/{pattern}")


def test_mixed_company(make_shard, make_folders):
    root = make_shard("train-0.tar", [0]).parent
    make_shard("val-0.tar", [0])
    make_shard("extra.tar", [0])
    with pytest.raises(ValueError, match=r"extra\.tar must be a shard of train or of val"):
        open_data(str(root))
    folders = make_folders({"cat": 2})
    make_shard("../images/a.tar", [0])
    with pytest.raises(ValueError, match="folders and shards"):
        open_data(str(folders))
