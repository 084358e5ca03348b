"""The blocks' linear layer: `nn.Linear`'s numbers by oneDNN, and `F.linear` wherever that must be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from posmlp import create_model
from posmlp import linear as module
from posmlp.linear import Linear
from posmlp_kernels.testing import assert_no_worse

SHAPES = [  # of x, and the output's width
    ((2, 7, 5, 24), 96),
    ((2, 7, 5, 96), 24),
    ((1, 1), 1),
    ((24,), 5),
    ((37, 17), 3),
    ((3, 300, 65), 129),
    ((8, 56, 56, 16), 64),  # long sums
]
needs_onednn = pytest.mark.skipif(not module._PAYS, reason="here the linear layer is F.linear throughout")
needs_bfloat16 = pytest.mark.skipif(
    not (module._PAYS and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="here oneDNN does not multiply bfloat16",
)


@pytest.fixture(autouse=True)
def faster(monkeypatch, request):
    """As with AVX-512, where oneDNN multiplies for gradients too, unless a test asks for both ways."""
    monkeypatch.setattr(module, "_MULTIPLIES_FASTER", getattr(request, "param", True))


both_ways = pytest.mark.parametrize("faster", [True, False], ids=["avx512", "avx2"], indirect=True)


@pytest.fixture
def products(monkeypatch):
    """A list that grows with every product by oneDNN."""
    calls, product = [], module.product
    monkeypatch.setattr(module, "product", lambda *operands: calls.append(1) or product(*operands))
    return calls


def values(layer, x, call=None):
    """The output and all gradients."""
    x = x.detach().requires_grad_()
    y = layer(x) if call is None else call(x, layer.weight, layer.bias)
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return dict(zip(["y", "x", *parameters], [y.detach(), *gradients], strict=True))


@both_ways
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "width"), SHAPES)
def test_no_worse_than_f_linear(shape, width, bias):
    torch.manual_seed(0)
    layer, x = Linear(shape[-1], width, bias=bias), torch.randn(shape)
    truth = values(copy.deepcopy(layer).double(), x.double(), F.linear)
    assert_no_worse(values(layer, x), values(layer, x, F.linear), truth)
    with torch.inference_mode():
        assert_no_worse(layer(x), F.linear(x, layer.weight, layer.bias), truth["y"])


def test_strides_do_not_matter():
    torch.manual_seed(0)
    layer = Linear(12, 20)
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    for x in (torch.randn(12, 7).T, torch.randn(4, 6, 24)[:, ::2, :12], torch.randn(1, 12).expand(5, 12)):
        truth = values(copy.deepcopy(layer).double(), x.double(), F.linear)
        assert_no_worse(values(layer, x), values(layer, x, F.linear), truth)


@needs_onednn
@pytest.mark.parametrize("width", [12, 48])
def test_no_product_of_expanded_tensors(width, monkeypatch):
    """The gradient of a sum is one number, expanded; oneDNN takes a second for what takes a millisecond."""
    product, strides = module.product, []

    def watched(x, weight, *more):
        strides.extend((x.stride(), weight.stride()))
        return product(x, weight, *more)

    monkeypatch.setattr(module, "product", watched)
    torch.manual_seed(0)
    layer, row = Linear(24, width), torch.randn(1, 24)
    layer(row.expand(5, 24).requires_grad_()).sum().backward()
    assert len(strides) == 2 * 3 and all(all(s) for s in strides[2:])
    torch.testing.assert_close(layer.weight.grad, (5 * row).expand(width, 24))
    torch.testing.assert_close(layer.bias.grad, torch.full((width,), 5.0))


@pytest.mark.parametrize("shape", [(), (1,), (1, 12)])
def test_a_bias_of_another_shape_is_broadcast(shape):
    torch.manual_seed(0)
    layer, x = Linear(8, 12), torch.randn(5, 8)
    layer.bias = nn.Parameter(torch.randn(shape))
    ours, wanted = values(layer, x), values(layer, x, F.linear)
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted["y"])


def test_a_bias_that_does_not_fit_is_refused():
    layer = Linear(8, 12)
    layer.bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        layer(torch.randn(5, 8))


def test_gradients_of_gradients():
    torch.manual_seed(0)
    layer, x = Linear(6, 9), torch.randn(4, 6, requires_grad=True)
    found = []
    for call in (F.linear, lambda x, *_: layer(x)):
        y = call(x, layer.weight, layer.bias).tanh()
        first = torch.autograd.grad(y.sum(), [x, layer.weight, layer.bias], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(penalty, [x, layer.weight, layer.bias]))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


@needs_onednn
@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_computes_no_gradient_that_nobody_wants(frozen, products):
    layer, x = Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    leaves = {"x": x, "weight": layer.weight, "bias": layer.bias}
    leaves.pop(frozen).requires_grad_(False)
    layer(x).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())
    assert len(products) == (3 if frozen == "bias" else 2)


@needs_onednn
def test_the_model_multiplies_by_onednn(products):
    model, x = create_model("posmlp_nano", depths=1), torch.randn(2, 3, 32, 32)
    model(x).sum().backward()
    assert len(products) == 3 * 2 * 2
    with torch.inference_mode():
        model(x)
    assert len(products) == 4 * 2 * 2


def in_autocast(layer, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x)


def without_onednn(layer, x):
    with torch.backends.mkldnn.flags(enabled=False):
        return layer(x)


def counted(layer, x):
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == 2 * x.numel() * layer.out_features
    return y


def compiled(function, **options):
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def with_tangent(layer, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        y, tangent = torch.autograd.forward_ad.unpack_dual(layer(dual))
        torch.testing.assert_close(tangent, layer.weight.sum(1).expand_as(y))
        return y


ELSEWHERE = {
    "float64": lambda layer, x: copy.deepcopy(layer).double()(x.double()).float(),
    "bfloat16, with gradients": lambda layer, x: copy.deepcopy(layer).bfloat16()(x.bfloat16()),
    "autocast": in_autocast,
    "oneDNN switched off": without_onednn,
    "flop counter": counted,
    "forward-mode gradients": with_tangent,
    "vmap": lambda layer, x: torch.vmap(layer)(x),
    "jit.trace": lambda layer, x: torch.jit.trace(layer, x, check_trace=False)(x),
    "vmap inside torch.compile": lambda layer, x: compiled(lambda x: torch.vmap(layer)(x))(x),
    "autocast inside torch.compile": lambda layer, x: compiled(lambda x: in_autocast(layer, x))(x),
    "torch.func inside torch.compile": lambda layer, x: compiled(lambda x: torch.func.vjp(layer, x)[0])(x),
    "torch.export": lambda layer, x: torch.export.export(layer, (x,)).module()(x),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_f_linear_where_it_must_be(where, products):
    torch._dynamo.reset()
    layer, x = Linear(8, 6), torch.randn(4, 8)
    y = ELSEWHERE[where](layer, x)
    assert not products
    torch.testing.assert_close(
        y.float(),
        F.linear(x, layer.weight, layer.bias),
        **({} if y.dtype == x.dtype else {"atol": 2e-2, "rtol": 2e-2}),
    )


@needs_onednn
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [96, 24])
def test_torch_compile_leaves_the_products_to_onednn(width, bias, dynamic):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = Linear(48, width, bias=bias)
    whole = compiled(layer, dynamic=dynamic)
    for batch in (2, 3):
        x, plus = torch.randn(batch, 7, 5, 48), torch.randn(batch, 7, 5, width)
        truth = values(copy.deepcopy(layer).double(), x.double(), F.linear)
        with torch.profiler.profile() as profile:
            ours = values(layer, x, lambda x, *_: whole(x))
        names = [event.name for event in profile.events()]
        assert names.count("mkldnn::_linear_pointwise") == 3
        assert_no_worse(ours, values(layer, x, F.linear), truth)
        with torch.no_grad():
            torch.testing.assert_close(whole(x, plus=plus), layer(x, plus=plus))


@needs_onednn
@pytest.mark.parametrize("width", [6, 12])
def test_ops_are_what_they_say(width):
    layer, x, plus = Linear(8, width), torch.randn(2, 3, 8), torch.randn(2, 3, width)
    for bias, added in ((layer.bias.detach(), plus), (None, plus), (None, None)):
        torch.library.opcheck(torch.ops.posmlp.linear, (x, layer.weight.detach(), bias, added))
    rows, drows = x.flatten(0, 1), plus.flatten(0, 1)
    for bias in (True, False):
        torch.library.opcheck(torch.ops.posmlp.linear_parameter_gradients, (rows, drows, bias))


def test_empty_and_mismatched_input():
    layer = Linear(8, 6)
    y = layer(torch.randn(0, 8, requires_grad=True))
    assert y.shape == (0, 6)
    y.sum().backward()
    assert not layer.weight.grad.any()
    with pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(3, 7))


def test_same_input_same_bits():
    torch.manual_seed(0)
    layer, x = Linear(96, 384), torch.randn(2, 14, 14, 96)
    first, second = values(layer, x), values(layer, x)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_is_a_linear_layer_to_others():
    layer = Linear(4, 3)
    assert isinstance(layer, nn.Linear) and list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "width"), SHAPES)
def test_what_is_added_on_the_way_out(shape, width, bias):
    torch.manual_seed(0)
    layer, x, plus = Linear(shape[-1], width, bias=bias), torch.randn(shape), torch.randn(*shape[:-1], width)

    def gradients(layer, x, plus, call):
        x, plus = x.detach().requires_grad_(), plus.detach().requires_grad_()
        y = call(layer, x, plus)
        dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
        leaves = {"x": x, "plus": plus, **dict(layer.named_parameters())}
        found = torch.autograd.grad(y, list(leaves.values()), dy)
        return dict(zip(["y", *leaves], [y.detach(), *found], strict=True))

    def plain(layer, x, plus):
        return plus + F.linear(x, layer.weight, layer.bias)

    truth = gradients(copy.deepcopy(layer).double(), x.double(), plus.double(), plain)
    ours = gradients(layer, x, plus, lambda layer, x, plus: layer(x, plus=plus))
    assert_no_worse(ours, gradients(layer, x, plus, plain), truth)


def test_what_is_added_may_have_any_strides_and_is_broadcast():
    torch.manual_seed(0)
    layer, x = Linear(8, 6), torch.randn(2, 3, 5, 8)
    for plus in (torch.randn(6), torch.randn(2, 6, 5, 3).transpose(1, 3), torch.randn(2, 3, 1, 6)):
        torch.testing.assert_close(layer(x, plus=plus), plus + F.linear(x, layer.weight, layer.bias))


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "width"), SHAPES)
def test_inference_in_bfloat16(shape, width, bias, products, monkeypatch):
    """On processors, too, where it does not pay."""
    monkeypatch.setattr(module, "_PAYS_IN_BFLOAT16", True)
    torch.manual_seed(0)
    layer = Linear(shape[-1], width, bias=bias).bfloat16()
    x, plus = torch.randn(shape).bfloat16(), torch.randn(*shape[:-1], width).bfloat16()
    truth = copy.deepcopy(layer).double()(x.double()) + plus.double()
    with torch.no_grad():
        ours, plain = layer(x, plus=plus), plus + F.linear(x, layer.weight, layer.bias)
    assert len(products) == (len(shape) > 1) and not ours.requires_grad
    assert_no_worse(ours, plain, truth)
    layer(x).sum().backward()  # by F.linear
    assert len(products) == (len(shape) > 1) and layer.weight.grad is not None


@needs_bfloat16
def test_inference_in_bfloat16_compiled_and_by_columns(products, monkeypatch):
    monkeypatch.setattr(module, "_PAYS_IN_BFLOAT16", True)
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = Linear(48, 96).bfloat16(), torch.randn(2, 7, 48).bfloat16()
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(compiled(layer)(x), y)
        layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
        assert torch.equal(layer(x), y)
    assert products


@needs_onednn
def test_a_weight_is_laid_out_anew_for_another_dtype_or_device():
    layer = Linear(6, 9)
    weight = layer.weight
    values, columns, rows = weight.detach().clone(), (1, 9), (6, 1)
    for change, stride in (
        (lambda: layer.bfloat16(), rows),
        (lambda: layer.float(), columns),
        (lambda: layer.double(), rows),
        (lambda: layer.to(torch.float32), columns),
        (lambda: nn.Sequential(layer).half(), rows),
        (lambda: layer.float().share_memory(), columns),
    ):
        change()
        assert layer.weight is weight and weight.stride() == stride  # optimizers keep the parameter
    torch.testing.assert_close(layer.weight.detach(), values, rtol=1e-2, atol=1e-2)
    assert Linear(6, 9, device="meta").weight.stride() == rows
    assert Linear(6, 9, device="meta").to_empty(device="cpu").weight.stride() == columns


@needs_onednn
@pytest.mark.parametrize("faster", [False], ids=["avx2"], indirect=True)
@pytest.mark.parametrize("frozen", [None, "weight"])
def test_without_avx512_onednn_serves_the_forward_alone(frozen, products):
    layer, x, plus = Linear(6, 9), torch.randn(5, 6, requires_grad=True), torch.randn(5, 9)
    layer.weight.requires_grad_(frozen is None)
    y = layer(x, plus)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert len(products) == 1 and layer.weight.is_contiguous()
    assert frozen or layer.weight.grad.is_contiguous()
    assert counter.get_total_flops() == 2 * 5 * 6 * 9 * (1 if frozen else 2)  # what is wanted, no more
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias) + plus)


def test_a_shared_weight_stays_where_it_is():
    layer = Linear(6, 9)
    layer.load_state_dict(nn.Linear(6, 9).state_dict(), assign=True)
    assert layer.share_memory().weight.is_shared()


def test_made_in_inference_mode():
    with torch.inference_mode():
        layer = Linear(6, 9)
    x = torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_parametrised_weight_stays_what_it_is():
    layer = nn.utils.parametrizations.weight_norm(Linear(6, 9))
    x = torch.randn(4, 6)
    before = layer(x)
    torch.testing.assert_close(layer.float()(x), before)


@needs_onednn
def test_weights_lie_as_onednn_likes_them_and_gradients_likewise():
    for layer in (Linear(6, 9), Linear(9, 6), Linear(7, 7)):
        stride = (1, layer.out_features)
        assert layer.weight.stride() == stride
        layer(torch.randn(5, layer.in_features)).sum().backward()
        assert layer.weight.grad.stride() == stride  # else it would be copied


def test_layouts_survive_copies_and_files(tmp_path):
    layer, x = Linear(6, 9), torch.randn(4, 6)
    torch.save(layer.state_dict(), tmp_path / "weights.pt")
    other = Linear(6, 9)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    plain = nn.Linear(6, 9)
    plain.load_state_dict(layer.state_dict())
    for copied in (copy.deepcopy(layer), other, plain):
        torch.testing.assert_close(copied(x), layer(x))
    assert other.weight.stride() == layer.weight.stride() == copy.deepcopy(layer).weight.stride()
