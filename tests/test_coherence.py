"""Gradients that add up or not: equal to one backward pass a position, to plain loops, and to what chance gives.

The module makes all position gradients at once by vmap from a closed form of the logits' gradient. The tests make them
one at a time with ordinary autograd through the KL itself, in float64, and compute every summary with loops.
"""

import math

import pytest
import torch

from labkit.errors import LabError
from labkit.measure import coherence_by, gradient_coherence, head_coherence, position_gradients
from labkit.measure.coherence import (
    PositionGradients,
    logit_gradient,
    norm_split,
    permuted_teacher,
    sketched_gradients,
)
from labkit.models import GPT, GPTConfig, answer_logits
from labkit.tasks.alphabet import END

V = 13
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(seed: int = 0, tied: bool = True) -> GPT:
    model = GPT(GPTConfig(V, 12, 8, 1, 2, tied=tied, qk_norm=True), seed=seed).double()
    generator = seeded(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return model


def batch(B: int = 5, T: int = 3, A: int = 4):
    generator = seeded(1)
    prompt_BT, answer_BA = (torch.randint(0, END, (B, size), generator=generator) for size in (T, A))
    answer_BA[1, 1:] = END
    answer_BA[2, 0] = END
    return prompt_BT, answer_BA


def vectors(N: int, P: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, P, generator=seeded(seed), dtype=torch.float64)


def one_by_one(student, teacher_BAV, prompt_BT, answer_BA, mask_BA):
    """[N, P]: the KL of one position, differentiated by autograd."""
    weights, rows = [weight for weight in student.parameters() if weight.requires_grad], []
    for b, t in mask_BA.nonzero().tolist():
        log_q = answer_logits(student, prompt_BT[b : b + 1], answer_BA[b : b + 1])[0, t].log_softmax(0)
        kl = (log_q.exp() * (log_q - teacher_BAV[b, t].log_softmax(0))).sum()
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(kl, weights)]))
    return torch.stack(rows)


def by_loops(rows):
    """All numbers of Coherence from Python sums."""
    N, G = len(rows), sum(rows)
    G2, total = sum(x * x for x in G.tolist()), sum(sum(x * x for x in row.tolist()) for row in rows)
    a = [sum(x * y for x, y in zip(row.tolist(), G.tolist(), strict=True)) / math.sqrt(G2) for row in rows]
    return (N, G2 / total, G2 / total / N, math.sqrt(G2) / N, math.sqrt(total / N), sum(a) / sum(map(abs, a)),
            sum(x < 0 for x in a) / N)


# ---- summaries


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 1), (300, 5), (5, 300)])
def test_every_number_is_that_of_plain_loops(shape):
    """Also across the pieces of 256 rows in which the sum is made."""
    grads_NP = vectors(*shape) + 0.1
    assert tuple(vars(gradient_coherence(grads_NP)).values()) == pytest.approx(by_loops(grads_NP), rel=1e-12)


def test_aligned_orthogonal_and_cancelling():
    """N equal rows have R = N, N axes R = 1, a row and its opposite R = 0: the three cases by which R is named."""
    aligned, axes = gradient_coherence(vectors(1, 6).expand(4, 6)), gradient_coherence(torch.eye(5) * 3)
    assert aligned.amplification == pytest.approx(4) and aligned.coherence == pytest.approx(1)
    assert aligned.projection_index == pytest.approx(1) and aligned.negative_share == 0
    assert axes.amplification == pytest.approx(1) and axes.rms == 3 and axes.norm == pytest.approx(3 / 5**0.5)
    row = vectors(1, 6)
    assert gradient_coherence(torch.cat((row, -row))).amplification == 0
    mostly = gradient_coherence(torch.cat((row, -0.9 * row)))
    assert mostly.amplification == pytest.approx(0.01 / 1.81) and mostly.negative_share == 0.5
    assert mostly.projection_index == pytest.approx(0.1 / 1.9)


def test_independent_directions_have_amplification_one():
    """200 sets of 40 random unit vectors in 50 dimensions: the mean of R is 1 within 4 standard errors, and its spread
    is near sqrt(2 / P) = 0.2, as the docstring says."""
    R = torch.tensor([gradient_coherence(torch.nn.functional.normalize(vectors(40, 50, seed), dim=1)).amplification
                      for seed in range(200)])
    assert abs(R.mean() - 1) < 4 * R.std() / 200**0.5 and 0.16 < R.std() < 0.24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_is_rms_times_root_of_coherence(dtype):
    """|G| / N = rms sqrt(C); fp32 rows are summed in float64."""
    each = gradient_coherence((vectors(600, 9) + 0.2).to(dtype))
    assert each.norm == pytest.approx(each.rms * math.sqrt(each.coherence), rel=1e-9)
    large = torch.full((100, 1), 1e7, dtype=dtype)  # in fp32 their sum swallows the ones
    swallowed = gradient_coherence(torch.cat((large, torch.ones(50, 1, dtype=dtype), -large)))
    assert swallowed.norm == pytest.approx(50 / 250, rel=1e-9)


