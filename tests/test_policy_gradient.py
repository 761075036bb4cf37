"""Each policy objective equals its peers' published code, written out token by token in float64; and each planted
fault (a sign, a bound, a mask, a mean) is noticed."""

import importlib
import math
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planted import altered

from labkit.errors import LabError
from labkit.measure import power_mean
from labkit.objectives import PUBLISHED_CLIPS, group_advantage, policy_loss, reference_kl

objective = importlib.import_module("labkit.objectives.policy_gradient")
op = importlib.import_module("labkit.kernels.holder_objective")
LOW, HIGH = 0.15, 0.35  # unequal, so that bounds taken for each other show
ARMS = {"grpo": {}, "dr_grpo": {}, "dapo": {}, "gmpo": {}, "gspo": {},
        "holder p=2": {"p": 2.0}, "holder p=-2": {"p": -2.0}, "holder p=0": {"p": 0.0},
        "holder p=2 token": {"p": 2.0, "level": "token"}, "holder p=-1 token": {"p": -1.0, "level": "token"}}
EXPONENTS = [-8.0, -1.0, -1e-7, 0.0, 1e-7, 0.5, 1.0, 2.0, 8.0]


def ours(arm: str, logp, old, advantage, mask, low=LOW, high=HIGH):
    return objective.policy_loss(logp, old, advantage, mask, method=arm.split()[0], clip_low=low, clip_high=high,
                                 **ARMS[arm])


