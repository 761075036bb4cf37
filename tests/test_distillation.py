"""Distillation losses equal their definitions in float64, value and gradient; the sampled one is unbiased for both; and
each planted fault is noticed."""

import importlib
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from planted import altered

from labkit.errors import LabError
from labkit.kernels import topk_kl
from labkit.objectives import PRESETS, TeacherList, distill_loss, future_cost, top_list
from labkit.objectives.menus import menu_of

objective = importlib.import_module("labkit.objectives.distillation")
DIRECTIONS = ["reverse", "forward", "jsd"]
SETTINGS = [{"support": "full"}, {"support": "topk", "k": 4}, {"support": "topk", "k": 4, "renormalize": False},
            {"support": "topk", "k": 11}, {"support": "topk", "k": 4, "mode": "tail"},
            {"support": "topk", "k": 4, "menu": "student"}, {"support": "topk", "k": 4, "menu": "union"},
            {"support": "topk", "k": 7, "menu": "intersection", "mode": "none"}]


def case(N=5, V=11, seed=0, scale=2.0, dtype=torch.float64):
    """Student and teacher logits far from uniform and from each other, and a token a row."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, N, V, generator=draw, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype), torch.randint(V, (N,), generator=draw)


def kl(a, b):
    """sum a log(a/b) over lists of numbers."""
    return sum(x * (x / y).log() for x, y in zip(a, b, strict=True))


def likeliest(p, k):
    return set(sorted(range(len(p)), key=lambda v: -p[v].item())[:k])


def textbook(student, teacher, direction, support="full", k=None, menu="teacher", mode=None, renormalize=True,
             beta=0.5):
    """Row by row and token by token, from probabilities."""
    mode, rows = mode or ("renorm" if renormalize else "none"), []
    for z, u in zip(student, teacher, strict=True):
        q, p = z.exp() / z.exp().sum(), u.exp() / u.exp().sum()
        of_p, of_q = (likeliest(each, k if support == "topk" else len(p)) for each in (p, q))
        kept = sorted({"teacher": of_p, "student": of_q, "union": of_p | of_q, "intersection": of_p & of_q}[menu])
        q, p = q[kept], p[kept]
        if mode == "renorm":
            q, p = q / q.sum(), p / p.sum()
        if mode == "tail":
            q, p = (torch.cat((each, 1 - each.sum()[None])) for each in (q, p))
        m = (1 - beta) * q + beta * p
        rows.append({"reverse": kl(q, p), "forward": kl(p, q), "jsd": (1 - beta) * kl(q, m) + beta * kl(p, m)}
                    [direction])
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


def assert_sampled_is_unbiased(baseline=False):
    student, teacher, token = case()
    student.requires_grad_()

    def sampled(token_N):
        return objective.distill_loss(student, teacher, support="sampled", token_N=token_N, baseline=baseline)

    full = distill_loss(student, teacher)
    torch.testing.assert_close(expectation(sampled, student), full, atol=1e-12, rtol=1e-12)
    mean_loss, full_loss = expectation(sampled, student).sum(), full.sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (mean_loss, full_loss)),
                               atol=1e-12, rtol=1e-12)
    logq, logp = (logits.log_softmax(1).gather(1, token[:, None]).squeeze(1) for logits in (student, teacher))
    torch.testing.assert_close(sampled(token), logq - logp, atol=1e-12, rtol=0)
    cost = (logq - logp - (full if baseline else 0)).detach()
    policy_gradient = torch.autograd.grad((cost * logq).sum(), student)[0]
    torch.testing.assert_close(torch.autograd.grad(sampled(token).sum(), student)[0], policy_gradient)


def test_the_sampled_loss_is_unbiased_for_value_and_gradient():
    """Enumerating every token that the student could have drawn, weighted by its probability: the mean value is
    KL(student, teacher) and the mean gradient its gradient. One token has the value d = log q - log p and the gradient
    d grad log q: another term of mean 0 would go unnoticed in the mean."""
    assert_sampled_is_unbiased()


def with_baseline():
    assert_sampled_is_unbiased(baseline=True)


def test_the_baseline_leaves_the_mean_and_lessens_the_variance():
    """The same two means with (d - KL) grad log q; where student and teacher differ by a constant cost, none is left:
    over tokens with equal ratios the gradient is exactly 0."""
    with_baseline()
    student, teacher, _ = case(N=200)
    student.requires_grad_()
    spread = []
    for baseline in (False, True):
        slopes = []
        for v in range(11):
            token = torch.full((200,), v)
            loss = distill_loss(student, teacher, support="sampled", token_N=token, baseline=baseline)
            slopes.append(torch.autograd.grad(loss.sum(), student)[0])
        q_NV = student.detach().softmax(1)
        spread.append(sum(q_NV[:, v] * slopes[v].square().sum(1) for v in range(11)).mean())
    assert spread[1] < 0.7 * spread[0]  # second moments; the means are equal


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


def test_menus_by_hand():
    """Whose tokens they are, each once, and the teacher's log-probabilities of them; the student's menu is fixed."""
    q, p = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]]).log(), torch.tensor([[0.05, 0.3, 0.1, 0.35, 0.2]]).log()
    for menu, expected in (("teacher", {1, 3}), ("student", {0, 1}), ("union", {0, 1, 3}), ("intersection", {1})):
        id_NK, logp_NK = menu_of(q, p, 2, menu)
        there = id_NK[0] >= 0
        assert sorted(id_NK[0][there].tolist()) == sorted(expected)
        torch.testing.assert_close(logp_NK[0][there], p[0, id_NK[0][there]])


def test_an_empty_intersection_has_no_loss():
    """Two models that share no likely token: loss 0 and no gradient, in every mode and direction."""
    student, teacher = torch.tensor([[9.0, 8.0, 0.0, 0.0]]).requires_grad_(), torch.tensor([[0.0, 0.0, 8.0, 9.0]])
    for direction in DIRECTIONS:
        for mode in ("renorm", "none", "stop_gradient"):
            if mode == "stop_gradient" and direction != "reverse":
                continue
            loss = distill_loss(student, teacher, support="topk", k=2, menu="intersection", mode=mode,
                                direction=direction)
            assert loss.item() == 0 and (torch.autograd.grad(loss.sum(), student)[0] == 0).all()


def test_a_list_stands_for_the_teacher():
    """What an API returns gives the loss that the logits give; a row with fewer tokens is a smaller menu, an empty row
    has loss 0; other menus need the logits."""
    student, teacher, token = case()
    listed = top_list(teacher, 4)
    for direction in DIRECTIONS:
        for mode in ("renorm", "tail", "none"):
            settings = {"support": "topk", "direction": direction, "mode": mode}
            torch.testing.assert_close(distill_loss(student, listed, **settings),
                                       distill_loss(student, teacher, k=4, **settings))
            short = TeacherList(listed.id_NK.clone(), listed.logp_NK)
            short.id_NK[0, 2:], short.id_NK[1] = -1, -1
            losses = distill_loss(student, short, **settings)
            assert losses[1] == 0
            torch.testing.assert_close(losses[0], distill_loss(student[:1], teacher[:1], k=2, **settings)[0])
    for settings in ({}, {"support": "sampled", "token_N": token}, {"support": "topk", "menu": "union"}):
        with pytest.raises(LabError, match="A TeacherList does not say"):
            distill_loss(student, listed, **settings)


# ---- what published code computes, re-derived from it in float64


def trl():
    """generalized_jsd_loss of TRL's GKDTrainer: kl_div(input, target) there is KL(target, input)."""
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        student, teacher, _ = case()
        mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
        student_log, teacher_log = theirs.log_softmax(-1), teacher.log_softmax(-1)
        if beta == 0:
            jsd = F.kl_div(student_log, teacher_log, reduction="none", log_target=True)
        elif beta == 1:
            jsd = F.kl_div(teacher_log, student_log, reduction="none", log_target=True)
        else:
            mixture = torch.logsumexp(torch.stack([student_log + math.log1p(-beta), teacher_log + math.log(beta)]), 0)
            jsd = (beta * F.kl_div(mixture, teacher_log, reduction="none", log_target=True)
                   + (1 - beta) * F.kl_div(mixture, student_log, reduction="none", log_target=True))
        same_gradient(objective.distill_loss(mine, teacher, **PRESETS["trl-gkd"].loss | {"beta": beta}), jsd.sum(1),
                      mine, theirs)