def test_the_head_alone_needs_no_outer_products():
    """Against the outer products themselves, flattened."""
    ell_NV, hidden_ND = vectors(9, 5) + 0.3, vectors(9, 4, seed=1) - 0.2
    outer_NP = (ell_NV[:, :, None] * hidden_ND[:, None]).flatten(1)
    assert tuple(vars(head_coherence(ell_NV.float(), hidden_ND.float())).values()) == pytest.approx(
        tuple(vars(gradient_coherence(outer_NP)).values()), rel=1e-5)
    assert head_coherence(ell_NV, hidden_ND) != gradient_coherence(outer_NP + 0.1)


def test_within_times_across_is_the_whole():
    """By loops over groups of odd sizes with names that skip numbers; the product is exact."""
    grads_NP, group_N = vectors(301, 6) + 0.1, torch.tensor([7, 3, 3, -2, 7, 3, 40] * 43)
    each = coherence_by(grads_NP, group_N)
    groups = {k: [row for row, g in zip(grads_NP, group_N.tolist(), strict=True) if g == k] for k in (-2, 3, 7, 40)}
    sums = {k: sum(rows) for k, rows in groups.items()}
    apart = {k: sum(float(row @ row) for row in rows) for k, rows in groups.items()}
    joint = {k: float(total @ total) for k, total in sums.items()}
    whole = sum(sums.values())
    assert each.group_K.tolist() == [-2, 3, 7, 40]
    assert each.amplification_K.tolist() == pytest.approx([joint[k] / apart[k] for k in groups])
    assert each.within == pytest.approx(sum(joint.values()) / sum(apart.values()))
    assert each.across == pytest.approx(float(whole @ whole) / sum(joint.values()))
    assert each.total == pytest.approx(each.within * each.across) == pytest.approx(
        gradient_coherence(grads_NP).amplification)