def batch(seed: int, lengths=(6, 1, 4, 7, 3, 5), T=7, scale=0.4, dtype=torch.float64):
    """Ragged answers of both signs of the advantage, each on either side of both bounds; NaN where nothing counts."""
    draw = torch.Generator().manual_seed(seed)
    B = len(lengths)
    old = -3 * torch.rand(B, T, generator=draw, dtype=torch.float64)
    logp = old + scale * torch.randn(B, T, generator=draw, dtype=torch.float64)
    shift = torch.tensor([0.3, -0.3, 0.0])[torch.arange(B) % 3]  # so that whole sequences are cut as well
    logp += shift[:, None]
    advantage = torch.randn(B, generator=draw, dtype=torch.float64)
    advantage *= torch.where(torch.arange(B) // 3 % 2 == 0, 1.0, -1.0) * advantage.sign()
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    mask &= (torch.rand(B, T, generator=draw) > 0.15) | (torch.arange(T) == 0)  # and holes, as tools leave them
    logp, old = (tensor.masked_fill(~mask, math.nan) for tensor in (logp, old))
    return logp.to(dtype), old.to(dtype), advantage.to(dtype), mask


# ---- the peers' code, one loop a method, in float64; a response is a list of (logp, old_logp) that count


def clipped(ratio, A, low, high):
    """min(r A, clip(r) A): the body of TRL's, verl's and HölderPO's losses."""
    return torch.min(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


def grpo_of_trl(answers, A, T, low, high):
    total = 0.0
    for answer, a in zip(answers, A, strict=True):
        token_losses = [-clipped((new - old).exp(), a, low, high) for new, old in answer]
        total = total + sum(token_losses) / max(len(answer), 1)
    return total / len(answers)


def dr_grpo_of_trl(answers, A, T, low, high):
    """max_completion_length is the padded width here."""
    token_losses = [-clipped((new - old).exp(), a, low, high)
                    for answer, a in zip(answers, A, strict=True) for new, old in answer]
    return sum(token_losses) / (len(answers) * T)


def dapo_of_trl(answers, A, T, low, high):
    token_losses = [-clipped((new - old).exp(), a, low, high)
                    for answer, a in zip(answers, A, strict=True) for new, old in answer]
    return sum(token_losses) / max(len(token_losses), 1)


def gspo_of_verl(answers, A, T, low, high):
    """seq-mean-token-mean of token ratios sg(s) pi / sg(pi), which have the sequence's value and a gradient each."""
    total = 0.0
    for answer, a in zip(answers, A, strict=True):
        log_s = sum((new - old).detach() for new, old in answer) / max(len(answer), 1)
        token_losses = [-clipped((new - new.detach() + log_s).exp(), a, low, high) for new, _ in answer]
        total = total + sum(token_losses) / max(len(answer), 1)
    return total / len(answers)


def gmpo_of_callsys(answers, A, T, low, high):
    """One-sided clamp of the log-ratio with the advantage's sign turned, exactly as train_zero_math_gmpo.py has it."""
    low_log, high_log, total = -math.log1p(-low), math.log1p(high), 0.0
    for answer, a in zip(answers, A, strict=True):
        kept = []
        for new, old in answer:
            turn = -1 if a >= 0 else 1
            turned = turn * (new - old)
            # its bounds are symmetric, -cliprange and cliprange; turned by -1 they change places
            bounds = (-high_log, low_log) if turn == -1 else (-low_log, high_log)
            kept.append(turn * torch.max(turned, turned.clamp(*bounds)))
        total = total - a * (sum(kept) / max(len(answer), 1)).exp() if answer else total
    return total / len(answers)


def holder_of_its_authors(p, level):
    def loss(answers, A, T, low, high):
        total = 0.0
        for answer, a in zip(answers, A, strict=True):
            if not answer:
                continue
            ratios = [(new - old).exp() for new, old in answer]
            if level == "token":  # their ablation: min or max with the clipped ratio inside the mean
                pick = torch.min if a > 0 else torch.max
                ratios = [pick(r, r.clamp(1 - low, 1 + high)) for r in ratios]
            if abs(p) < 1e-6:
                rho = (sum(r.log() for r in ratios) / len(ratios)).exp()
            else:
                rho = (sum(r.pow(p) for r in ratios) / len(ratios)).pow(1 / p)
            total = total - (rho * a if level == "token" else clipped(rho, a, low, high))
        return total / len(answers)
    return loss


PEERS = {"grpo": grpo_of_trl, "dr_grpo": dr_grpo_of_trl, "dapo": dapo_of_trl, "gspo": gspo_of_verl,
         "gmpo": gmpo_of_callsys} | {
    arm: holder_of_its_authors(own["p"], own.get("level", "sequence")) for arm, own in ARMS.items() if own}


def peer(arm: str, logp, old, advantage, mask, low=LOW, high=HIGH):
    """The peer's loss and its gradient [B, T], from the same numbers in float64."""
    leaf = logp.detach().double().requires_grad_()
    answers = [[(leaf[b, t], old[b, t].double()) for t in range(logp.shape[1]) if mask[b, t]]
               for b in range(len(logp))]
    loss = PEERS[arm](answers, [float(a) for a in advantage], logp.shape[1], low, high)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def loss_and_gradient(arm: str, logp, *others, **bounds):
    leaf = logp.detach().clone().requires_grad_()
    loss, _ = ours(arm, leaf, *others, **bounds)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_equals_peer(arm: str, case, atol: float, rtol: float, **bounds):
    for mine, theirs in zip(loss_and_gradient(arm, *case, **bounds), peer(arm, *case, **bounds), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=atol, rtol=rtol)


# ---- agreement


@pytest.mark.parametrize("arm", ARMS)
def test_equals_the_peers_code_in_float64(arm):
    """Loss and gradient to 1e-10 over ragged masks with holes, NaN under the mask, one answer without a token."""
    for seed, lengths in enumerate([(6, 1, 4, 7, 3, 5), (7, 7, 7, 7, 7, 7), (1, 2, 0, 5, 1, 6)]):
        case = batch(seed, lengths)
        case[3][2] &= lengths[2] > 0  # batch() counts the first token of every answer
        assert_equals_peer(arm, case, 1e-10, 1e-10)


@pytest.mark.parametrize("arm", ARMS)
def test_equals_the_peers_code_in_float32(arm):
    """The same from fp32 inputs, to 1e-6 of numbers of the order of one."""
    for seed in range(3, 6):
        assert_equals_peer(arm, batch(seed, dtype=torch.float32), 1e-6, 1e-6)


@pytest.mark.parametrize("method", sorted(PUBLISHED_CLIPS))
def test_equals_the_peers_code_at_its_own_bounds(method):
    """The published bounds; GMPO's are 0.4 in the log-ratio, either way."""
    low, high = PUBLISHED_CLIPS[method]["clip_low"], PUBLISHED_CLIPS[method]["clip_high"]
    arm = next(name for name in ARMS if name.split()[0] == method)
    assert_equals_peer(arm, batch(7), 1e-10, 1e-10, low=low, high=high)
    if method == "gmpo":
        assert (math.log1p(-low), math.log1p(high)) == pytest.approx((-0.4, 0.4))


@pytest.mark.parametrize(("method", "level"), [("grpo", "token"), ("dr_grpo", "token"), ("dapo", "token"),
                                               ("grpo", "sequence")])
def test_equals_liger(method, level):
    """An oracle that nobody here wrote: Liger's GRPO losses in plain torch. Its sequence level is GSPO."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOFunction
    logp, old, advantage, mask = batch(8)
    logp, old = logp.nan_to_num(0.0).requires_grad_(), old.nan_to_num(0.0)
    theirs, _ = liger.ppo_loss_fn(logp, mask.double(), advantage, mask.double(), old_per_token_logps=old,
                                  epsilon_low=LOW, epsilon_high=HIGH, beta=0.0, loss_type=method,
                                  max_completion_length=mask.shape[1], importance_sampling_level=level)
    mine, _ = ours("gspo" if level == "sequence" else method, logp, old, advantage, mask)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logp)[0] for loss in (mine, theirs)), atol=1e-12, rtol=0)


# ---- identities


def holder(case, p, level, low=LOW, high=HIGH):
    leaf = case[0].detach().clone().requires_grad_()
    loss, stats = policy_loss(leaf, *case[1:], method="holder", p=p, level=level, clip_low=low, clip_high=high)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], stats


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_every_exponent_has_the_same_gradient_where_the_policies_agree(level):
    """At old == new: A/(B n) for each token, whatever p is. So p acts through staleness alone."""
    logp, _, advantage, mask = batch(0)
    expected = -advantage[:, None] * mask / mask.sum(1, keepdim=True) / len(logp)
    for p in EXPONENTS:
        torch.testing.assert_close(holder((logp, logp, advantage, mask), p, level)[1], expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("method", "p", "level"), [("grpo", 1.0, "token"), ("gmpo", 0.0, "token"),
                                                    ("gspo", 0.0, "sequence")])
def test_three_methods_are_points_of_holder(method, p, level):
    """GRPO, GMPO and GSPO are holder at one exponent and level each, bit for bit, in value and gradient."""
    case = batch(1)
    for mine, point in zip(loss_and_gradient(method, *case), holder(case, p, level)[:2], strict=True):
        torch.testing.assert_close(mine, point, atol=0, rtol=0)


def test_sequence_level_at_one_is_not_grpo():
    """With wide bounds they are the same mean; once a bound is met, the clip outside the mean is another objective."""
    case = batch(1)
    wide = {"low": 0.99, "high": 1e6}
    torch.testing.assert_close(holder(case, 1.0, "sequence", **wide)[1], loss_and_gradient("grpo", *case, **wide)[1])
    assert (holder(case, 1.0, "sequence")[1] - loss_and_gradient("grpo", *case)[1]).abs().max() > 0.01


@pytest.mark.parametrize("p", EXPONENTS)
def test_the_gradient_weighs_tokens_by_softmax_of_p_times_log_ratio(p):
    """Without a cut, the share of token t in its sequence's gradient is exp(p l_t) / sum exp(p l)."""
    logp, old, advantage, mask = batch(2)
    _, gradient, stats = holder((logp, old, advantage, mask), p, "sequence", 0.999, 1e6)
    entropies = []
    for b in range(len(logp)):
        log_ratios = (logp - old)[b, mask[b]]
        W = (p * log_ratios).softmax(0)
        torch.testing.assert_close(gradient[b, mask[b]] / gradient[b].sum(), W, atol=1e-9, rtol=0)
        entropies.append(-(W * W.log()).sum())
    torch.testing.assert_close(stats["weight_entropy"], torch.stack(entropies).mean())


def test_opposite_exponents_are_dual():
    """M_-p(r) = 1 / M_p(1/r): exchanging the policies and the sign of p inverts the mean; the loss of one sequence
    with A = -1 is M itself."""
    logp, old, _, mask = batch(3)
    for p in (0.0, 0.5, 1.0, 4.0):
        for b in range(len(logp)):
            row = slice(b, b + 1)
            there = (logp[row], old[row], -torch.ones(1).double(), mask[row])
            back = (old[row], logp[row], -torch.ones(1).double(), mask[row])
            product = holder(there, p, "sequence", 0.999, 1e6)[0] * holder(back, -p, "sequence", 0.999, 1e6)[0]
            assert product.item() == pytest.approx(1.0)


# ---- extreme ratios


@settings(max_examples=150)
@example(log_ratios=[0.0], p=2.2250738585e-313, A=-2.0, arm="holder")  # its reciprocal overflows
@example(log_ratios=[100.0, 99.0], p=1e-9, A=-2.0, arm="holder")
@example(log_ratios=[100.0, 99.0], p=-2e-7, A=-2.0, arm="holder")
@given(log_ratios=st.lists(st.floats(-100, 100), min_size=1, max_size=6),
       p=st.sampled_from(EXPONENTS) | st.floats(-8, 8), A=st.sampled_from([-2.0, -1.0, 1.0, 0.5]),
       arm=st.sampled_from(["grpo", "dr_grpo", "dapo", "gmpo", "gspo", "holder", "holder token"]))
def test_extreme_ratios_stay_finite(log_ratios, p, A, arm):
    """Loss and gradient are finite at every log-ratio; below the one where ratios stop growing, fp32 is float64."""
    results = []
    own = ARMS.get(arm, {"p": p, "level": "token" if arm.endswith("token") else "sequence"})
    for dtype in (torch.float64, torch.float32):
        logp = torch.tensor([log_ratios], dtype=torch.float32).to(dtype).requires_grad_()
        loss, stats = policy_loss(logp, torch.zeros_like(logp), torch.tensor([A]), torch.ones_like(logp),
                                  method=arm.split()[0], **own)
        results.append((loss.detach(), torch.autograd.grad(loss, logp)[0]))
        assert loss.isfinite() and results[-1][1].isfinite().all()
        assert all(stat.isfinite() for name, stat in stats.items() if not name.startswith("ratio_"))
    (exact, exact_gradient), (single, single_gradient) = results
    if max(log_ratios) < objective.LARGEST_LOG_RATIO[torch.float32]:
        torch.testing.assert_close(single.double(), exact, atol=1e-6, rtol=3e-4)
        torch.testing.assert_close(single_gradient.double(), exact_gradient, atol=1e-6 + 3e-4 * exact.abs().item(),
                                   rtol=0)


# ---- masks and empties


@pytest.mark.parametrize("arm", ARMS)
def test_first_and_last_counted_token_have_a_gradient_and_padding_has_none(arm):
    """Every counted token, the first and the stop token with them, gets a gradient (bounds wide); no other does,
    though NaN stands there."""
    logp, old, advantage, mask = batch(4)
    loss, gradient = loss_and_gradient(arm, logp, old, advantage, mask, low=0.999, high=1e6)
    assert loss.isfinite() and torch.equal(gradient != 0, mask)


@pytest.mark.parametrize("arm", ARMS)
def test_masks_may_be_numbers_and_padding_any_width(arm):
    """0 and 1 as int or float count as False and True. More padding changes only Dr. GRPO, by its own factor T."""
    logp, old, advantage, mask = batch(5)
    loss, _ = ours(arm, logp, old, advantage, mask)
    assert ours(arm, logp, old, advantage, mask.long())[0] == loss == ours(arm, logp, old, advantage, mask.double())[0]
    wider = [torch.nn.functional.pad(tensor, (0, 3), value=value)
             for tensor, value in ((logp, math.nan), (old, math.nan), (mask, False))]
    padded, _ = ours(arm, *wider[:2], advantage, wider[2])
    torch.testing.assert_close(padded * (10 / 7 if arm == "dr_grpo" else 1), loss)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0)])
