"""Other people's implementations of the same functions, each optional: one that cannot run is skipped with a reason.

    peers_of("rms_norm")["Liger"].make()  ->  a function of the benchmark's inputs, by name

`make` imports the package, so its failure is the reason. A yardstick computes something else that is worth comparing
with (a fill of zeros): it is timed without a gradient, and no kernel is called slower than it. The first eager form is
also entered as torch.compile makes it, and ours too, inside torch.compile: our ops are opaque there, and a fusion that
is lost is a cost.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit import kernels
from labkit.errors import LabError
from labkit.measure import bench_lighthouse as long


class Peer(NamedTuple):
    """How to make a rival's call; what it needs to be installed; inputs that it destroys, of which it gets copies."""

    make: Callable[[], Callable[..., Tensor]]
    package: str = "torch"
    overwrites: tuple[str, ...] = ()
    yardstick: bool = False
    inductor: bool = False  # compiled by torch.compile


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peers_of(op: str) -> dict[str, Peer]:
    """By name, in the order of a table: eager forms, the same compiled, others."""
    eager = {name: Peer(lambda call=call: call) for name, call in EAGER.get(op, {}).items()}
    first = next(iter(EAGER.get(op, {}).values()), None)
    compiled = {"torch.compile": Peer(lambda: compiled_form(first), inductor=True)} if first else {}
    return eager | compiled | OTHERS.get(op, {})


def compiled_form(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By Inductor, in its default mode, for exactly these shapes."""
    return torch.compile(call, dynamic=False)


# ---- eager torch


def _fp32_cross_entropy(logits_NV, target):
    return F.cross_entropy(logits_NV.float(), target)


def _head_cross_entropy(hidden_NH, weight_VH, target):
    return F.cross_entropy((hidden_NH @ weight_VH.T).float(), target)


def _logprob(logits_NV, ids_N):
    return logits_NV.float().log_softmax(1).gather(1, ids_N[:, None]).squeeze(1)


def _head_logprob(hidden_NH, weight_VH, ids_N):
    return _logprob(hidden_NH @ weight_VH.T, ids_N)


def _official_holder(logp, old_logp, advantage_B, mask, p=0.5, clip_low=0.2, clip_high=0.2):
    """As its authors' code computes it: exp(p * difference) summed over a mask, then the root."""
    difference_BT = (logp - old_logp) * mask
    total_B = ((p * difference_BT).exp() * mask).sum(1)
    ratio_B = (total_B / (mask.sum(1) + 1e-8)) ** (1 / p)
    clipped_B = ratio_B.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio_B * advantage_B, clipped_B * advantage_B).mean()


def _set_kl(q_NK, teacher_logp_NK):
    log_q_NK, log_p_NK = q_NK.float().log_softmax(1), teacher_logp_NK.log_softmax(1)
    return (log_q_NK.exp() * (log_q_NK - log_p_NK)).sum(1)


def _gathered_kl(student_logits_NV, teacher_ids_NK, teacher_logp_NK):
    return _set_kl(student_logits_NV.gather(1, teacher_ids_NK), teacher_logp_NK)


def _gathered_rows_kl(hidden_NH, weight_VH, teacher_ids_NK, teacher_logp_NK):
    return _set_kl(torch.einsum("nh,nkh->nk", hidden_NH, weight_VH[teacher_ids_NK]), teacher_logp_NK)


def _dense_head_kl(hidden_NH, weight_VH, teacher_ids_NK, teacher_logp_NK):
    return kernels.topk_kl(hidden_NH @ weight_VH.T, teacher_ids_NK, teacher_logp_NK, mass=False)[0]


def _bag_mean(ids, weight_VD):
    return F.embedding(ids, weight_VD).float().mean(1).to(weight_VD.dtype)


def _embedding_bag(ids, weight_VD):
    return F.embedding_bag(ids, weight_VD, mode="mean")


def _rms_norm(x, weight_D):
    return F.rms_norm(x, x.shape[-1:], weight_D, 1e-5)


def _two_rms_norms(q_NHD, k_NHD, weight_q_D, weight_k_D):
    return _rms_norm(q_NHD, weight_q_D), _rms_norm(k_NHD, weight_k_D)


