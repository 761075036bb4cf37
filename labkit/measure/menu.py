"""Do student and teacher choose from the same tokens? Row by row, at prefixes that the student visited.

A model's menu is its k likeliest next tokens. With q the student, p the teacher and I what their two menus share:

    overlap ratio       |I| / k               two menus drawn by chance share k / V
    overlap mass        q(I) and p(I)         what share of each model's choices the common tokens hold
    overlap advantage   (1 / |I|) sum_I q' (log p' - log q') = -KL(q', p') / |I|,   q' and p' renormalised on I
    entropy gap         H(p) - H(q), in nats, with its sign; its mean size is what the paper plots
    reverse KL          KL(q, p) over all V

The ratio counts tokens and not mass: where a model is nearly sure, the last places of its menu are noise of the tail,
and the ratio hardly moves while the mass and the KL do. So a second menu: the nucleus, the smallest set that holds a
share of the mass (0.98 here), whose size follows the model's doubt. The advantage looks only inside I, and its size
falls with |I|: a student can have a better one and yet learn less.
Sources: arXiv 2604.13016, section 4 (its p is the student and its q the teacher) and appendix C.2; the nucleus,
Holtzman et al., arXiv 1904.09751. verl's "overlap token advantage" is another number: weighted by the teacher, on the
teacher's top k, and not renormalised.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_devices, check_float, check_shape
from labkit.measure.distance import token_kl

ELEMENTS = 2**24  # logits turned to float64 at once
ROUNDING = 1e-9  # of a nucleus's mass: ten tokens of 0.1 hold 0.5 in five, whatever the sum's last digit is


@dataclass(frozen=True, eq=False)
class MenuOverlap:
    """Each tensor has one entry a row, float64. A mean over positions is the caller's, with its own mask."""

    shared_N: Tensor  # |I|, int64
    ratio_N: Tensor
    chance: float  # k / V
    student_mass_N: Tensor  # q(I)
    teacher_mass_N: Tensor  # p(I)
    student_menu_mass_N: Tensor  # of each model on its own menu
    teacher_menu_mass_N: Tensor
    advantage_N: Tensor  # in nats, 0 or less; NaN where the menus share nothing
    student_entropy_N: Tensor  # in nats
    teacher_entropy_N: Tensor
    kl_N: Tensor  # KL(q, p) over all V, in nats; +inf where the teacher forbids what the student allows

    @property
    def entropy_gap_N(self) -> Tensor:
        """H(p) - H(q): below 0 where the teacher is surer than the student."""
        return self.teacher_entropy_N - self.student_entropy_N

    @property
    def absolute_entropy_gap_N(self) -> Tensor:
        return self.entropy_gap_N.abs()


@dataclass(frozen=True, eq=False)
class NucleusOverlap:
    """Each tensor has one entry a row; the sizes are int64, the rest float64."""

    student_size_N: Tensor
    teacher_size_N: Tensor
    jaccard_N: Tensor  # tokens in both sets over tokens in either
    student_cross_mass_N: Tensor  # the student's mass on the teacher's nucleus
    teacher_cross_mass_N: Tensor  # the teacher's mass on the student's nucleus


def menu_overlap(student_logits_NV: Tensor, teacher_logits_NV: Tensor, k: int) -> MenuOverlap:
    """What the k likeliest tokens of student and teacher have in common, row by row.

    Args:
        student_logits_NV, teacher_logits_NV: one row a position, computed in float64 whatever they are. Of equal
            logits at the edge of a menu the lower ids are on it. Logits in bf16 often are equal.
        k: 1 to V. At k = V every ratio and mass is 1, and says nothing.
    Returns:
        MenuOverlap. Tokens of logit -inf are on no menu; where that leaves both menus with fewer than k, the ratio
        divides by the larger one, so that equal models have 1. A row with a NaN or +inf, or with no finite logit, is
        NaN in everything that needs it: leave it out with a mask, or see it in the mean.
    Raises:
        LabError: shapes, types or devices that do not fit, or k outside 1 to V.
    """
    _check(student_logits_NV, teacher_logits_NV)
    V = student_logits_NV.shape[1]
    if not isinstance(k, int) or not 1 <= k <= V:
        raise LabError(f"A menu of k={k} tokens cannot be chosen from a vocabulary of {V}.",
                       f"Give k a whole number from 1 to {V}, well below {V} for the overlap to mean something.")
    return MenuOverlap(**_by_parts(_menu_columns, student_logits_NV, teacher_logits_NV, k), chance=k / V)


def nucleus_overlap(student_logits_NV: Tensor, teacher_logits_NV: Tensor, mass: float = 0.98) -> NucleusOverlap:
    """How the smallest sets that hold `mass` of student and teacher compare, row by row.

    mass: above 0 and below 1. Of equal logits at a set's edge the lower ids are in it. A row that is no distribution
    (see menu_overlap) has an empty set, and NaN for what compares the two.
    Raises LabError for shapes, types or devices that do not fit, or another mass.
    """
    _check(student_logits_NV, teacher_logits_NV)
    if not 0 < mass < 1:
        raise LabError(f"There is no smallest set for a mass of {mass}.",
                       "Give a share above 0 and below 1, such as 0.98.")
    return NucleusOverlap(**_by_parts(_nucleus_columns, student_logits_NV, teacher_logits_NV, mass))


