"""The true variance of a policy gradient, for every way to weight a sequence's tokens, from one pass over the scores.

    g_bt  = grad log pi(y_bt | ...)                       the score of token t of sequence b, a vector of all weights
    G_b   = sum_t k_bt g_bt                               what sequence b adds to the gradient, with coefficients k
    k_bt  = A_b I_b rho_b W_bt                            a power mean of exponent p: rho its value, I 0 where clipped,
    W_bt  = softmax_t(p (log pi - log pi_old)_bt)              W how it shares the gradient among the tokens
    |G_b|^2 = k_b^T Gram_b k_b,   Gram_btu = g_bt . g_bu      so scores are needed once, not once for every p

Variance of one sequence's gradient, the sum of it over all weights:

    Var = B / (B - 1) * (mean_b |G_b|^2 - |mean_b G_b|^2)        unbiased for independent sequences

The last term takes one ordinary backward pass. Source: Hoelder policy optimisation, arXiv 2605.12058 (the bound of its
theorem 2 is `variance_bound`; theorem 7 supposes equal score norms, which `score_norms` shows).
"""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit.errors import LabError
from labkit.kernels.checks import check_shape
from labkit.kernels.holder_objective import holder_objective
from labkit.models import GPT, answer_logits
from labkit.tasks import answer_mask

SCORE_BYTES = 2**26  # scores held at once; larger chunks are slower on a CPU, whose caches they leave


class _AnswerLogprob(nn.Module):
    """log p of each token of one answer, as a module, so that functional_call can exchange the weights."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, prompt_T: Tensor, answer_A: Tensor) -> Tensor:
        logp_AV = answer_logits(self.model, prompt_T[None], answer_A[None])[0].log_softmax(-1)
        return logp_AV.gather(1, answer_A[:, None]).squeeze(1)


@torch.no_grad()
def token_gram(model: GPT, prompt_BT: Tensor, answer_BA: Tensor, mask_BA: Tensor | None = None, *,
               chunk: int | None = None) -> Tensor:
    """Inner products of the scores of each answer's tokens, [B, A, A]; rows and columns of masked tokens are 0.

    Args:
        mask_BA: tokens that count; by default those up to the answer's END, that included.
        chunk: sequences whose scores [chunk, A, all weights] are held at once; by default about 64 MB of them.
    Raises LabError for shapes that do not fit.
    """
    mask_BA = _mask(prompt_BT, answer_BA, mask_BA)
    scorer, weights, size = _trainable(model)
    A = answer_BA.shape[1]
    chunk = chunk or max(1, SCORE_BYTES // (4 * max(1, A) * size))
    scores = vmap(jacrev(lambda *inputs: functional_call(scorer, *inputs[:1], inputs[1:])), in_dims=(None, 0, 0))
    grams = [answer_BA.new_zeros(0, A, A, dtype=model.embedding.weight.dtype)]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule: vmap would loop, with a warning
        for prompt_CT, answer_CA in zip(prompt_BT.split(chunk), answer_BA.split(chunk), strict=True):
            if answer_CA.numel():
                parts = (part.flatten(2) for part in scores(weights, prompt_CT, answer_CA).values())
                grams.append(sum(part_CAP @ part_CAP.mT for part_CAP in parts))
    both_BAA = mask_BA[:, :, None] & mask_BA[:, None, :]
    return torch.where(both_BAA, torch.cat(grams), 0.0)


@torch.no_grad()
def fisher_diagonal(model: GPT, prompt_BT: Tensor, answer_BA: Tensor, mask_BA: Tensor | None = None, *,
                    chunk: int | None = None) -> dict[str, Tensor]:
    """F_i = mean_b (d log pi(y_b) / d w_i)^2, by name: the diagonal of the Fisher information of whole answers.

    Draw the answers from `model` itself. One backward pass a sequence, `chunk` of them at once.
    """
    mask_BA = _mask(prompt_BT, answer_BA, mask_BA)
    if not len(answer_BA):
        raise LabError("There is no answer to take the Fisher information of.", "Give at least one sequence.")
    scorer, weights, size = _trainable(model)
    chunk = chunk or max(1, SCORE_BYTES // (4 * size))

    def logprob(weights, prompt_T, answer_A, mask_A):
        return torch.where(mask_A, functional_call(scorer, weights, (prompt_T, answer_A)), 0.0).sum()

    slopes = vmap(grad(logprob), in_dims=(None, 0, 0, 0))
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    with sdpa_kernel(SDPBackend.MATH):
        for part in zip(prompt_BT.split(chunk), answer_BA.split(chunk), mask_BA.split(chunk), strict=True):
            for name, slope in slopes(weights, *part).items():
                total[name] += slope.square().sum(0)
    return {name.removeprefix("model."): value / len(answer_BA) for name, value in total.items()}


def second_moment(gram_BAA: Tensor, coefficient_BA: Tensor) -> Tensor:
    """mean_b |G_b|^2 = mean_b k_b^T Gram_b k_b."""
    check_shape("coefficient_BA", coefficient_BA, tuple(gram_BAA.shape[:2]), "[B, A]")
    coefficient_BA = coefficient_BA.to(gram_BAA.dtype)
    return torch.einsum("ba,bac,bc->b", coefficient_BA, gram_BAA, coefficient_BA).mean()


def mean_gradient(model: GPT, prompt_BT: Tensor, answer_BA: Tensor, coefficient_BA: Tensor) -> dict[str, Tensor]:
    """(1/B) sum_b sum_t k_bt g_bt by name, from one ordinary backward pass: the ascent direction of the objective."""
    check_shape("coefficient_BA", coefficient_BA, tuple(answer_BA.shape), "the shape of answer_BA")
    names, weights = zip(*((n, w) for n, w in model.named_parameters() if w.requires_grad), strict=True)
    logp_BA = answer_logits(model, prompt_BT, answer_BA).log_softmax(-1).gather(2, answer_BA[..., None]).squeeze(2)
    # where, not a product alone: a masked token may be one that the model forbids, with log p = -inf
    gain = torch.where(coefficient_BA != 0, coefficient_BA.detach().to(logp_BA) * logp_BA, 0.0).sum() / len(answer_BA)
    return dict(zip(names, torch.autograd.grad(gain, weights, materialize_grads=True), strict=True))


def sequence_variance(model: GPT, prompt_BT: Tensor, answer_BA: Tensor, gram_BAA: Tensor,
                      coefficient_BA: Tensor) -> float:
    """Variance of one sequence's gradient, summed over the weights. Divide by B for the variance of a batch's mean.

    gram_BAA comes from `token_gram` with the same weights. Raises LabError for fewer than two sequences.
    """
    B = len(answer_BA)
    if B < 2:
        raise LabError(f"{B} sequence has no variance.", "Give two or more.")
    mean = mean_gradient(model, prompt_BT, answer_BA, coefficient_BA)
    squared_mean = sum(part.double().square().sum() for part in mean.values())
    return float(B / (B - 1) * (second_moment(gram_BAA.double(), coefficient_BA) - squared_mean))


def score_norms(gram_BAA: Tensor) -> Tensor:
    """|g_bt|, [B, A]; 0 for masked tokens."""
    return gram_BAA.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()


def token_weights(logp_BA: Tensor, old_logp_BA: Tensor, mask_BA: Tensor, p: float) -> Tensor:
    """W_bt = r^p / sum r^p over a sequence's tokens, r = pi / pi_old; 0 for masked tokens, also where all are."""
    change_BA = torch.where(mask_BA, p * (logp_BA - old_logp_BA), float("-inf"))
    return torch.where(mask_BA, change_BA.softmax(1), 0.0)