def test_nothing_counted_is_a_loss_of_zero(arm, shape):
    """All masked, no sequences, no width: loss 0, gradient 0, stats at their neutral values."""
    logp = torch.full(shape, math.nan, requires_grad=True)
    loss, stats = ours(arm, logp, torch.full(shape, math.nan), torch.ones(shape[0]), torch.zeros(shape))
    assert loss == 0 and (torch.autograd.grad(loss, logp)[0] == 0).all()
    neutral = {name: float(name in ("ratio_max", "ratio_min")) for name in stats}
    assert {name: stat.item() for name, stat in stats.items()} == neutral


# ---- stats, advantages, reference


@pytest.mark.parametrize("arm", ARMS)
def test_stats_are_what_they_say(arm):
    """Each number by a loop; all are detached scalars. The clip fraction is that of gradients that are cut off."""
    logp, old, advantage, mask = batch(6)
    _, gradient = loss_and_gradient(arm, logp, old, advantage, mask)
    stats = ours(arm, logp.requires_grad_(), old, advantage, mask)[1]
    p = ARMS[arm].get("p", {"gspo": 0.0, "gmpo": 0.0}.get(arm, 1.0))
    ratios, effective, entropy = [], [], []
    for b in range(len(logp)):
        log_ratios = (logp - old).detach()[b, mask[b]]
        W = (p * log_ratios).exp() / (p * log_ratios).exp().sum()
        ratios += log_ratios.exp().tolist()
        effective.append(1 / W.square().sum().item())
        entropy.append(-(W * W.log()).sum().item())
    cut = (gradient[mask] == 0).double().mean() if "token" in arm or arm in ("grpo", "dr_grpo", "dapo", "gmpo") else (
        (gradient != 0).any(1).logical_not().double().mean())
    expected = {"clip_fraction": cut.item(), "ratio_max": max(ratios), "ratio_min": min(ratios),
                "log_ratio_mean": sum(map(math.log, ratios)) / len(ratios),
                "weight_entropy": sum(entropy) / len(entropy), "effective_tokens": sum(effective) / len(effective),
                "entropy": -logp.detach()[mask].mean().item()}
    assert {name: stat.item() for name, stat in stats.items()} == pytest.approx(expected, abs=1e-7)
    assert 0 < expected["clip_fraction"] < 1
    assert all(stat.ndim == 0 and not stat.requires_grad for stat in stats.values())


