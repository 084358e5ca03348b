"""Inference a few images at a time, in blocks whose hidden maps are large."""

import pytest
import torch

from posmlp import create_model, layers


@pytest.fixture
def block():
    """One that takes maps `[B, 6, 5, 48]`, their hidden maps of 23040 bytes an image."""
    torch.manual_seed(0)
    return create_model("posmlp_nano", windows=4, shift=True).levels[0].blocks[1].eval()


@pytest.fixture
def x():
    return torch.randn(5, 6, 5, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def batches(block, monkeypatch):
    """The sizes of the batches that go through the block's branch, two images at most in inference."""
    assert 6 * 5 * block.gate.dim * 4 == 23040
    monkeypatch.setattr(layers, "HIDDEN_BYTES", 2 * 23040 + 1)
    sizes, mixed = [], block._mixed
    monkeypatch.setattr(block, "_mixed", lambda x: sizes.append(len(x)) or mixed(x))
    return sizes


def test_in_parts_as_in_one(block, x, batches):
    whole = block(x)
    with torch.inference_mode():
        parts = block(x)
    assert batches == [5, 2, 2, 1]
    torch.testing.assert_close(parts, whole.detach(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(block(x), parts)


def test_an_image_that_is_larger_goes_alone(block, x, batches, monkeypatch):
    monkeypatch.setattr(layers, "HIDDEN_BYTES", 1)
    with torch.no_grad():
        block(x)
    assert batches == [1] * 5


def test_what_fits_goes_in_one(block, x, batches):
    with torch.no_grad():
        block(x[:2])
        assert block(x[:0]).shape == (0, 6, 5, 48)
    assert batches == [2, 0]


def test_half_precision_fits_twice_as_many(block, x, batches):
    with torch.no_grad():
        assert block.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert batches == [4, 1]


def test_training_and_hooks_see_the_whole_batch(block, x, batches):
    block.train()
    with torch.no_grad():
        block(x)
    block.eval().gate.register_forward_hook(lambda module, inputs, z: batches.append(len(z)))
    with torch.no_grad():
        block(x)
    assert batches == [5, 5, 5]


def test_whoever_looks_into_it_sees_the_whole_batch(block, x, batches):
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            block(x)
        torch.vmap(block)(x.unsqueeze(0))
        assert batches == [5, 5]
        exported = torch.export.export(block, (x,)).graph
        assert not [node for node in exported.nodes if "split" in str(node.target)]