EAGER: dict[str, dict[str, Callable[..., Tensor]]] = {
    "rms_norm": {"F.rms_norm": _rms_norm},
    "qk_norm": {"F.rms_norm twice": _two_rms_norms},
    "cross_entropy": {"F.cross_entropy": lambda logits_NV, target: F.cross_entropy(logits_NV, target),
                      "F.cross_entropy, fp32 copy": _fp32_cross_entropy},
    "linear_cross_entropy": {"eager": _head_cross_entropy},
    "token_logprob": {"log_softmax and gather": _logprob},
    "linear_token_logprob": {"eager": _head_logprob},
    "holder_objective": {"official form": _official_holder},
    "topk_kl": {"gather and log_softmax": _gathered_kl},
    "sparse_head_topk_kl": {"gathered rows": _gathered_rows_kl, "dense head + topk_kl": _dense_head_kl},
    "bag_embedding": {"F.embedding and mean": _bag_mean, "F.embedding_bag": _embedding_bag},
    "pyramid_pool": {"level after level": long.pool_by_levels},
    "gather_select": {"cat and three gathers": long.three_gathers},
    "unselect": {"zeros and scatter_add": long.scatter_add},
}


# ---- libraries


def _liger(name: str, **settings):
    from liger_kernel.transformers import functional

    return functools.partial(getattr(functional, name), **settings)


def _liger_norm():
    norm = _liger("liger_rms_norm", in_place=False)  # in place it would overwrite the gradient that is passed in
    return lambda x, weight_D: norm(x, weight_D, 1e-5)


def _liger_cross_entropy():
    loss = _liger("liger_cross_entropy")
    return lambda logits_NV, target: loss(logits_NV, target)


def _liger_head(**settings):
    loss = _liger("liger_fused_linear_cross_entropy", **settings)
    return lambda hidden_NH, weight_VH, target: loss(hidden_NH, weight_VH, target)


def _cce(impl: str):
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden_NH, weight_VH, target: linear_cross_entropy(hidden_NH, weight_VH, target, impl=impl)


def _torch_head():
    if not hasattr(F, "linear_cross_entropy"):
        raise LabError(f"torch {torch.__version__} has no F.linear_cross_entropy.", "Use torch 2.13 or newer.")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden_NH, weight_VH, target: F.linear_cross_entropy(hidden_NH, weight_VH, target, options=options)


def _zero_fill():
    return lambda student_logits_NV, **_: torch.zeros_like(student_logits_NV)


def _sdpa(backend: str):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = getattr(SDPBackend, backend)

    def call(q_BHTD, k_BJUD, v_BJUD):
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q_BHTD, k_BJUD, v_BJUD, is_causal=True)

    return call


def _flex():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention, dynamic=False), {}

    def call(q_BHTD, k_BJUD, v_BJUD):
        T = q_BHTD.shape[2]
        if T not in masks:
            masks[T] = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=q_BHTD.device)
        return compiled(q_BHTD, k_BJUD, v_BJUD, block_mask=masks[T])

    return call


def _starts_from_logits():
    raise LabError("Liger's GRPO kernel starts from logits [B, T, V], so it does other work.", "Compare whole steps.")


LIGER, CCE = "liger-kernel", "cut-cross-entropy"
OTHERS: dict[str, dict[str, Peer]] = {
    "rms_norm": {"Liger": Peer(_liger_norm, LIGER)},
    "cross_entropy": {"Liger": Peer(_liger_cross_entropy, LIGER, overwrites=("logits_NV",))},
    "linear_cross_entropy": {
        "F.linear_cross_entropy": Peer(_torch_head),
        "Liger": Peer(_liger_head, LIGER),
        "Liger, fp32 sums": Peer(lambda: _liger_head(accum_dtype=torch.float32), LIGER),
        "CCE": Peer(lambda: _cce("cce"), CCE), "CCE, exact": Peer(lambda: _cce("cce_exact"), CCE)},
    "holder_objective": {"Liger GRPO": Peer(_starts_from_logits, LIGER)},
    "topk_kl": {"zero fill": Peer(_zero_fill, yardstick=True)},
    "flash_attention": {"SDPA, flash": Peer(lambda: _sdpa("FLASH_ATTENTION")),
                        "SDPA, cuDNN": Peer(lambda: _sdpa("CUDNN_ATTENTION")),
                        "FlexAttention": Peer(_flex, inductor=True)},
}
