"""The compiled kernels on a GPU, at sizes and in the dtypes that the interpreter is too slow or too coarse for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m2mkd_kernels import runtime
from m2mkd_kernels.expert_ffn.naive import expert_ffn_naive
from m2mkd_kernels.expert_ffn.op import FfnWeights, expert_ffn, expert_layer
from m2mkd_kernels.gather import Gather
from tests.kernels.kernel_cases import check_layer, judge, layer_inputs, value_and_grads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(runtime.interpreting(), reason="triton interprets here; start pytest with DS_ACCELERATOR=cuda"),
]


def gpu_plan(num_tokens: int, top_k: int, num_experts: int, skew: float) -> tuple[Gather, Tensor]:
    """Each token's experts drawn without repeats; with a skew the first ones are more popular, and the last gets nothing."""
    popularity = torch.arange(num_experts, 0, -1).float().pow(skew)
    popularity[-1] = 0 if skew else popularity[-1]
    generator = torch.Generator().manual_seed(num_tokens)
    ids_N = torch.multinomial(popularity.expand(num_tokens, -1), top_k, generator=generator).reshape(-1).cuda()
    order_R = ids_N.argsort(stable=True)
    ends_E = torch.bincount(ids_N, minlength=num_experts).cumsum(0).to(torch.int32)
    return Gather(order_R, order_R.argsort().view(num_tokens, top_k)), ends_E


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "dim", "hidden", "skew", "activation"),
    [(3152, 2, 768, 3072, 0, "gelu"), (3152, 1, 768, 3072, 2, "swiglu"), (257, 2, 200, 328, 2, "gelu"), (129, 2, 33, 70, 1, "swiglu")],
)
def test_the_error_is_at_most_twice_the_loops(
    dtype: torch.dtype, num_tokens: int, top_k: int, dim: int, hidden: int, skew: float, activation: str
) -> None:
    gather, offsets = gpu_plan(num_tokens, top_k, 8, skew)
    leaves, grad = layer_inputs(num_tokens, top_k, 8, dim, hidden, dtype, activation == "swiglu")
    # Weights of a trained size, so that neither products nor their squares leave the range of fp16.
    leaves = [leaf.cuda() * (0.1 if leaf.dim() == 3 else 1.0) for leaf in leaves]
    check_layer(leaves, grad.cuda(), gather, offsets, activation, dtype)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_experts_on_rows_err_at_most_twice_as_much_as_the_loop(activation: str) -> None:
    # Nothing is gathered here: other programs than those of the layer, with other needs of shared memory.
    dtype = torch.bfloat16
    _, offsets = gpu_plan(3152, 2, 8, 1)
    (rows, _, *weights), grad = layer_inputs(6304, 1, 8, 768, 3072, dtype, activation == "swiglu")
    leaves = [leaf.cuda() * (0.1 if leaf.dim() == 3 else 1.0) for leaf in (rows, *weights)]

    def fused(rows: Tensor, *weights: Tensor) -> Tensor:
        return expert_ffn(rows, offsets, FfnWeights(*weights), activation)  # type: ignore[arg-type]

    def naive(rows: Tensor, *weights: Tensor) -> Tensor:
        return expert_ffn_naive(rows, offsets, *weights, activation=activation)  # type: ignore[arg-type]

    truth = value_and_grads(naive, [leaf.double() for leaf in leaves], grad.cuda())
    loop = value_and_grads(naive, leaves, grad.cuda())
    judge(("out", "rows", "up", "up_bias", "down", "down_bias"), value_and_grads(fused, leaves, grad.cuda()), loop, truth, dtype)


def test_forward_and_backward_wait_for_nothing_and_repeat_bit_by_bit() -> None:
    gather, offsets = gpu_plan(3152, 2, 8, 1)
    leaves, grad = layer_inputs(3152, 2, 8, 256, 512, torch.bfloat16, False)
    leaves, grad = [leaf.cuda().requires_grad_() for leaf in leaves], grad.cuda()

    def step() -> list[Tensor]:
        x, routing, *weights = leaves
        out = expert_layer(x, routing, gather, offsets, FfnWeights(*weights))
        return [out, *torch.autograd.grad(out, leaves, grad)]

    first = step()  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_beyond_two_to_the_31_elements() -> None:
    # z has 2.2e9 elements: offsets of rows need 64 bits. The last expert's rows lie at the end of it.
    num_tokens, hidden = 270_000, 8192
    gather, offsets = gpu_plan(num_tokens, 1, 2, 0)
    leaves, grad = layer_inputs(num_tokens, 1, 2, 16, hidden, torch.bfloat16, False)
    x, routing, *weights = [leaf.cuda().requires_grad_() for leaf in leaves]
    out = expert_layer(x, routing, gather, offsets, FfnWeights(*weights))
    out.backward(grad.cuda())
    tail = gather.order_R[-256:]
    up, up_bias, down, down_bias = (w[-1].detach().float() for w in weights)
    leaf = x.detach()[tail].float().requires_grad_()
    want = routing.detach()[tail] * (torch.nn.functional.gelu(leaf @ up.t() + up_bias) @ down.t() + down_bias)
    want.backward(grad.cuda()[tail].float())
    assert x.grad is not None and leaf.grad is not None
    torch.testing.assert_close(out[tail].float(), want, rtol=3e-2, atol=3e-2 * want.abs().max().item())
    torch.testing.assert_close(x.grad[tail].float(), leaf.grad, rtol=3e-2, atol=3e-2 * leaf.grad.abs().max().item())