def advantage_of_verl(group: list[float], scale_by_std: bool) -> list[float]:
    mean = sum(group) / len(group)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in group) / (len(group) - 1))
    return [(reward - mean) / (std + 1e-6 if scale_by_std else 1.0) for reward in group]


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_group_advantage_is_verls(scale_by_std):
    """Unbiased standard deviation plus 1e-6, group by group, in fp32 and float64; whole and boolean rewards too."""
    draw = torch.Generator().manual_seed(0)
    reward = torch.rand(5, 8, generator=draw, dtype=torch.float64)
    expected = torch.tensor([advantage_of_verl(group.tolist(), scale_by_std) for group in reward], dtype=torch.float64)
    torch.testing.assert_close(objective.group_advantage(reward, scale_by_std=scale_by_std), expected, atol=1e-12,
                               rtol=1e-12)
    torch.testing.assert_close(group_advantage(reward.float(), scale_by_std=scale_by_std), expected.float())
    right = torch.tensor([[True, False, False, True, False]])
    whole = group_advantage(right.long(), scale_by_std=scale_by_std)
    torch.testing.assert_close(whole, group_advantage(right, scale_by_std=scale_by_std))
    torch.testing.assert_close(whole[0], torch.tensor(advantage_of_verl([1.0, 0, 0, 1, 0], scale_by_std)))


