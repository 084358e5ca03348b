"""Inference a few images at a time, in levels whose hidden maps are large."""

import pytest
import torch

from posmlp import create_model, layers


@pytest.fixture
def level():
    """One that takes maps `[B, 48, 6, 5]`, its hidden maps of 23040 bytes an image."""
    torch.manual_seed(0)
    return create_model("posmlp_nano", windows=4, shift=True).levels[0].eval()


@pytest.fixture
def x():
    return torch.randn(5, 48, 6, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def batches(level, monkeypatch):
    """The sizes of the batches that go through the level's last block, two images at most in inference."""
    block = level.blocks[-1]
    assert 6 * 5 * block.gate.dim * 4 == 23040
    monkeypatch.setattr(layers, "HIDDEN_BYTES", 2 * 23040 + 1)
    sizes, mixed = [], block._mixed
    monkeypatch.setattr(block, "_mixed", lambda x: sizes.append(len(x)) or mixed(x))
    return sizes


def test_in_parts_as_in_one(level, x, batches):
    whole = level(x)
    with torch.inference_mode():
        parts = level(x)
    assert batches == [5, 2, 2, 1]
    torch.testing.assert_close(parts, whole.detach(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(level(x), parts)


def test_an_image_that_is_larger_goes_alone(level, x, batches, monkeypatch):
    monkeypatch.setattr(layers, "HIDDEN_BYTES", 1)
    with torch.no_grad():
        level(x)
    assert batches == [1] * 5


def test_what_fits_goes_in_one(level, x, batches):
    with torch.no_grad():
        level(x[:2])
        assert level(x[:0]).shape == (0, 48, 6, 5)
    assert batches == [2, 0]


def test_half_precision_fits_twice_as_many(level, x, batches):
    with torch.no_grad():
        assert level.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert batches == [4, 1]


def test_training_and_hooks_see_the_whole_batch(level, x, batches):
    level.train()
    with torch.no_grad():
        level(x)
    level.eval().blocks[0].gate.register_forward_hook(lambda module, inputs, z: batches.append(len(z)))
    with torch.no_grad():
        level(x)
    assert batches == [5, 5, 5]


def test_parts_that_others_put_there_see_the_whole_batch(level, x, batches):
    level.blocks.insert(0, torch.nn.Softmax(0))
    with torch.no_grad():
        level(x)
    assert batches == [5]


def test_dropout_that_stays_on_sees_the_whole_batch(level, x, batches):
    level.blocks[0].drop.train()
    with torch.no_grad():
        level(x)
    assert batches == [5]


def test_whoever_looks_into_it_sees_the_whole_batch(level, x, batches):
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            level(x)
        torch.vmap(level)(x.unsqueeze(0))
        assert batches == [5, 5]
        exported = torch.export.export(level, (x,)).graph
        assert not [node for node in exported.nodes if "split" in str(node.target)]
