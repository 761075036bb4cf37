"""Triton kernels, one file an op: equation, reference in plain torch, kernel, gradient, and the choice between them.

rms_norm              norm of rows, with an optional residual added before
qk_norm               the norm of queries and keys in one launch
cross_entropy         loss and log-sum-exp of one target or a bag of targets, without a second copy of the logits
linear_cross_entropy  the same straight from hidden states and the head, a chunk at a time
token_logprob         log-probability of given tokens, entropy and log-sum-exp in one reading
linear_token_logprob  the same from hidden states, without a gradient: scoring old and reference policies
flash_attention       exact attention without the [T, T] matrix: a kernel to read

Beside the ops: language (Triton or its stand-in), dispatch (which implementation runs, and why), checks (bad input),
configs (launch settings), cost (bytes and FLOPs), interpreter and machine_code (both as measuring instruments).
"""

from labkit.kernels.cross_entropy import cross_entropy
from labkit.kernels.flash_attention import flash_attention
from labkit.kernels.linear_cross_entropy import linear_cross_entropy
from labkit.kernels.qk_norm import qk_norm
from labkit.kernels.rms_norm import rms_norm
from labkit.kernels.token_logprob import linear_token_logprob, token_logprob

__all__ = ["cross_entropy", "flash_attention", "linear_cross_entropy", "linear_token_logprob", "qk_norm", "rms_norm",
           "token_logprob"]