@given(reward=st.floats(-1e6, 1e6), G=st.integers(1, 33), half=st.sampled_from([torch.float32, torch.float64]))
def test_equal_rewards_have_no_advantage(reward, G, half):
    """Exactly 0, though the mean of equal numbers rounds: six times 0.1 in fp32 have another mean than 0.1."""
    for scale_by_std in (True, False):
        assert (group_advantage(torch.full((2, G), reward, dtype=half), scale_by_std=scale_by_std) == 0).all()


def test_reference_kl_is_k3():
    """exp(r) - r - 1, a mean over tokens and then over sequences, by a loop; NaN under the mask doesn't leak."""
    logp, reference, _, mask = batch(9)
    leaf = logp.clone().requires_grad_()
    loss = objective.reference_kl(leaf, reference, mask)
    expected = torch.stack([((r := (reference - logp)[b, mask[b]]).exp() - r - 1).mean() for b in range(len(logp))])
    torch.testing.assert_close(loss.detach(), expected.mean())
    gradient = (1 - (reference - logp).exp()) / mask.sum(1, keepdim=True) / len(logp)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], torch.where(mask, gradient, 0.0))
    single = reference_kl(torch.full((1, 1), -1.0), torch.full((1, 1), -1.0 + 2**-13), torch.ones(1, 1))
    assert single.item() == pytest.approx(2**-27, rel=1e-3)  # exp(r) - r - 1 as it stands gives 0 in fp32


def test_reference_kl_estimates_one_divergence_and_descends_the_other():
    """Summed over all tokens with the policy's weights: its value is KL(policy, reference), its gradient that of
    KL(reference, policy)."""
    draw = torch.Generator().manual_seed(0)
    z, other = torch.randn(2, 9, generator=draw, dtype=torch.float64)
    z.requires_grad_()
    logq, logref = z.log_softmax(0), other.log_softmax(0)
    token_kl = torch.stack([reference_kl(logq[v].view(1, 1), logref[v].view(1, 1), torch.ones(1, 1)) for v in range(9)])
    expectation = (logq.exp().detach() * token_kl).sum()
    torch.testing.assert_close(expectation, (logq.exp() * (logq - logref)).sum())
    forward = (logref.exp() * (logref - logq)).sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (expectation, forward)))


@pytest.mark.parametrize("r", [-100.0, -21.0, 19.9, 20.1, 100.0])
def test_reference_kl_is_finite_far_away(r):
    """Up to r = 20 the formula itself; from there its tangent: finite, and the pull never lets go."""
    logp = torch.tensor([[-r]], requires_grad=True)
    loss = reference_kl(logp, torch.zeros(1, 1), torch.ones(1, 1))
    e = math.exp(min(r, 20))
    assert loss.item() == pytest.approx(e * (1 + max(r - 20, 0)) - r - 1, rel=1e-5)
    assert torch.autograd.grad(loss, logp)[0].item() == pytest.approx(1 - e, rel=1e-5)


