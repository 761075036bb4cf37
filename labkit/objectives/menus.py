"""Which tokens a top-k divergence sums over: the menu of a position, and what the teacher says of it.

    teacher        the k tokens that the teacher likes best       (local support matching, arXiv 2603.25562)
    student        the k that the student likes best              (arXiv 2604.13016)
    union, intersection                                           of these two
    a TeacherList  the tokens that the teacher's server has sent, with their log-probabilities and no others

A menu is a row of ids with -1 in the places that hold no token, as labkit.kernels.topk_kl takes it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from labkit.errors import LabError

MENUS = ("teacher", "student", "union", "intersection")


class TeacherList(NamedTuple):
    """The likeliest tokens of a teacher whose logits nobody sees, as an API returns them."""

    id_NK: Tensor  # int64; -1 fills the rows of a teacher that returned fewer than K
    logp_NK: Tensor  # natural logarithms of probabilities over the whole vocabulary


def top_list(teacher_logits_NV: Tensor, k: int | None) -> TeacherList:
    """What an API with `logprobs=k` would return. Raises LabError for a k that the vocabulary has not."""
    V = teacher_logits_NV.shape[1]
    if k is None or not 1 <= k <= V:
        raise LabError(f"A teacher with {V} tokens cannot list its k={k} likeliest.", f"Give k a value from 1 to {V}.")
    logp_NK, id_NK = teacher_logits_NV.log_softmax(1).topk(k, dim=1)
    return TeacherList(id_NK, logp_NK)


def menu_of(student_NV: Tensor, teacher_NV: Tensor, k: int, menu: str) -> TeacherList:
    """The ids of a menu made from both models' logits, and the teacher's log-probabilities of them.

    [N, k] ids, [N, 2k] for the union. Places whose token is not in the menu, or is already there, hold -1.
    """
    listed = top_list(teacher_NV, k)
    if menu == "teacher":
        return listed
    of_teacher_NK = listed.id_NK
    id_NK = of_student_NK = student_NV.detach().topk(k, dim=1).indices
    shared_NK = (of_student_NK[:, :, None] == of_teacher_NK[:, None, :]).any(2)
    if menu == "intersection":
        id_NK = of_student_NK.where(shared_NK, -1)
    elif menu == "union":
        id_NK = torch.cat((of_teacher_NK, of_student_NK.where(~shared_NK, -1)), 1)
    return TeacherList(id_NK, teacher_NV.log_softmax(1).gather(1, id_NK.clamp(min=0)))
