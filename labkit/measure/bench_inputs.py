"""Inputs of benchmarks that look like training, drawn on the device from a generator.

Some kernels' time depends on the data: Cut Cross-Entropy skips tiles of a small gradient, a gather of repeated rows is
served by the cache, a GPU runs zeros faster. So ids follow Zipf's law, logits come from hidden states and a head with
some rows sharply peaked at their target, the teacher is the student with noise, log-ratios have heavy tails.
"""

import torch
from torch import Tensor

RANK = 64  # of the product that makes logits: enough for correlated tokens, and cheap
SHARP = 0.1  # part of the rows whose target is nearly certain, as in text
CHUNK = 1024  # rows of fp32 logits at a time
NOISE = 0.5  # of the teacher's logits around the student's, which have a spread of about 2


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers on the generator's device, drawn in `dtype` so that no fp32 copy of a large tensor exists."""
    return torch.empty(shape, dtype=dtype, device=generator.device).normal_(0.0, scale, generator=generator)


def zipf_ids(generator: torch.Generator, V: int, *shape: int) -> Tensor:
    """Ids of [0, V) with probability in proportion to 1/(id + 3): the frequencies of words, nearly."""
    rank = torch.arange(V, device=generator.device, dtype=torch.float64)
    cumulative = (1.0 / (rank + 3.0)).cumsum(0)
    drawn = torch.rand(shape, device=generator.device, dtype=torch.float64, generator=generator) * cumulative[-1]
    return torch.searchsorted(cumulative, drawn).clamp(max=V - 1)


def log_prior(V: int, device: torch.device) -> Tensor:
    """What Zipf's law adds to each token's logit, [V]."""
    return -torch.log(torch.arange(V, device=device, dtype=torch.float32) + 3.0)


def training_logits(generator: torch.Generator, N: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and Zipf targets [N]; a tenth of the rows puts most of its mass on its target."""
    hidden_NR = normal(generator, N, RANK, scale=RANK**-0.5)
    head_VR = normal(generator, V, RANK, scale=2.0)
    target_N = zipf_ids(generator, V, N)
    logits_NV = torch.empty(N, V, dtype=dtype, device=generator.device)
    for start in range(0, N, CHUNK):
        rows = slice(start, start + CHUNK)
        logits_NV[rows] = (hidden_NR[rows] @ head_VR.T + log_prior(V, generator.device)).to(dtype)
    sharp = torch.arange(0, N, round(1 / SHARP), device=generator.device)
    logits_NV[sharp, target_N[sharp]] = 16.0
    return logits_NV, target_N


def hidden_and_head(generator: torch.Generator, N: int, V: int, H: int,
                    dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, H], a head [V, H] and Zipf targets [N]; a tenth of the rows lies along its target's row."""
    weight_VH = normal(generator, V, H, dtype=dtype, scale=H**-0.5)
    hidden_NH = normal(generator, N, H, dtype=dtype, scale=2.0)
    target_N = zipf_ids(generator, V, N)
    sharp = slice(None, None, round(1 / SHARP))
    hidden_NH[sharp] += 16.0 * weight_VH[target_N[sharp]]
    return hidden_NH, weight_VH, target_N


def teacher_set(generator: torch.Generator, logits_CV: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """The K likeliest ids of a teacher near these logits, and their log-probabilities (fp32), [C, K] each."""
    teacher_CV = logits_CV.float() + normal(generator, *logits_CV.shape, scale=NOISE)
    top = teacher_CV.topk(K, dim=1)
    return top.indices, top.values - teacher_CV.logsumexp(1, keepdim=True)


def teacher_sets(generator: torch.Generator, chunks: list[Tensor], K: int) -> tuple[Tensor, Tensor]:
    """teacher_set for logits that come in chunks of rows (or for hidden states: functions that make them)."""
    parts = [teacher_set(generator, chunk() if callable(chunk) else chunk, K) for chunk in chunks]
    ids, logp = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(logp)


def log_ratios(generator: torch.Generator, *shape: int) -> Tensor:
    """Log-ratios of new and old policy: Student's t with 3 degrees of freedom, of scale 0.05."""
    squares = normal(generator, 3, *shape).square().mean(0)
    return 0.05 * normal(generator, *shape) / squares.sqrt()