def thunlp():
    """compute_distillation_reward (student_p) and the policy loss over the K candidates, advantages detached."""
    student, teacher, _ = case(V=29)
    mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    log_p, candidate_NK = theirs.log_softmax(1).topk(16, dim=1)
    log_q = teacher.log_softmax(1).gather(1, candidate_NK)
    advantage_NK = (-log_p.softmax(1) * (log_p - log_q)).detach()
    ratio_NK = (log_p - log_p.detach()).exp()
    same_gradient(objective.distill_loss(mine, teacher, **PRESETS["thunlp-opd"].loss),
                  -(advantage_NK * ratio_NK).sum(1), mine, theirs)


def same_gradient(ours_N, theirs_N, mine, theirs, rows=slice(None)):
    """Two losses, each of its own leaf: equal values and gradients to 1e-6 (here 1e-10), with another weight a row."""
    weight_N = torch.arange(1, len(ours_N) + 1).double()
    torch.testing.assert_close(ours_N[rows], theirs_N[rows], atol=1e-10, rtol=1e-10)
    gradients = [torch.autograd.grad((weight_N * losses)[rows].sum(), leaf)[0]
                 for losses, leaf in ((ours_N, mine), (theirs_N, theirs))]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)
    assert gradients[0].abs().max() > 0.01