def weight_entropy(weight_BA: Tensor) -> Tensor:
    """-sum_t W log W of each sequence, [B], in nats: log n, its largest value, at p = 0 (paper, theorem 1)."""
    return torch.special.entr(weight_BA).sum(1)


def holder_coefficients(logp_BA: Tensor, old_logp_BA: Tensor, advantage_B: Tensor, mask_BA: Tensor, p: float, *,
                        clip_low: float = 0.2, clip_high: float = 0.2,
                        level: str = "sequence") -> tuple[Tensor, Tensor]:
    """k_bt = A I rho W of labkit.kernels.holder_objective, and log rho_b before any clip of the mean: [B, A] and [B].

    k is -B times the loss's gradient with respect to logp_BA, in closed form. `level` "sequence": I is 0 for all tokens
    of a sequence whose rho the clip cuts. "token": rho and W are of the ratios after each was cut, and I is 0 for those
    tokens. Raises LabError as holder_objective does.
    """
    _, stats = holder_objective(logp_BA, old_logp_BA, advantage_B, None, p, clip_low, clip_high, level, mask=mask_BA,
                                impl="reference")
    log_rho_B, mask_BA = stats["log_ratio_B"], mask_BA != 0
    change_BA = torch.where(mask_BA, logp_BA - old_logp_BA, 0.0).detach()
    A_B1 = advantage_B[:, None].to(change_BA.dtype)
    compared = change_BA if level == "token" else log_rho_B[:, None]
    high, low = math.log1p(clip_high), math.log1p(-clip_low)
    cut = ((A_B1 > 0) & (compared > high)) | ((A_B1 < 0) & (compared < low))
    if level == "token":
        change_BA = torch.where(cut, torch.where(A_B1 > 0, high, low).to(change_BA.dtype), change_BA)
    weight_BA = token_weights(change_BA, torch.zeros_like(change_BA), mask_BA, p)
    scale_B1 = A_B1 * log_rho_B[:, None].exp()
    return torch.where(cut | (A_B1 == 0), 0.0, scale_B1 * weight_BA), log_rho_B


def variance_bound(advantage_B: Tensor, log_rho_B: Tensor, score_norm_BA: Tensor | None = None) -> float:
    """M^2 E[A^2 rho^2] >= mean_b |G_b|^2, M the largest score norm; without score_norm_BA, M = 1 (paper, theorem 2).

    The paper's bound on the mean of B sequences is this over B. It rises with p, whatever the true variance does.
    """
    mean = (advantage_B.double().square() * (2 * log_rho_B.double()).exp()).mean()
    return float(mean if score_norm_BA is None else mean * score_norm_BA.double().max() ** 2)


def _trainable(model: GPT) -> tuple[nn.Module, dict[str, Tensor], int]:
    """A scorer round the model, its weights by the scorer's names, and how many numbers they are."""
    scorer = _AnswerLogprob(model)
    weights = {name: weight.detach() for name, weight in scorer.named_parameters() if weight.requires_grad}
    return scorer, weights, sum(weight.numel() for weight in weights.values())


def _mask(prompt_BT: Tensor, answer_BA: Tensor, mask_BA: Tensor | None) -> Tensor:
    check_shape("prompt_BT", prompt_BT, (len(answer_BA), None), "[B, T]")
    check_shape("answer_BA", answer_BA, (None, None), "[B, A]")
    mask_BA = answer_mask(answer_BA) if mask_BA is None else mask_BA != 0
    check_shape("mask_BA", mask_BA, tuple(answer_BA.shape), "the shape of answer_BA")
    return mask_BA