def test_groups_say_where_coherence_lives():
    """Rows that agree at a position over rollouts and are orthogonal along each: R is B by position, 1 by rollout."""
    B, A = 6, 4
    grads_NP, n = torch.eye(A).repeat(B, 1), torch.arange(B * A)
    by_position, by_rollout = coherence_by(grads_NP, n % A), coherence_by(grads_NP, n // A)
    assert (by_position.within, by_position.across) == (B, 1)
    assert (by_rollout.within, by_rollout.across) == pytest.approx((1, B))


# ---- gradients of positions


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_each_row_is_one_backward_pass(tied, chunk):
    """Rows, their places and the columns of every tensor, for chunks that do and do not divide the batch."""
    student, teacher, data = tiny(0, tied), tiny(1), batch()
    with torch.no_grad():
        teacher_BAV = answer_logits(teacher, *data)
    expected_NP = one_by_one(student, teacher_BAV, *data, MASK)
    found = position_gradients(student, teacher, *data, MASK, chunk=chunk)
    torch.testing.assert_close(found.grads_NP, expected_NP)
    assert [found.rollout_N.tolist(), found.position_N.tolist()] == MASK.nonzero().T.tolist()
    assert list(found.blocks) == [name for name, _ in student.named_parameters()]
    assert sum(block.stop - block.start for block in found.blocks.values()) == found.grads_NP.shape[1]
    torch.testing.assert_close(found.grads_NP[:, found.blocks["blocks.0.ffn.down.weight"]], torch.stack(
        [row[found.blocks["blocks.0.ffn.down.weight"]] for row in expected_NP]))
    torch.testing.assert_close(position_gradients(student, teacher_BAV, *data, MASK).grads_NP, found.grads_NP)


def test_the_blocks_are_the_tensors_they_name():
    """The columns of one tensor equal its own gradient by name, not only by place; frozen tensors have none."""
    student, teacher, data = tiny(0, False), tiny(1), batch()
    student.embedding.weight.requires_grad_(False)
    found = position_gradients(student, teacher, *data, MASK)
    assert "embedding.weight" not in found.blocks
    log_q = answer_logits(student, *data)[0, 2].log_softmax(0)
    kl = (log_q.exp() * (log_q - answer_logits(teacher, *data)[0, 2].log_softmax(0).detach())).sum()
    for name in ("unembedding.weight", "norm.weight"):
        slope = torch.autograd.grad(kl, student.get_parameter(name), retain_graph=True)[0]
        torch.testing.assert_close(found.grads_NP[2, found.blocks[name]], slope.flatten())


def test_the_sum_is_the_gradient_of_the_whole_loss_and_nothing_is_left_changed():
    """By default positions up to END count; the rows add up to one ordinary backward pass. No gradient stays behind."""
    student, teacher, data = tiny(), tiny(1), batch()
    before = [weight.clone() for weight in student.parameters()]
    found = position_gradients(student, teacher, *data)
    assert len(found.grads_NP) == 4 + 2 + 1 + 4 + 4
    assert all(weight.grad is None and torch.equal(weight, old)
               for weight, old in zip(student.parameters(), before, strict=True))
    log_q, log_p = (answer_logits(model, *data).log_softmax(-1) for model in (student, teacher))
    mask_BA = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    ((log_q.exp() * (log_q - log_p.detach())).sum(-1) * mask_BA).sum().backward()
    whole_P = torch.cat([weight.grad.flatten() for weight in student.parameters()])
    torch.testing.assert_close(found.grads_NP.sum(0), whole_P)


def test_the_logits_gradient_is_that_of_autograd():
    """In fp32 as well; tokens that both forbid, or only the student, have none; one that only the teacher forbids makes
    the KL infinite, which is refused."""
    student_NV, teacher_NV = vectors(6, 5), vectors(6, 5, seed=1)
    student_NV[1, 2] = teacher_NV[1, 2] = student_NV[3, 0] = -math.inf
    student_NV[4, 1] = -5000.0  # the probability underflows to 0
    leaf_NV = student_NV.clone().requires_grad_()
    q = leaf_NV.softmax(1)
    safe = torch.where(q > 0, leaf_NV.log_softmax(1) - teacher_NV.log_softmax(1), 0.0)
    (q * safe).sum().backward()
    torch.testing.assert_close(logit_gradient(student_NV, teacher_NV), leaf_NV.grad.nan_to_num())
    teacher_NV[4, 1] = -math.inf
    assert logit_gradient(student_NV, teacher_NV)[4, 1] == 0
    teacher_NV[0, 0] = -math.inf
    with pytest.raises(LabError, match="not finite"):
        logit_gradient(student_NV, teacher_NV)


def test_the_heads_part_is_the_unembedding_block():
    """head_coherence of l and the hidden states equals gradient_coherence of the columns of an untied head."""
    student, teacher, data = tiny(0, False), tiny(1), batch()
    found = position_gradients(student, teacher, *data, MASK)
    with torch.no_grad():
        hidden_BTD = student.trunk(student.embed(torch.cat((data[0], data[1][:, :-1]), 1)))
    assert tuple(vars(head_coherence(found.ell_NV, hidden_BTD[:, 2:][MASK])).values()) == pytest.approx(
        tuple(vars(gradient_coherence(found.grads_NP[:, found.blocks["unembedding.weight"]])).values()))


def test_a_masked_position_may_hold_anything():
    """Infinite KLs where the mask is off are not looked at; a mask without a position gives no rows."""
    student, data = tiny(), batch()
    teacher_BAV = torch.zeros(5, 4, V, dtype=torch.float64)
    teacher_BAV[2, 1:, 0] = -math.inf
    assert position_gradients(student, teacher_BAV, *data, MASK).grads_NP.isfinite().all()
    none = position_gradients(student, teacher_BAV, *data, torch.zeros(5, 4))
    assert none.grads_NP.shape == (0, student.count_parameters()) and none.ell_NV.shape == (0, V)
    assert position_gradients(student, tiny(1), data[0][:0], data[1][:0]).grads_NP.shape[0] == 0


def test_the_sketch_has_the_gradients_inner_products_on_average():
    """Each column is g . r for the direction r, redrawn here; R from 400 directions is near the exact one."""
    student, teacher, data = tiny(), tiny(1), batch()
    grads_NP = position_gradients(student, teacher, *data, MASK).grads_NP
    sketch_Nm = sketched_gradients(student, teacher, *data, MASK, directions=3, generator=seeded(5))
    generator = seeded(5)
    direction_Pm = torch.stack([torch.cat([torch.randn(weight.shape, generator=generator, dtype=weight.dtype).flatten()
                                           for weight in student.parameters()]) for _ in range(3)], 1)
    torch.testing.assert_close(sketch_Nm, grads_NP @ direction_Pm / 3**0.5)
    many_Nm = sketched_gradients(student, teacher, *data, MASK, directions=400, generator=seeded(6))
    exact = gradient_coherence(grads_NP).amplification
    assert gradient_coherence(many_Nm).amplification == pytest.approx(exact, rel=4 * (2 / 400) ** 0.5)


# ---- the null, and the split of the norm


def test_the_null_permutes_rollouts_at_each_position():
    """Masked rows stay; at each position the rows that count are the same set, and over 400 draws each of the three
    rollouts that count at the last place gets each row a third of the time (4 sigma)."""
    teacher_BAV = torch.arange(20.0).view(5, 4, 1).expand(5, 4, 2)
    mask_BA = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    seen, generator = torch.zeros(3, 3), seeded()
    for _ in range(400):
        drawn_BAV = permuted_teacher(teacher_BAV, mask_BA, generator)
        assert torch.equal(drawn_BAV[~mask_BA], teacher_BAV[~mask_BA])
        for t in range(4):
            rows = mask_BA[:, t]
            assert torch.equal(drawn_BAV[rows, t, 1].sort().values, teacher_BAV[rows, t, 1])
        last = drawn_BAV[mask_BA[:, 3], 3, 0]
        for i, name in enumerate((3.0, 11.0, 19.0)):
            seen[:, i] += last == name
    assert ((seen / 400 - 1 / 3).abs() < 4 * (2 / 9 / 400) ** 0.5).all()
    assert torch.equal(permuted_teacher(teacher_BAV, mask_BA, seeded(3)),
                       permuted_teacher(teacher_BAV, mask_BA.float(), seeded(3)))


def test_the_parts_of_the_norm_add_up():
    """Each part by its definition in plain sums, and their total is the log ratio of the two mean gradients."""
    student, data = tiny(), batch()
    first, second = (position_gradients(student, tiny(seed), *data, MASK) for seed in (1, 2))
    split, rms = norm_split(first, second), []
    for each in (first, second):
        rms.append([math.sqrt(sum(x * x for x in rows.flatten().tolist()) / len(rows))
                    for rows in (each.ell_NV, each.grads_NP)])
    C = [by_loops(each.grads_NP)[2] for each in (first, second)]
    assert split.signal == pytest.approx(math.log(rms[0][0] / rms[1][0]))
    assert split.gain == pytest.approx(math.log(rms[0][1] / rms[0][0] / (rms[1][1] / rms[1][0])))
    assert split.coherence == pytest.approx(math.log(C[0] / C[1]) / 2) and abs(split.coherence) > 1e-3
    norms = [float(each.grads_NP.sum(0).norm()) for each in (first, second)]
    assert split.log_ratio == pytest.approx(math.log(norms[0] / norms[1]))
    assert split.signal + split.gain + split.coherence == pytest.approx(split.log_ratio)


def test_impossible_questions_are_refused():
    """One clear sentence for shapes that do not fit, empty sets, different N and gradients of nothing."""
    student, teacher, (prompt_BT, answer_BA) = tiny(), tiny(1), batch()
    found = position_gradients(student, teacher, prompt_BT, answer_BA)
    fewer = position_gradients(student, teacher, prompt_BT, answer_BA, MASK)
    still = PositionGradients(found.grads_NP * 0, found.ell_NV * 0, found.rollout_N, found.position_N, found.blocks)
    for ask in (lambda: gradient_coherence(torch.ones(3)), lambda: gradient_coherence(torch.ones(0, 3)),
                lambda: head_coherence(torch.ones(3, 2), torch.ones(2, 2)), lambda: norm_split(found, fewer),
                lambda: norm_split(found, still), lambda: coherence_by(torch.ones(3, 2), torch.zeros(2)),
                lambda: coherence_by(torch.ones(0, 2), torch.zeros(0)),
                lambda: position_gradients(student, teacher, prompt_BT[1:], answer_BA),
                lambda: position_gradients(student, teacher, prompt_BT, answer_BA, MASK[1:]),
                lambda: position_gradients(student, torch.zeros(5, 4, V + 1), prompt_BT, answer_BA),
                lambda: permuted_teacher(torch.zeros(5, 4, V), MASK[1:], seeded()),
                lambda: sketched_gradients(student, teacher, prompt_BT, answer_BA, directions=0, generator=seeded())):
        with pytest.raises(LabError):
            ask()
    none = gradient_coherence(torch.zeros(3, 2))
    assert math.isnan(none.amplification) and none.norm == none.rms == 0