def test_only_logp_gets_a_gradient_and_half_precision_is_lifted():
    """Old and reference policy and advantages are constants; bf16 in gives an fp32 loss of the same values."""
    logp, old, advantage, mask = (tensor.nan_to_num(0.0) for tensor in batch(1, dtype=torch.bfloat16))
    tensors = [tensor.clone().requires_grad_() for tensor in (logp, old, advantage)]
    for loss in (policy_loss(*tensors, mask)[0], reference_kl(*tensors[:2], mask)):
        loss.backward()
    assert tensors[0].grad is not None and tensors[1].grad is None and tensors[2].grad is None
    exact, _ = policy_loss(logp.double(), old.double(), advantage.double(), mask)
    loss, _ = policy_loss(logp, old, advantage, mask)
    assert loss.dtype == torch.float32 and exact.dtype == torch.float64
    assert loss.item() == pytest.approx(exact.item(), abs=1e-6)


@pytest.mark.parametrize(("change", "says"), [
    ({"method": "ppo"}, "no method 'ppo'"),
    ({"method": "gspo", "p": 2.0}, "settings of \"holder\""),
    ({"method": "gspo", "level": "token"}, "settings of \"holder\""),
    ({"method": "holder", "level": "word"}, "no level 'word'"),
    ({"method": "holder", "p": math.nan}, "not a finite number"),
    ({"clip_low": 1.0}, "cannot be kept between"),
    ({"mask_BT": torch.ones(2, 4)}, "mask_BT has shape"),
    ({"advantage_B": torch.ones(2, 1)}, "advantage_B has shape"),
    ({"old_logp_BT": torch.zeros(2)}, "old_logp has shape"),
])
def test_bad_input_gets_a_sentence(change, says):
    """What a caller can get wrong is named, also settings that a method would ignore."""
    given = {"logp_BT": torch.zeros(2, 3), "old_logp_BT": torch.zeros(2, 3), "advantage_B": torch.ones(2),
             "mask_BT": torch.ones(2, 3)} | change
    with pytest.raises(LabError, match=re.escape(says)):
        policy_loss(**given)


def test_a_methods_own_exponent_may_be_named():
    """p=0 beside gspo says nothing wrong, so it is no error."""
    case = batch(0)
    assert policy_loss(*case, method="gspo", p=0.0)[0] == policy_loss(*case, method="gspo")[0]


# ---- planted faults: one sign, one bound, one mask, one mean

EVERY = tuple(ARMS)
BY_TOKEN = ("grpo", "dr_grpo", "dapo", "gmpo", "holder p=2 token", "holder p=-1 token")
SEQUENCES = tuple(arm for arm in ARMS if arm not in BY_TOKEN)
FAULTS = [  # what is wrong, module, function, old text, new text, whose objective it spoils
    ("sign of the loss", op, "reference", "return -gain_B.sum()", "return gain_B.sum()", EVERY),
    ("sign of the log-ratio", op, "reference", "logp_M.to(dtype) - old_logp_M.to(dtype)",
     "old_logp_M.to(dtype) - logp_M.to(dtype)", EVERY),
    ("sign of the advantage in the clip", op, "reference", "((A > 0) & (log_ratio > log_high)) | ((A < 0)",
     "((A < 0) & (log_ratio > log_high)) | ((A > 0)", EVERY),
    ("no upper bound", op, "reference", "((A > 0) & (log_ratio > log_high)) | ((A < 0) & (log_ratio < log_low))",
     "(A < 0) & (log_ratio < log_low)", EVERY),
    ("no lower bound", op, "reference", "((A > 0) & (log_ratio > log_high)) | ((A < 0) & (log_ratio < log_low))",
     "(A > 0) & (log_ratio > log_high)", EVERY),
    ("bounds exchanged", op, "holder_objective", "math.log1p(-clip_low), math.log1p(clip_high)",
     "math.log1p(-clip_high), math.log1p(clip_low)", EVERY),
    ("lower bound in log space", op, "holder_objective", "math.log1p(-clip_low)", "-clip_low", EVERY),
    ("upper bound in log space", op, "holder_objective", "math.log1p(clip_high)", "clip_high", EVERY),
    ("cut ratios keep their gradient", op, "reference", "l_M = torch.where(cut_M, bound_M, l_M)", "pass", BY_TOKEN),
    ("cut means keep their gradient", op, "reference",
     "log_ratio_B if by_token else torch.where(cut_B, bound_B, log_ratio_B)", "log_ratio_B", SEQUENCES),
    ("sum over sequences", op, "reference", " / max(len(A_B), 1)", "", EVERY),
    ("sum over tokens", op, "log_power_mean", " / n_B.clamp(min=1)", "", EVERY),
    ("first counted token left out", objective, "policy_loss", "mask_BT != 0",
     "(mask_BT != 0) & ((mask_BT != 0).cumsum(1) > 1)", EVERY),
    ("last counted token left out", objective, "policy_loss", "mask_BT != 0",
     "(mask_BT != 0) & ((mask_BT != 0).flip(1).cumsum(1).flip(1) > 1)", EVERY),
    ("padding counts", objective, "policy_loss", "mask_BT != 0", "(mask_BT != 0) | (mask_BT.cumsum(1) > 0)", EVERY),
    ("mask turned around", objective, "policy_loss", "mask_BT != 0", "mask_BT == 0", EVERY),
    ("advantage without its sign", objective, "policy_loss", "advantage_B.to(dtype)", "advantage_B.abs().to(dtype)",
     EVERY),
    ("old and new exchanged", objective, "policy_loss", "holder_objective(logp_BT - beyond_BT, old_logp_BT.to(dtype)",
     "holder_objective(old_logp_BT.to(dtype) + 0 * logp_BT, logp_BT", EVERY),
    ("dr_grpo divides by the answer's length", objective, "_length_weight", "return n_B / max(T, 1)",
     "return torch.ones_like(n_B)", ("dr_grpo",)),
    ("dr_grpo divides by the longest answer", objective, "_length_weight", "max(T, 1)", "n_B.amax()", ("dr_grpo",)),
    ("dapo's mean over sequences", objective, "_length_weight", "n_B * B / n_B.sum()", "n_B / n_B",  ("dapo",)),
    ("dapo's sum", objective, "_length_weight", " / n_B.sum().clamp(min=1)", "", ("dapo",)),
    ("dapo's mean divided by B", objective, "_length_weight", "n_B * B /", "n_B /", ("dapo",)),
]
PLANTED = [(arm, *fault[:5]) for fault in FAULTS for arm in fault[5]]


