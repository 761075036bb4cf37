"""Distillation losses equal their definitions in float64, value and gradient; the sampled one is unbiased for both; and
each planted fault is noticed."""

import importlib
import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from labkit.errors import LabError
from labkit.kernels import topk_kl
from labkit.objectives import distill_loss

objective = importlib.import_module("labkit.objectives.distillation")
DIRECTIONS = ["reverse", "forward", "jsd"]
SETTINGS = [{"support": "full"}, {"support": "topk", "k": 4}, {"support": "topk", "k": 4, "renormalize": False},
            {"support": "topk", "k": 11}]


def case(N=5, V=11, seed=0, scale=2.0, dtype=torch.float64):
    """Student and teacher logits far from uniform and from each other, and a token a row."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, N, V, generator=draw, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype), torch.randint(V, (N,), generator=draw)


def kl(a, b):
    """sum a log(a/b) over lists of numbers."""
    return sum(x * (x / y).log() for x, y in zip(a, b, strict=True))


def textbook(student, teacher, direction, support="full", k=None, renormalize=True):
    """Row by row and token by token, from probabilities."""
    rows = []
    for z, u in zip(student, teacher, strict=True):
        q, p = z.exp() / z.exp().sum(), u.exp() / u.exp().sum()
        kept = sorted(range(len(p)), key=lambda v, p=p: -p[v].item())[: k if support == "topk" else len(p)]
        q, p = q[kept], p[kept]
        if renormalize:
            q, p = q / q.sum(), p / p.sum()
        m = (q + p) / 2
        rows.append({"reverse": kl(q, p), "forward": kl(p, q), "jsd": (kl(q, m) + kl(p, m)) / 2}[direction])
    return torch.stack(rows)


def assert_equals_textbook(direction, settings, atol, dtype=torch.float64):
    student, teacher, _ = case(dtype=dtype)
    mine, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    weight_N = torch.arange(1, 6)  # so that a row's gradient in another row's place shows
    loss_N = objective.distill_loss(mine, teacher, direction=direction, **settings)
    expected_N = textbook(theirs, teacher.double(), direction, **settings)
    torch.testing.assert_close(loss_N.double(), expected_N, atol=atol, rtol=atol)
    gradients = [torch.autograd.grad((weight_N * losses).sum(), leaf)[0].double()
                 for losses, leaf in ((loss_N, mine), (expected_N, theirs))]
    torch.testing.assert_close(*gradients, atol=10 * atol, rtol=0)
    assert gradients[1].abs().max() > 0.05


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_the_textbook(direction, settings):
    """Value and gradient, to 1e-12 in float64 and 1e-6 in fp32; the top V of V tokens are all tokens."""
    assert_equals_textbook(direction, settings, 1e-12)
    assert_equals_textbook(direction, settings, 1e-6, torch.float32)


def test_directions_agree_with_torch():
    """torch.nn.functional.kl_div is the oracle: kl_div(input, target) is KL(target, input)."""
    student, teacher, _ = case()
    logq, logp = student.log_softmax(1), teacher.log_softmax(1)
    for direction, (first, second) in (("reverse", (logq, logp)), ("forward", (logp, logq))):
        expected = F.kl_div(second, first, reduction="none", log_target=True).sum(1)
        torch.testing.assert_close(distill_loss(student, teacher, direction=direction), expected)


@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 60.0))
def test_divergences_have_their_bounds(seed, scale):
    """None is negative, equal distributions have none, jsd is symmetric and at most log 2; finite with logits of any
    size, in fp32, where probabilities underflow."""
    student, teacher, _ = case(seed=seed, scale=scale, dtype=torch.float32)
    student.requires_grad_()
    for direction in DIRECTIONS:
        loss = distill_loss(student, teacher, direction=direction)
        assert (loss > -1e-6).all() and torch.autograd.grad(loss.sum(), student)[0].isfinite().all()
        assert (distill_loss(teacher, teacher, direction=direction).abs() < 1e-6).all()
    jsd = distill_loss(student, teacher, direction="jsd")
    torch.testing.assert_close(jsd, distill_loss(teacher, student.detach(), direction="jsd"), atol=1e-6, rtol=1e-5)
    assert (jsd < math.log(2) + 1e-6).all()


# ---- one sampled token


def expectation(of, student):
    """The mean of a row statistic over all V tokens that could have been sampled, weighted by the student."""
    q_NV = student.detach().softmax(1)
    return sum(q_NV[:, v] * of(torch.full((len(student),), v)) for v in range(student.shape[1]))


def assert_sampled_is_unbiased():
    student, teacher, token = case()
    student.requires_grad_()

    def sampled(token_N):
        return objective.distill_loss(student, teacher, support="sampled", token_N=token_N)

    full = distill_loss(student, teacher)
    torch.testing.assert_close(expectation(sampled, student), full, atol=1e-12, rtol=1e-12)
    mean_loss, full_loss = expectation(sampled, student).sum(), full.sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (mean_loss, full_loss)),
                               atol=1e-12, rtol=1e-12)
    logq, logp = (logits.log_softmax(1).gather(1, token[:, None]).squeeze(1) for logits in (student, teacher))
    torch.testing.assert_close(sampled(token), logq - logp, atol=1e-12, rtol=0)
    policy_gradient = torch.autograd.grad(((logq - logp).detach() * logq).sum(), student)[0]
    torch.testing.assert_close(torch.autograd.grad(sampled(token).sum(), student)[0], policy_gradient)


def test_the_sampled_loss_is_unbiased_for_value_and_gradient():
    """Enumerating every token that the student could have drawn, weighted by its probability: the mean value is
    KL(student, teacher) and the mean gradient its gradient. One token has the value d = log q - log p and the gradient
    d grad log q: another term of mean 0 would go unnoticed in the mean."""
    assert_sampled_is_unbiased()


def test_differentiating_the_value_would_not_see_the_teacher():
    """The control: log q_y - log p_y, differentiated as it stands, has the mean gradient 0."""
    student, teacher, _ = case()
    student.requires_grad_()
    logq, logp = student.log_softmax(1), teacher.log_softmax(1)
    mean = expectation(lambda token: (logq - logp).gather(1, token[:, None]).squeeze(1), student).sum()
    assert torch.autograd.grad(mean, student)[0].abs().max() < 1e-15


# ---- the set


def test_top_k_is_the_teachers_and_the_gradient_stays_on_it():
    """Renormalised, only the teacher's k likeliest tokens have a gradient, and it is kernels.topk_kl's."""
    student, teacher, _ = case()
    student.requires_grad_()
    logp, ids = teacher.log_softmax(1).topk(3, dim=1)
    for direction in DIRECTIONS:
        loss = distill_loss(student, teacher, support="topk", k=3, direction=direction)
        gradient = torch.autograd.grad(loss.sum(), student)[0]
        assert torch.equal(gradient.abs() > 1e-12, torch.zeros_like(gradient).scatter(1, ids, 1.0) == 1)
        if direction != "jsd":
            torch.testing.assert_close(loss, topk_kl(student, ids, logp, direction=direction)[0], atol=0, rtol=0)


def test_one_renormalised_token_has_no_loss():
    """k = 1, renormalised: both sides are 1 on it, whatever they are elsewhere. Not renormalised, q log(q/p)."""
    student, teacher, _ = case()
    student.requires_grad_()
    for direction in DIRECTIONS:
        loss = distill_loss(student, teacher, support="topk", k=1, direction=direction)
        assert (loss.abs() < 1e-15).all() and (torch.autograd.grad(loss.sum(), student)[0].abs() < 1e-15).all()
    best = teacher.argmax(1, keepdim=True)
    q, p = (logits.softmax(1).gather(1, best).squeeze(1) for logits in (student, teacher))
    cut_short = distill_loss(student, teacher, support="topk", k=1, renormalize=False)
    torch.testing.assert_close(cut_short, q * (q / p).log())


def test_forbidden_tokens():
    """A token that both forbid (-inf) counts nowhere and makes no NaN; the rest is as if it were not in the
    vocabulary. What only the teacher forbids makes reverse infinite, jsd stays finite."""
    student, teacher, _ = case()
    both = [logits.clone().index_fill_(1, torch.tensor([2, 5]), -math.inf) for logits in (student, teacher)]
    rest = [logits[:, [v for v in range(11) if v not in (2, 5)]] for logits in (student, teacher)]
    for direction in DIRECTIONS:
        for settings in ({}, {"support": "topk", "k": 4}, {"support": "topk", "k": 4, "renormalize": False}):
            leaf = both[0].clone().requires_grad_()
            loss = distill_loss(leaf, both[1], direction=direction, **settings)
            torch.testing.assert_close(loss, distill_loss(*rest, direction=direction, **settings))
            assert torch.autograd.grad(loss.sum(), leaf)[0].isfinite().all()
        wide = distill_loss(*both, support="topk", k=11, direction=direction)  # more than the teacher allows
        torch.testing.assert_close(wide, distill_loss(*both, direction=direction))
    assert (distill_loss(student, both[1]) == math.inf).all()
    assert distill_loss(student, both[1], direction="jsd").isfinite().all()


# ---- masks, types, bad input


def losses_of_every_kind(student, teacher, token, **settings):
    yield objective.distill_loss(student, teacher, support="sampled", token_N=token, **settings)
    for direction in DIRECTIONS:
        for kind in SETTINGS:
            yield objective.distill_loss(student, teacher, direction=direction, **kind, **settings)


def assert_masked_rows_are_zero():
    student, teacher, token = case()
    mask = torch.tensor([True, False, True, True, False])
    full = list(losses_of_every_kind(student, teacher, token))
    student[~mask], teacher[~mask], token[~mask] = math.nan, math.nan, 10**6
    student.requires_grad_()
    for numbers in (mask, mask.long(), mask.double()):
        for loss, unmasked in zip(losses_of_every_kind(student, teacher, token, mask_N=numbers), full, strict=True):
            torch.testing.assert_close(loss, torch.where(mask, unmasked, 0.0), atol=0, rtol=0)
            gradient = torch.autograd.grad(loss.sum(), student)[0]
            assert (gradient[~mask] == 0).all() and gradient.isfinite().all()
            assert (gradient[mask] != 0).any(1).all()


def test_masked_rows_are_zero_whatever_stands_there():
    """NaN logits and impossible tokens under the mask leak into no loss and no gradient; other rows are untouched."""
    assert_masked_rows_are_zero()


def test_no_rows_at_all():
    """An empty batch, as a filter may leave it, has an empty loss."""
    for loss in losses_of_every_kind(torch.ones(0, 11), torch.ones(0, 11), torch.ones(0, dtype=torch.long)):
        assert loss.shape == (0,)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_fp32(half):
    """The loss of half-precision logits is that of the same values in fp32, and comes in fp32."""
    student, teacher, token = case(dtype=half)
    exact = losses_of_every_kind(student.double(), teacher.double(), token)
    for loss, expected in zip(losses_of_every_kind(student, teacher, token), exact, strict=True):
        assert loss.dtype == torch.float32 and expected.dtype == torch.float64
        torch.testing.assert_close(loss.double(), expected, atol=2e-6, rtol=1e-6)


def test_a_teacher_of_another_type_is_converted():
    """The student's type decides: fp32 for a float64 teacher, float64 for an fp32 one."""
    student, teacher, token = case()
    for mine, theirs in ((student.float(), teacher), (student, teacher.float())):
        for loss in losses_of_every_kind(mine, theirs, token):
            assert loss.dtype == mine.dtype


