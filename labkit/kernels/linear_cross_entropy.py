"""K3. Cross-entropy straight from hidden states and the head, a chunk of tokens at a time: no [N, V] tensor.

For each chunk of C rows:   Z = H W^T       G = dL/dZ by K2's kernels       dH = G W       dW += G^T H  (in fp32)

The gradient is made in the forward, where Z is at hand; the backward only multiplies by what arrives, and a kernel that
finds a 1 there returns at once. With reduction="none" what arrives is not known in the forward, so the backward makes
the logits again.

FLOPs: 6 N H V (8 N H V with reduction="none"; 2 N H V less where hidden or head is frozen). Memory: C V (4 + e) bytes
of logits and gradient (C V e in place, with logits in e bytes), and 4 V H for dW.
Chunk rule: dW is read and written once a chunk, 8 V H bytes; to keep that below a tenth of the chunk's products takes
C >= 13.3 F / BW tokens, whatever V and H (F FLOP/s, BW bytes/s): 2,450 on an H200.

dW is always summed in fp32. In bf16 each chunk would round away what is small beside the sum so far, and more chunks
would mean more error; there is no option for it.
Source: gradient in the forward, Liger (arXiv 2410.10989); the chunk rule is ours.
"""

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_devices, check_float, check_head, check_kernel_dtype
from labkit.kernels.configs import arch_of
from labkit.kernels.cost import Cost
from labkit.kernels.cross_entropy import bag_shares, check_labels, launch_backward, launch_forward
from labkit.kernels.cross_entropy import reference as cross_entropy_reference
from labkit.kernels.dispatch import choose
from labkit.kernels.language import tl, triton
from labkit.kernels.products import add_product, product

CHUNK = {"sm_90": 2560, "sm_120": 1536}  # tokens, by the chunk rule; 2048 elsewhere
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def linear_cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, target: Tensor, *, chunk: int | None = None,
                         logits_dtype: str = "fp32", ignore_index: int = -100, z_loss: float = 0.0,
                         weight: Tensor | None = None, reduction: str = "mean", impl: str = "auto") -> Tensor:
    """The loss of `cross_entropy(hidden @ weight.T, target)`, in nats and fp32, without the logits of all rows at once.

    Args:
        hidden_NH, weight_VH: one dtype; weight may be a tied embedding.
        target: token ids [N], or bags of ids [N, S]; `ignore_index`, `z_loss` and `weight` [S] as in cross_entropy.
        chunk: rows at a time; by default what the chunk rule says for this GPU.
        logits_dtype: of a chunk's logits: "fp32", or "bf16" for a third of the memory and less exact gradients.
        reduction: "mean", "sum" or "none".
    Raises:
        LabError: shapes, devices, dtypes or ids that do not fit.
    """
    _check(hidden_NH, weight_VH, target, weight, chunk, logits_dtype)
    check_labels(hidden_NH.shape[0], weight_VH.shape[0], target, weight, ignore_index, z_loss, reduction)
    target_NS = target[:, None] if target.ndim == 1 else target
    share_NS = bag_shares(target_NS, ignore_index, weight)
    counts_N = (share_NS != 0).any(1)
    if not choose(impl, hidden_NH):
        loss_N = reference(hidden_NH, weight_VH, target_NS, share_NS, z_loss)
        return _reduce(loss_N, counts_N, reduction)
    check_kernel_dtype("hidden_NH", hidden_NH)
    chunk = chunk or CHUNK.get(arch_of(hidden_NH.device), 2048)
    if reduction == "none":
        return _rowwise_op(hidden_NH, weight_VH, target_NS, share_NS, z_loss, chunk, logits_dtype)
    scale_N = counts_N / (counts_N.sum().clamp(min=1) if reduction == "mean" else 1.0)
    want = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_NH, weight_VH)]
    return _op(hidden_NH, weight_VH, target_NS, share_NS, scale_N.float(), z_loss, chunk, logits_dtype, want)[0]