def menu(logits_NV: Tensor, k: int) -> Tensor:
    """Whether each token is among the k likeliest of its row, [N, V], bool: the lower ids of equals, none of -inf.

    Not the ids of topk, as these differ between devices where logits are equal.
    """
    least_N1 = logits_NV.topk(k, dim=1).values[:, -1:]
    above_NV = logits_NV > least_N1
    tied_NV = (logits_NV == least_N1) & (logits_NV > -math.inf)
    return above_NV | (tied_NV & (tied_NV.cumsum(1) <= k - above_NV.sum(1, keepdim=True)))


def nucleus(logits_NV: Tensor, mass: float) -> Tensor:
    """Whether each token is in the smallest set of its row that holds `mass`, [N, V], bool."""
    _, id_NV = logits_NV.sort(dim=1, descending=True, stable=True)
    sorted_NV = logits_NV.double().softmax(1).gather(1, id_NV)
    inside_NV = sorted_NV.cumsum(1) - sorted_NV < mass * (1 - ROUNDING)  # what the likelier ones hold is not enough
    return torch.zeros_like(inside_NV).scatter(1, id_NV, inside_NV)


def _menu_columns(student_NV: Tensor, teacher_NV: Tensor, k: int) -> dict[str, Tensor]:
    student_menu_NV, teacher_menu_NV = menu(student_NV, k), menu(teacher_NV, k)
    shared_NV = student_menu_NV & teacher_menu_NV
    q_NV, p_NV = student_NV.double().softmax(1), teacher_NV.double().softmax(1)
    broken_N = (q_NV + p_NV).isnan().any(1)
    shared_N = shared_NV.sum(1)
    larger_N = torch.maximum(student_menu_NV.sum(1), teacher_menu_NV.sum(1))
    kl_on_shared_N = token_kl(*(logits_NV.masked_fill(~shared_NV, -math.inf) for logits_NV in (student_NV, teacher_NV)))
    return {
        "shared_N": shared_N,
        "ratio_N": (shared_N.double() / larger_N).masked_fill(broken_N, math.nan),
        "student_mass_N": _mass(q_NV, shared_NV, broken_N),
        "teacher_mass_N": _mass(p_NV, shared_NV, broken_N),
        "student_menu_mass_N": (q_NV * student_menu_NV).sum(1),
        "teacher_menu_mass_N": (p_NV * teacher_menu_NV).sum(1),
        "advantage_N": (-kl_on_shared_N / shared_N).masked_fill(broken_N, math.nan),
        "student_entropy_N": torch.special.entr(q_NV).sum(1),
        "teacher_entropy_N": torch.special.entr(p_NV).sum(1),
        "kl_N": token_kl(student_NV, teacher_NV),
    }


def _nucleus_columns(student_NV: Tensor, teacher_NV: Tensor, mass: float) -> dict[str, Tensor]:
    student_set_NV, teacher_set_NV = nucleus(student_NV, mass), nucleus(teacher_NV, mass)
    q_NV, p_NV = student_NV.double().softmax(1), teacher_NV.double().softmax(1)
    broken_N = (q_NV + p_NV).isnan().any(1)
    both_N, either_N = (student_set_NV & teacher_set_NV).sum(1), (student_set_NV | teacher_set_NV).sum(1)
    return {
        "student_size_N": student_set_NV.sum(1),
        "teacher_size_N": teacher_set_NV.sum(1),
        "jaccard_N": (both_N.double() / either_N).masked_fill(broken_N, math.nan),
        "student_cross_mass_N": _mass(q_NV, teacher_set_NV, broken_N),
        "teacher_cross_mass_N": _mass(p_NV, student_set_NV, broken_N),
    }


def _mass(probability_NV: Tensor, set_NV: Tensor, broken_N: Tensor) -> Tensor:
    """A row whose set comes from a broken model has no mass of 0, but none at all."""
    return (probability_NV * set_NV).sum(1).masked_fill(broken_N, math.nan)


@torch.no_grad()
def _by_parts(columns: Callable[..., dict[str, Tensor]], student_NV: Tensor, teacher_NV: Tensor,
              setting: float) -> dict[str, Tensor]:
    """The columns of a few rows at a time, since several float64 tensors of [N, V] may not fit."""
    rows = max(1, ELEMENTS // max(1, student_NV.shape[1]))
    parts = [columns(*part, setting) for part in zip(student_NV.split(rows), teacher_NV.split(rows), strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _check(student_NV: Tensor, teacher_NV: Tensor) -> None:
    check_shape("student_logits_NV", student_NV, (None, None), "[N, V]")
    check_shape("teacher_logits_NV", teacher_NV, tuple(student_NV.shape), "the shape of the student's logits")
    for name, logits_NV in (("student_logits_NV", student_NV), ("teacher_logits_NV", teacher_NV)):
        check_float(name, logits_NV)
    check_devices(student_logits_NV=student_NV, teacher_logits_NV=teacher_NV)
    if not student_NV.shape[1]:
        raise LabError("Logits over a vocabulary of 0 are no distribution.", "Give [N, V] with V of 1 or more.")