def test_only_the_student_gets_a_gradient():
    """The teacher is a constant in every kind of loss, even where its logits ask for a gradient."""
    student, teacher, token = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in case())
    for loss in losses_of_every_kind(student, teacher, token):
        loss.sum().backward()
        assert student.grad.abs().sum() > 0 and teacher.grad is None
        student.grad = None


@pytest.mark.parametrize(("change", "says"), [
    ({"support": "some"}, "no support 'some'"),
    ({"direction": "back"}, "no direction 'back'"),
    ({"support": "topk"}, "cannot use k=None"),
    ({"support": "topk", "k": 12}, "cannot use k=12 with a vocabulary of 11"),
    ({"support": "topk", "k": 0}, "cannot use k=0"),
    ({"support": "sampled"}, "needs the sampled tokens"),
    ({"support": "sampled", "token_N": torch.zeros(5, dtype=torch.long), "direction": "forward"}, "has no direction"),
    ({"support": "sampled", "token_N": torch.zeros(5, dtype=torch.long), "direction": "jsd"}, "has no direction"),
    ({"support": "sampled", "token_N": torch.zeros(4, dtype=torch.long)}, "token_N has shape"),
    ({"support": "sampled", "token_N": torch.full((5,), 11)}, "holds the id 11"),
    ({"teacher_logits_NV": torch.zeros(5, 12)}, "teacher_logits_NV has shape"),
    ({"teacher_logits_NV": torch.zeros(5, 11).long()}, "not a floating type"),
    ({"mask_N": torch.ones(4)}, "mask_N has shape"),
])
def test_bad_input_gets_a_sentence(change, says):
    """What a caller can get wrong is named, and sampled losses that have no definition are refused."""
    with pytest.raises(LabError, match=re.escape(says)):
        distill_loss(**({"student_logits_NV": torch.zeros(5, 11), "teacher_logits_NV": torch.zeros(5, 11)} | change))