def plant(monkeypatch, module, function: str, old: str, new: str) -> None:
    """Put a function with one place of its text altered in place of the right one; it keeps its module's names."""
    right = getattr(module, function)
    wrong = altered(right, function, old, new, vars(module))
    for place in (module, objective):  # policy_gradient imports the op by name
        if getattr(place, function, None) is right:
            monkeypatch.setattr(place, function, wrong)


@pytest.mark.parametrize(("arm", "fault", "module", "function", "old", "new"), PLANTED,
                         ids=[f"{row[0]}: {row[1]}" for row in PLANTED])
def test_a_planted_fault_is_noticed(monkeypatch, arm, fault, module, function, old, new):
    """What `test_equals_the_peers_code_in_float64` asserts passes, and fails with one place of the source altered."""
    case = batch(0, lengths=(5, 1, 4, 6, 3, 5))  # no answer fills the width
    assert_equals_peer(arm, case, 1e-10, 1e-10)
    plant(monkeypatch, module, function, old, new)
    with pytest.raises(AssertionError):
        assert_equals_peer(arm, case, 1e-10, 1e-10)


@pytest.mark.parametrize("method", objective.AGGREGATES)
def test_an_altered_row_of_the_table_is_noticed(monkeypatch, method):
    """Another exponent or another level is another objective, for each method where both are fixed."""
    p, level = objective.AGGREGATES[method]
    for wrong in ((1 - p, level), (p, "sequence" if level == "token" else "token")):
        monkeypatch.setitem(objective.AGGREGATES, method, wrong)
        with pytest.raises(AssertionError):
            assert_equals_peer(method, batch(0), 1e-10, 1e-10)


@pytest.mark.parametrize(("test", "function", "old", "new"), [
    (lambda: test_group_advantage_is_verls(True), "group_advantage", "[1] - 1, 1)", "[1], 1)"),
    (lambda: test_group_advantage_is_verls(True), "group_advantage", "above_first_NG - a", "above_first_NG + a"),
    (lambda: test_group_advantage_is_verls(True), "group_advantage", "std_N1 + STD_FLOOR", "std_N1 + 1e-4"),
    (lambda: test_group_advantage_is_verls(False), "group_advantage", ".mean(1, keepdim=True)", ".mean()"),
    (lambda: test_reference_kl_is_k3(), "reference_kl", "reference_logp_BT.detach(), logp_BT",
     "logp_BT, reference_logp_BT.detach()"),
    (lambda: test_reference_kl_is_k3(), "reference_kl", " / max(len(logp_BT), 1)", ""),
    (lambda: test_reference_kl_is_k3(), "reference_kl", "mask_BT != 0", "mask_BT == 0"),
    (lambda: test_reference_kl_is_k3(), "reference_kl", "counts_BT.sum(1).clamp(min=1)", "counts_BT.shape[1]"),
])
def test_a_fault_in_advantage_or_reference_is_noticed(monkeypatch, test, function, old, new):
    """The named test fails with one place of the source altered; that it passes without, it shows above."""
    plant(monkeypatch, objective, function, old, new)
    with pytest.raises(AssertionError):
        test()