def test_trl_gkd():
    """Every beta, its ends included."""
    trl()


def test_thunlp_opd():
    """Value and gradient of the top-k reward as thunlp/OPD has it."""
    thunlp()


@pytest.mark.parametrize("preset", ["tinker-cookbook", "verl-k1", "thunlp-opd-sampled"])
def test_sampled_policy_gradients(preset):
    """-ratio * advantage with advantage -(logp_student - logp_teacher), ratio 1 on-policy: value up to its constant
    (theirs is -advantage), gradient in full."""
    student, teacher, token = case()
    mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    log_p, log_q = (logits.log_softmax(1).gather(1, token[:, None]).squeeze(1) for logits in (theirs, teacher))
    advantage = -(log_p - log_q).detach()
    ratio = (log_p - log_p.detach()).exp()
    same_gradient(distill_loss(mine, teacher, token_N=token, **PRESETS[preset].loss), -ratio * advantage, mine, theirs)


def test_verl_forward_top_k():
    """Sum over the teacher's k of q (log q - log p), clamped at 0 a row there: equal wherever it is positive."""
    student, teacher, _ = case(V=40, N=40)
    mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    log_q, kept = teacher.log_softmax(1).topk(32, dim=1)
    log_p = theirs.log_softmax(1).gather(1, kept)
    expected = (log_q.exp() * (log_q - log_p)).sum(1)
    ours = distill_loss(mine, teacher, **PRESETS["verl-forward-topk"].loss)
    same_gradient(ours, expected.clamp(min=0), mine, theirs, rows=expected.detach() > 0)
    assert (expected > 0).float().mean() > 0.9


def test_local_support_matching():
    """Softmax over the teacher's K gathered logits on both sides, differentiated as it stands."""
    student, teacher, _ = case(V=40)
    mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    kept = teacher.topk(32, dim=1).indices
    log_p, log_q = theirs.gather(1, kept).log_softmax(1), teacher.gather(1, kept).log_softmax(1)
    same_gradient(distill_loss(mine, teacher, **PRESETS["lsm"].loss), (log_p.exp() * (log_p - log_q)).sum(1), mine,
                  theirs)


def test_the_two_bins_of_a_server_never_exceed_the_full_divergence():
    """TRL's server trainer: {sampled token, all others}, a list of one token with a tail."""
    student, teacher, token = case(N=300)
    logp = teacher.log_softmax(1).gather(1, token[:, None])
    for direction in DIRECTIONS:
        two = distill_loss(student, TeacherList(token[:, None], logp), support="topk", mode="tail",
                           direction=direction)
        assert (two <= distill_loss(student, teacher, direction=direction) + 1e-12).all() and (two > 0).all()


# ---- the price of the future


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 1.0])
def test_future_cost_equals_a_loop(gamma):
    """Each row on its own, later counted positions only, discounted by their distance; masked places may be NaN."""
    draw = torch.Generator().manual_seed(0)
    cost_BA = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    mask_BA = torch.rand(5, 7, generator=draw) < 0.7
    cost_BA[~mask_BA] = math.nan
    expected = [[sum(gamma ** (later - t) * cost_BA[b, later] for later in range(t + 1, 7) if mask_BA[b, later])
                 if mask_BA[b, t] else 0.0 for t in range(7)] for b in range(5)]
    ours = future_cost(cost_BA, mask_BA, gamma)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))
    assert ours.abs().sum() > 0 or gamma == 0


def test_future_cost_of_nothing_and_of_nonsense():
    """No positions, no rows; a gamma that is no discount, and a mask of another shape."""
    assert future_cost(torch.ones(0, 3), torch.ones(0, 3), 0.5).shape == (0, 3)
    assert future_cost(torch.ones(2, 0), torch.ones(2, 0), 0.5).shape == (2, 0)
    with pytest.raises(LabError, match=r"gamma=1\.5"):
        future_cost(torch.ones(2, 3), torch.ones(2, 3), 1.5)
    with pytest.raises(LabError, match="mask_BA has shape"):
        future_cost(torch.ones(2, 3), torch.ones(2, 4), 0.5)


