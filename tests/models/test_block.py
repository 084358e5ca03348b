"""The block's residual: added by its last linear layer where nothing happens, or is seen, in between."""

import pytest
import torch

from posmlp import create_model
from posmlp.linear import Linear


@pytest.fixture
def block():
    torch.manual_seed(0)
    return create_model("posmlp_nano", drop_path_rate=0.5).levels[1].blocks[-1]


@pytest.fixture
def x():
    return torch.randn(3, 7, 5, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def added(monkeypatch):
    """A list that grows by whether something was added, with every call of a linear layer."""
    calls, forward = [], Linear.forward

    def watched(self, x, plus=None):
        calls.append(plus is not None)
        return forward(self, x, plus)

    monkeypatch.setattr(Linear, "forward", watched)
    return calls


def test_inference_and_training_without_drops_add_on_the_way_out(block, x, added):
    for training in (False, True):
        block.train(training).drop_path.rate = 0.0
        y = block(x)
        assert added == [False, True]
        torch.testing.assert_close(y, x + block._branch(x))
        added.clear()


def test_drops_come_before_the_sum(block, x, added):
    block.train()
    torch.manual_seed(2)
    y = block(x)
    torch.manual_seed(2)
    assert torch.equal(y, x + block._branch(x)) and not any(added)
    kept = (y != x).flatten(1).any(1)
    assert 0 < kept.sum() < len(x)  # this seed drops some
    block.drop_path.rate, block.drop.p = 0.0, 0.5
    added.clear()
    block(x)
    assert added == [False, False]


@pytest.mark.parametrize("name", ["fc2", "drop", "drop_path"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_see_the_branch_alone(block, x, added, name, kind):
    module, seen = block.eval().get_submodule(name), []
    handle = getattr(module, f"register_{kind}_hook")(lambda *arguments: seen.append(arguments) or None)
    y = block(x)
    y.sum().backward()
    assert added == [False, False] and len(seen) == 1
    if kind == "forward":
        torch.testing.assert_close(x + seen[0][2], y)
    handle.remove()
    block(x)
    assert added[2:] == [False, True]


def test_what_others_have_put_there_is_left_alone(block, x, added):
    block.eval()
    wanted = block(x)
    plain = torch.nn.Linear(block.fc2.in_features, block.fc2.out_features)
    plain.load_state_dict(block.fc2.state_dict())
    block.fc2 = plain
    torch.testing.assert_close(block(x), wanted)
    block.drop_path = torch.nn.Identity()
    torch.testing.assert_close(block(x), wanted)


def test_dropout_that_stays_on_in_inference_is_seen(block, x, added):
    block.eval().drop.p = 0.5
    block.drop.train()  # as those do who sample predictions
    block(x)
    assert added == [False, False]