def reference(hidden_NH: Tensor, weight_VH: Tensor, target_NS: Tensor, share_NS: Tensor, z_loss: float = 0.0) -> Tensor:
    """Loss [N] in plain torch: all the logits, in fp32 (float64 for float64)."""
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    return cross_entropy_reference(hidden_NH.to(dtype) @ weight_VH.to(dtype).T, target_NS, share_NS, z_loss)[0]


def forward_backward_cost(N: int, V: int, H: int, chunk: int, element: int = 2) -> Cost:
    """Three products. Read: hidden twice (Z, dW); head twice and dW once a chunk; fp32 logits twice, their gradient
    twice (dH, dW). Written: dH; dW once a chunk; logits and their gradient once."""
    chunks = -(-N // chunk)
    read = 2 * N * H * element + (2 * element + 4) * V * H * chunks + (8 + 2 * element) * N * V
    return Cost(read, N * H * element + 4 * V * H * chunks + (4 + element) * N * V, 6.0 * N * H * V)


def sweep(hidden_NH: Tensor, weight_VH: Tensor, target_NS: Tensor, share_NS: Tensor, scale_N: Tensor, z_loss: float,
          chunk: int, logits_dtype: str, want: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N]; and where `want` says so, dH, and dW in fp32 (else empty).

    `scale_N` is what arrives at each row's loss; it is not looked at where no gradient is wanted.
    """
    dtype, losses = DTYPES[logits_dtype], []
    dH_NH = hidden_NH.new_empty(hidden_NH.shape if want[0] else 0)  # contiguous, as the fakes say
    dW_VH = weight_VH.new_zeros(weight_VH.shape if want[1] else 0, dtype=torch.float32)
    for start in range(0, hidden_NH.shape[0], chunk):
        rows = slice(start, start + chunk)
        hidden_CH, labels = hidden_NH[rows], (target_NS[rows], share_NS[rows])
        logits_CV = product(hidden_CH, weight_VH.T, dtype)
        loss_C, lse_C = launch_forward(logits_CV, *labels, z_loss)
        losses.append(loss_C)
        if any(want):
            G_CV = logits_CV if dtype == hidden_NH.dtype else torch.empty_like(logits_CV, dtype=hidden_NH.dtype)
            launch_backward(scale_N[rows], torch.zeros_like(lse_C), logits_CV, *labels, lse_C, z_loss, G_CV)
            if want[0]:
                dH_NH[rows] = product(G_CV, weight_VH, hidden_NH.dtype)
            if want[1]:
                add_product(dW_VH, G_CV.T, hidden_CH)
    return torch.cat(losses) if losses else hidden_NH.new_zeros(0, dtype=torch.float32), dH_NH, dW_VH


@triton.jit
def _scale_kernel(x, factor, length, BLOCK: tl.constexpr):
    """x *= factor in place; a factor of 1, the usual case, reads nothing."""
    f = tl.load(factor).to(tl.float32)
    if f != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(x + i, mask=i < length, other=0.0).to(tl.float32) * f
        tl.store(x + i, scaled.to(x.dtype.element_ty), mask=i < length)


def launch_scale(x: Tensor, factor: Tensor) -> None:
    """Multiply the contiguous `x` by a scalar that stays on the device: the host never waits for it."""
    if x.numel():
        _scale_kernel[(-(-x.numel() // 4096),)](x, factor, x.numel(), BLOCK=4096, num_warps=8)


@torch.library.custom_op("labkit::linear_cross_entropy", mutates_args=())
def _op(hidden_NH: Tensor, weight_VH: Tensor, target_NS: Tensor, share_NS: Tensor, scale_N: Tensor, z_loss: float,
        chunk: int, logits_dtype: str, want: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    loss_N, dH_NH, dW_VH = sweep(hidden_NH, weight_VH, target_NS.contiguous(), share_NS.contiguous(), scale_N, z_loss,
                                 chunk, logits_dtype, want)
    return loss_N @ scale_N, dH_NH, dW_VH.to(weight_VH.dtype)


@torch.library.custom_op("labkit::scale_gradient_", mutates_args={"gradient"})
def _scale_op(gradient: Tensor, factor: Tensor) -> None:
    launch_scale(gradient, factor)


@torch.library.custom_op("labkit::linear_cross_entropy_rows", mutates_args=())
def _rowwise_op(hidden_NH: Tensor, weight_VH: Tensor, target_NS: Tensor, share_NS: Tensor, z_loss: float, chunk: int,
                logits_dtype: str) -> Tensor:
    return sweep(hidden_NH, weight_VH, target_NS.contiguous(), share_NS.contiguous(), hidden_NH, z_loss, chunk,
                 logits_dtype, [False, False])[0]


@torch.library.custom_op("labkit::linear_cross_entropy_rows_backward", mutates_args=())
def _rowwise_backward_op(grad_N: Tensor, hidden_NH: Tensor, weight_VH: Tensor, target_NS: Tensor, share_NS: Tensor,
                         z_loss: float, chunk: int, logits_dtype: str, want: list[bool]) -> tuple[Tensor, Tensor]:
    _, dH_NH, dW_VH = sweep(hidden_NH, weight_VH, target_NS.contiguous(), share_NS.contiguous(), grad_N.contiguous(),
                            z_loss, chunk, logits_dtype, want)
    return dH_NH, dW_VH.to(weight_VH.dtype)


@_op.register_fake
def _(hidden_NH, weight_VH, target_NS, share_NS, scale_N, z_loss, chunk, logits_dtype, want):
    return hidden_NH.new_empty((), dtype=torch.float32), *_gradients_like(hidden_NH, weight_VH, want)


@_scale_op.register_fake
def _(gradient, factor):
    return None


@_rowwise_op.register_fake
def _(hidden_NH, *arguments):
    return hidden_NH.new_empty(hidden_NH.shape[0], dtype=torch.float32)


@_rowwise_backward_op.register_fake
def _(grad_N, hidden_NH, weight_VH, *arguments):
    return _gradients_like(hidden_NH, weight_VH, arguments[-1])


def _gradients_like(hidden_NH: Tensor, weight_VH: Tensor, want: list[bool]) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(x.shape if wanted else 0)
                 for x, wanted in zip((hidden_NH, weight_VH), want, strict=True))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.want = inputs[-1]


def _backward(ctx, grad_loss, *_):
    # scaled in place, so autograd refuses a second backward; detached, or the gradient would hold on to this graph
    gradients = [gradient.detach() for gradient in ctx.saved_tensors]
    for gradient in gradients:
        _scale_op(gradient, grad_loss)
    return *(gradient if want else None for gradient, want in zip(gradients, ctx.want, strict=True)), *[None] * 7


def _save_rowwise(ctx, inputs, output):
    *tensors, ctx.z_loss, ctx.chunk, ctx.logits_dtype = inputs
    ctx.save_for_backward(*tensors)


def _rowwise_backward(ctx, grad_N):
    want = list(ctx.needs_input_grad[:2])
    gradients = _rowwise_backward_op(grad_N, *ctx.saved_tensors, ctx.z_loss, ctx.chunk, ctx.logits_dtype, want)
    return *(gradient if wanted else None for gradient, wanted in zip(gradients, want, strict=True)), *[None] * 5


_op.register_autograd(_backward, setup_context=_save)
_rowwise_op.register_autograd(_rowwise_backward, setup_context=_save_rowwise)


def _reduce(loss_N: Tensor, counts_N: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss_N
    return loss_N.sum() / (counts_N.sum().clamp(min=1) if reduction == "mean" else 1)


def _check(hidden_NH: Tensor, weight_VH: Tensor, target: Tensor, weight: Tensor | None, chunk: int | None,
           logits_dtype: str) -> None:
    check_float("hidden_NH", hidden_NH)
    check_head(hidden_NH, weight_VH, chunk)
    check_devices(hidden_NH=hidden_NH, weight_VH=weight_VH, target=target, weight=weight)
    if logits_dtype not in DTYPES:
        raise LabError(f"There is no logits_dtype {logits_dtype!r}.", 'Use logits_dtype "fp32" or "bf16".')
