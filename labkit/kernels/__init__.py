"""Triton kernels, one file an op: equation, reference in plain torch, kernel, gradient, and the choice between them.

cross_entropy   loss and log-sum-exp of one target or a bag of targets, without a second copy of the logits

Beside the ops: language (Triton or its stand-in), dispatch (which implementation runs, and why), checks (bad input),
configs (launch settings), cost (bytes and FLOPs), interpreter and machine_code (both as measuring instruments).
"""

from labkit.kernels.cross_entropy import cross_entropy

__all__ = ["cross_entropy"]
