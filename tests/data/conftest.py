"""Small image folders and shards, drawn anew for every test."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from data_support import picture, samples


@pytest.fixture
def make_folders(tmp_path) -> Callable[..., Path]:
    """`make_folders({"train/cat": 3, "train/dog": 2})`: folders with so many images."""

    def make(counts: Mapping[str, int], root: str = "images") -> Path:
        for folder, count in counts.items():
            place = tmp_path / root / folder
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number}.png").write_bytes(picture(f"{folder}/{number}"))
        return tmp_path / root

    return make


@pytest.fixture
def make_shard(tmp_path) -> Callable[..., Path]:
    """`make_shard("train-0.tar", {"a.jpg": b"...", "a.cls": b"0"})`; a list of labels: good samples."""

    def make(name: str, members: Mapping[str, bytes] | list[int]) -> Path:
        if isinstance(members, list):
            members = samples(name, members)
        path = tmp_path / "shards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as shard:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
        return path

    return make