# ---- masks, types, bad input


def losses_of_every_kind(student, teacher, token, **settings):
    for baseline in (False, True):
        yield objective.distill_loss(student, teacher, support="sampled", token_N=token, baseline=baseline, **settings)
    yield objective.distill_loss(student, teacher, support="topk", k=4, mode="stop_gradient", **settings)
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
    ({"menu": "both"}, "no menu 'both'"),
    ({"mode": "sum"}, "no mode 'sum'"),
    ({"support": "topk", "k": 2, "mode": "stop_gradient", "direction": "forward"}, 'mode="stop_gradient" has no'),
    ({"baseline": True}, "Only a sampled cost has a baseline"),
    ({"direction": "jsd", "beta": 1.5}, "no beta=1.5"),
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
    (every_direction, "divergence", "+ beta * _kl(log_p_NK, log_m_NK)", "- beta * _kl(log_p_NK, log_m_NK)"),
    (trl, "divergence", "return (1 - beta) * _kl", "return beta * _kl"),
    (trl, "divergence", "((1 - beta) * log_q_NK.exp() + beta * log_p", "(beta * log_q_NK.exp() + (1 - beta) * log_p"),
    (trl, "divergence", "beta == 0", "beta == 1"),
    (every_direction, "_kl", "log_a_NK - log_b_NK", "log_b_NK - log_a_NK"),
    (every_direction, "_kl", ".sum(1)", ".mean(1)"),
    (every_direction, "_kl", "a_NK * torch", "a_NK.detach() * torch"),
    (every_direction, "distill_loss", '"renorm" if renormalize else "none"', '"none" if renormalize else "renorm"'),
    (every_direction, "_on_menu", 'if mode == "renorm"', 'if mode == "none"'),
    (every_direction, "_on_menu", 'if mode == "tail"', 'if mode == "none"'),
    (every_direction, "_on_menu", "direction=direction,", ""),
    (every_direction, "_on_menu", "mode=mode, ", ""),
    (every_direction, "_rest", "1 - log_NK", "2 - log_NK"),
    (thunlp, "_stop_gradient", "_shares(log_q_NK.detach(), never_NK).exp()", "log_q_NK.detach().exp()"),
    (thunlp, "_stop_gradient", "(log_q_NK - log_p_NK).detach()", "(log_q_NK - log_p_NK)"),
    (thunlp, "_stop_gradient", "log_q_NK - log_p_NK", "log_p_NK - log_q_NK"),
    (thunlp, "_stop_gradient", "cost_NK + cost_NK * (", "cost_NK * ("),
    (assert_sampled_is_unbiased, "_on_sample", "log_q_N - log_p_N).detach()", "log_p_N - log_q_N).detach()"),
    (assert_sampled_is_unbiased, "_on_sample", "(log_q_N - log_p_N).detach()", "log_q_N - log_p_N"),
    (assert_sampled_is_unbiased, "_on_sample", "d_N + cost_N * (", "d_N + ("),
    (assert_sampled_is_unbiased, "_on_sample", "d_N + cost_N * (", "d_N - cost_N * ("),
    (assert_sampled_is_unbiased, "_on_sample", "d_N + cost_N * (", "cost_N * ("),
    (with_baseline, "_on_sample", "cost_N = d_N - divergence", "cost_N = d_N + divergence"),
    (with_baseline, "_on_sample", '"reverse"', '"forward"'),
    (assert_masked_rows_are_zero, "distill_loss", "mask_N == 0", "mask_N != 0"),
    (assert_masked_rows_are_zero, "distill_loss", "student_NV.masked_fill(off_N[:, None], 0.0)", "student_NV"),
    (assert_masked_rows_are_zero, "distill_loss", "token_N.masked_fill(off_N, 0)", "token_N"),
    (assert_masked_rows_are_zero, "distill_loss", "loss_N.masked_fill(off_N, 0.0)", "loss_N"),
])
def test_a_planted_fault_is_noticed(monkeypatch, check, function, old, new):
    """The check passes, and fails with one place of the source altered."""
    check()
    wrong = altered(getattr(objective, function), function, old, new, vars(objective))
    monkeypatch.setattr(objective, function, wrong)
    with pytest.raises((AssertionError, LabError)):
        check()