# ---- the power mean


@given(x=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), p=st.floats(-8, 8))
def test_power_mean_is_its_definition(x, p):
    """(mean x^p)^(1/p) by Python's floats; between its extremes; dual; and it never falls as p rises."""
    tensor = torch.tensor(x, dtype=torch.float64)
    mean = power_mean(tensor, p).item()
    if abs(p) > 1e-3:
        assert mean == pytest.approx((sum(value**p for value in x) / len(x)) ** (1 / p), rel=1e-9)
    assert min(x) * (1 - 1e-12) <= mean <= max(x) * (1 + 1e-12)
    assert mean == pytest.approx(1 / power_mean(1 / tensor, -p).item(), rel=1e-12)
    assert power_mean(tensor, p + 0.5).item() >= mean * (1 - 1e-12)


def test_power_mean_at_special_exponents():
    """Values known by hand: arithmetic, geometric, harmonic, the extremes; and numbers whose powers overflow."""
    x = torch.tensor([[1.0, 2.0, 4.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    for p, expected in ((1, 7 / 3), (0, 2.0), (-1, 3 / 1.75), (math.inf, 4.0), (-math.inf, 1.0), (1e-9, 2.0),
                        (1e5, 4.0 * 3**-1e-5)):
        assert power_mean(x, p).tolist() == pytest.approx([expected, 3.0], rel=1e-9)
    far = torch.tensor([1e-30, 1e30])
    assert [power_mean(far, p).item() for p in (0, 8, -8)] == pytest.approx([1.0, 1e30 * 2**-0.125, 1e-30 * 2**0.125])


def test_power_mean_of_zeros():
    """A zero adds nothing for p > 0 and is the mean for p <= 0: the limits of small numbers."""
    x = torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64)
    for p in (2.0, 0.5, 1.0, 0.0, -1.0, math.inf, -math.inf):
        almost = power_mean(x.clamp(min=1e-300), p)
        torch.testing.assert_close(power_mean(x, p), almost, atol=1e-12, rtol=1e-12)
        assert power_mean(torch.zeros(2), p) == 0


def test_power_mean_along_a_dimension_with_a_mask():
    """Each slice by itself; what is masked may be anything; a slice without entries is NaN."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(3, 4, 5, generator=draw, dtype=torch.float64) + 0.1
    mask = torch.rand(3, 4, 5, generator=draw) > 0.4
    mask[0, :, 0] = False
    means = power_mean(torch.where(mask, x, -math.inf), -2.0, mask, dim=1)
    for i in range(3):
        for j in range(5):
            kept = x[i, mask[i, :, j], j]
            expected = kept.pow(-2).mean().pow(-0.5) if len(kept) else torch.tensor(math.nan).double()
            torch.testing.assert_close(means[i, j], expected, equal_nan=True)
    assert power_mean(torch.ones(2, 0), 1.0).isnan().all() and power_mean(torch.ones(0, 2), 1.0).shape == (0,)
    assert power_mean(torch.ones(2, 0), math.inf).isnan().all()
    assert power_mean(torch.ones(2, dtype=torch.float16), 1.0).dtype == torch.float32


def test_power_mean_is_the_objectives():
    """The sequence-level objective of one answer with A = -1 and no cut is the power mean of its ratios."""
    logp, old, _, mask = batch(2)
    for p in (-2.0, 0.0, 1.0, 3.0):
        mean = power_mean((logp - old).exp(), p, mask)
        for b, row in enumerate(mean):
            answer = (logp[b : b + 1], old[b : b + 1], -torch.ones(1).double(), mask[b : b + 1])
            torch.testing.assert_close(row, holder(answer, p, "sequence", 0.999, 1e6)[0])


def test_power_mean_has_a_gradient():
    """Finite differences in float64 agree, at and near p = 0 too."""
    x = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    for p in (-2.0, 0.0, 1e-7, 1.0, 5.0):
        assert torch.autograd.gradcheck(lambda values, p=p: power_mean(values, p), x)


@pytest.mark.parametrize(("arguments", "says"), [
    ((torch.tensor([1.0, -1.0]), 1.0), "finite numbers of 0 or more"),
    ((torch.tensor([1.0, math.nan]), 1.0), "finite numbers of 0 or more"),
    ((torch.ones(2), math.nan), "exponent p is NaN"),
    ((torch.ones(2), 1.0, torch.ones(3)), "mask has shape"),
])
def test_power_mean_refuses(arguments, says):
    """Negative and NaN entries, a NaN exponent and a mask of another shape get a sentence."""
    with pytest.raises(LabError, match=says):
        power_mean(*arguments)
