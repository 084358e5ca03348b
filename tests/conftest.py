"""Settings for every test, made before anything imports Triton."""

import os

import torch

# Without a GPU the Triton back end runs in Triton's interpreter; tests over all back ends then include it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", help="I/N: only every Nth test, from the Ith; for N processes")


def pytest_collection_modifyitems(config, items):
    first, step = map(int, config.getoption("--shard").split("/"))
    chosen = items[first::step]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