# ---- planted faults


def every_direction():
    """What test_equals_the_textbook asserts in float64."""
    for direction in DIRECTIONS:
        for settings in SETTINGS:
            assert_equals_textbook(direction, settings, 1e-12)


@pytest.mark.parametrize(("check", "function", "old", "new"), [
    (every_direction, "divergence", "return _kl(log_q_NK, log_p_NK)", "return _kl(log_p_NK, log_q_NK)"),
    (every_direction, "divergence", "return _kl(log_p_NK, log_q_NK)", "return _kl(log_q_NK, log_p_NK)"),
    (every_direction, "divergence", "+ _kl(log_p_NK, log_m_NK)", "- _kl(log_p_NK, log_m_NK)"),
    (every_direction, "divergence", "log_m_NK)) / 2", "log_m_NK))"),
    (every_direction, "divergence", "log_p_NK.exp()) / 2)", "log_p_NK.exp()))"),
    (every_direction, "_kl", "log_a_NK - log_b_NK", "log_b_NK - log_a_NK"),
    (every_direction, "_kl", ".sum(1)", ".mean(1)"),
    (every_direction, "_kl", "a_NK * torch", "a_NK.detach() * torch"),
    (every_direction, "_on_top_k", "topk(k, dim=1)", "topk(k, dim=1, largest=False)"),
    (every_direction, "_on_top_k", " - teacher_NV.logsumexp(1, keepdim=True)", ""),
    (every_direction, "_on_top_k", '"renorm" if renormalize else "none"', '"none" if renormalize else "renorm"'),
    (every_direction, "_on_top_k", "if renormalize:", "if not renormalize:"),
    (every_direction, "_on_top_k", "direction=direction,", ""),
    (assert_sampled_is_unbiased, "_on_sample", "log_q_N - log_p_N).detach()", "log_p_N - log_q_N).detach()"),
    (assert_sampled_is_unbiased, "_on_sample", "(log_q_N - log_p_N).detach()", "log_q_N - log_p_N"),
    (assert_sampled_is_unbiased, "_on_sample", "d_N + d_N * (", "d_N + ("),
    (assert_sampled_is_unbiased, "_on_sample", "d_N + d_N * (", "d_N - d_N * ("),
    (assert_sampled_is_unbiased, "_on_sample", "d_N + d_N * (", "d_N * ("),
    (assert_masked_rows_are_zero, "distill_loss", "mask_N == 0", "mask_N != 0"),
    (assert_masked_rows_are_zero, "distill_loss", "student_NV.masked_fill(off_N[:, None], 0.0)", "student_NV"),
    (assert_masked_rows_are_zero, "distill_loss", "token_N.masked_fill(off_N, 0)", "token_N"),
    (assert_masked_rows_are_zero, "distill_loss", "loss_N.masked_fill(off_N, 0.0)", "loss_N"),
])
def test_a_planted_fault_is_noticed(monkeypatch, check, function, old, new):
    """The check passes, and fails with one place of the source altered."""
    check()
    right = getattr(objective, function)
    text, altered = inspect.getsource(right), {}
    assert text.count(old) == 1
    exec(compile(text.replace(old, new), function, "exec"), vars(objective), altered)
    monkeypatch.setattr(objective, function, altered[function])
    with pytest.raises((AssertionError, LabError)):
        check()
