"""Triton kernels, one file an op: equation, reference in plain torch, kernel, gradient, and the choice between them.

rms_norm              norm of rows, with an optional residual added before
qk_norm               the norm of queries and keys in one launch
cross_entropy         loss and log-sum-exp of one target or a bag of targets, without a second copy of the logits
linear_cross_entropy  the same straight from hidden states and the head, a chunk at a time
token_logprob         log-probability of given tokens, entropy and log-sum-exp in one reading
linear_token_logprob  the same from hidden states, without a gradient: scoring old and reference policies
topk_kl               KL divergence of student and teacher on a set of tokens; topk_kl_gradient: as ids and values
sparse_head_topk_kl   the same from hidden states, with K rows of the head a token
holder_objective      the policy objective with a power mean of token ratios: GRPO, GSPO and GMPO are points of it
bag_embedding         mean embedding of bags of tokens, with a gradient that repeats bit for bit
flash_attention       exact attention without the [T, T] matrix: a kernel to read
pyramid_pool          Lighthouse attention: means and scores of all levels from one reading of q, k and v
gather_select         its chosen entries of q, k and v in one launch
unselect              its outputs summed at their positions: a scatter as a gather, which repeats bit for bit

Beside the ops: language (Triton or its stand-in), dispatch (which implementation runs, and why), checks (bad input),
configs (launch settings), cost (bytes and FLOPs), interpreter and machine_code (both as measuring instruments).
"""

from labkit.kernels.bag_embedding import bag_embedding
from labkit.kernels.cross_entropy import cross_entropy
from labkit.kernels.flash_attention import flash_attention
from labkit.kernels.holder_objective import holder_objective
from labkit.kernels.lighthouse_gather import gather_select
from labkit.kernels.lighthouse_pool import pyramid_pool
from labkit.kernels.lighthouse_unselect import unselect
from labkit.kernels.linear_cross_entropy import linear_cross_entropy
from labkit.kernels.qk_norm import qk_norm
from labkit.kernels.rms_norm import rms_norm
from labkit.kernels.sparse_head_topk_kl import sparse_head_topk_kl
from labkit.kernels.token_logprob import linear_token_logprob, token_logprob
from labkit.kernels.topk_kl import topk_kl, topk_kl_gradient

__all__ = ["bag_embedding", "cross_entropy", "flash_attention", "gather_select", "holder_objective",
           "linear_cross_entropy", "linear_token_logprob", "pyramid_pool", "qk_norm", "rms_norm", "sparse_head_topk_kl",
           "token_logprob", "topk_kl", "topk_kl_gradient", "unselect"]
