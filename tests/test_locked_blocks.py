"""Locked blocks are the identity, wake as their reading says or never; a stack of models is each model alone."""

import dataclasses

import pytest
import torch
from torch import nn

from labkit.data import random_windows
from labkit.errors import LabError
from labkit.measure.curvature import dot, over
from labkit.measure.flops import training_flops
from labkit.measure.stability import rate_sensitivity, spikes, stable_up_to
from labkit.models import GPT, GPTConfig, KVCache, document_mask
from labkit.models.attention import sdpa_attention
from labkit.models.explicit_attention import ExplicitAttention, clip_queries_and_keys
from labkit.models.locked_blocks import (
    PARTS,
    READINGS,
    BlockLock,
    block_parts,
    gain_gate,
    prepare_block,
    prores_gains,
    set_gains,
    set_locked,
)
from labkit.objectives import next_token_loss
from labkit.trainers.architecture_warmup import Arm, StackPlan, StackRun, build_model, run_flops, train_stack
from labkit.trainers.schedule import learning_rate_factor
from labkit.trainers.stack import StackedAdamW, clip_stack, stack_weights

TINY = GPTConfig(vocab_size=23, context=8, width=8, layers=4, heads=2, kv_heads=1, ffn=11, tied=False)
TEXT = torch.randint(23, (500,), generator=torch.Generator().manual_seed(0))
PLAN = StackPlan(6, (1e-2, 1e-1), (0, 3), batch=3, context=7, warmup=2, evaluation_windows=5)
BLOCK = ("attention_norm.weight", "attention.qkv.weight", "attention.out.weight", "ffn_norm.weight",
         "ffn.gate_up.weight", "ffn.down.weight")


def rows(B=3, T=8, seed=1):
    return torch.randint(23, (B, T), generator=torch.Generator().manual_seed(seed))


def prepared(reading, layer=3, **options):
    """A float64 decoder whose last block has just unlocked, and the gradients of its loss by name."""
    gate = {"gate": gain_gate} if reading == "ramp" else {}
    model = GPT(TINY, seed=5, **gate).double()
    weights = dict(model.named_parameters())
    lock = BlockLock(reading, 0, **options)
    prepare_block(weights, layer, lock, TINY, torch.Generator().manual_seed(2))
    if reading == "ramp":
        set_gains(model, [1.0] * layer + [0.0])
    window = rows(T=9)
    next_token_loss(model(window[:, :-1]), window[:, 1:]).backward()
    return model, {name: each.grad for name, each in weights.items()}


# locking ----------------------------------------------------------------------------------------------------------

def test_a_locked_block_is_not_there():
    """With blocks locked the logits are those of a decoder built without them, also with a mask and with a cache."""
    model, shallow = GPT(TINY), GPT(dataclasses.replace(TINY, layers=2))
    state = model.state_dict()
    shallow.load_state_dict({name.replace("blocks.3", "blocks.1"): each for name, each in state.items()
                             if not name.startswith(("blocks.1", "blocks.2"))})
    set_locked(model, [0, 3])
    assert torch.equal(model(rows()), shallow(rows()))
    mask = document_mask(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]] * 3))
    assert torch.equal(model(rows(), document_mask_BTT=mask), shallow(rows(), document_mask_BTT=mask))
    with torch.no_grad():
        cached = model(rows(), cache=KVCache(TINY, 3, 8))
    torch.testing.assert_close(cached, model(rows()))
    set_locked(model, range(4))
    assert not torch.equal(model(rows()), shallow(rows()))


def test_parts_are_views_of_the_right_rows():
    """Grouped queries: q has all heads, k and v the fewer; writes to a part reach the weight. A stack has M ahead."""
    weights = dict(GPT(TINY).named_parameters())
    parts = block_parts(weights, 1, TINY)
    qkv, gate_up = (weights[f"blocks.1.{name}.weight"] for name in ("attention.qkv", "ffn.gate_up"))
    assert torch.equal(torch.cat([parts[name] for name in "qkv"]), qkv)
    assert [len(parts[name]) for name in PARTS] == [8, 4, 4, 8, 11, 11, 8]
    assert torch.equal(parts["up"], gate_up[11:])
    with torch.no_grad():
        parts["v"].zero_()
    assert (qkv[12:] == 0).all() and (qkv[:12] != 0).all()
    stacked = block_parts(stack_weights([GPT(TINY, seed=seed) for seed in range(3)]), 1, TINY)
    assert stacked["k"].shape == (3, 4, 8)


def test_the_saddle():
    """Taken literally: every gradient of the block is exactly zero, and not of the others. So no optimizer moves it."""
    _, gradient = prepared("dead")
    assert all((gradient[f"blocks.3.{name}"] == 0).all() for name in BLOCK)
    assert all((gradient[f"blocks.2.{name}"] != 0).any() for name in BLOCK)


@pytest.mark.parametrize(("reading", "awake"), [("projections", {"out", "down"}), ("inputs", {"v", "up"}),
                                                ("ramp", set()), ("noise", set(PARTS)), ("late", set(PARTS))])
def test_what_wakes_first(reading, awake):
    """The chain rule by hand: a part has a gradient only if nothing that multiplies it is zero. (b), (c) and a gain of
    0 leave the function as it was; (a) nearly so."""
    model, gradient = prepared(reading, sigma=0.5)
    parts = block_parts(gradient, 3, TINY)
    assert {name for name, each in parts.items() if (each != 0).any()} == awake
    changed = (model(rows()) - locked_logits(model)).abs().max()
    assert changed == 0 if reading in ("projections", "inputs", "ramp") else changed > 1e-4


def locked_logits(model):
    set_locked(model, [0, 1, 2])
    logits = model(rows())
    set_locked(model, [0, 1, 2, 3])
    return logits


def test_noise_has_its_size_and_is_drawn_by_model():
    """Noise fills all seven parts with standard deviation sigma; equal generators give equal noise, others other."""
    config = dataclasses.replace(TINY, width=64, ffn=128)
    weights = stack_weights([GPT(config, seed=seed) for seed in range(3)])
    gains = weights["blocks.2.ffn_norm.weight"].detach().clone()
    prepare_block(weights, 2, BlockLock("noise", 0, sigma=3e-3), config,
                  [torch.Generator().manual_seed(seed) for seed in (4, 4, 5)])
    for part in block_parts(weights, 2, config).values():
        assert float(part.detach().std()) == pytest.approx(3e-3, rel=0.1)
        assert torch.equal(part[0], part[1]) and not torch.equal(part[0], part[2])
    assert torch.equal(weights["blocks.2.ffn_norm.weight"], gains)


# schedules --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("layers", "share", "groups", "expected"), [
    (16, 0.5, 4, {8: 30, 9: 30, 10: 40, 11: 40, 12: 50, 13: 50, 14: 60, 15: 60}),
    (4, 0.5, 4, {2: 30, 3: 40}), (5, 0.5, 4, {3: 30, 4: 40}), (8, 0.25, 1, {6: 30, 7: 30}), (1, 0.5, 4, {}),
    (6, 0.0, 4, {})])
def test_unlocking_by_hand(layers, share, groups, expected):
    """Groups unlock one after the other from the bottom of the last half; a layer is active from its step on."""
    lock = BlockLock("noise", 30, 10, groups=groups, share=share)
    assert lock.unlock_steps(layers) == expected
    assert all(layer in lock.active(layers, when) and layer not in lock.active(layers, when - 1)
               for layer, when in expected.items())
    assert {layer: when for when in range(99) for layer in lock.due(layers, when)} == expected
    assert lock.active(layers, 10**6) == list(range(layers))


def test_half_depth_for_ever():
    """start=None: nothing ever unlocks."""
    lock = BlockLock("dead", None)
    assert lock.active(8, 10**9) == [0, 1, 2, 3] and not any(lock.due(8, step) for step in range(50))


def test_gains_by_hand():
    """The ramp starts at 1/ramp, not at 0, where its first step would be lost; ProRes opens lower layers first."""
    lock = BlockLock("ramp", 10, 5, groups=2, ramp=4)
    assert [lock.gains(4, step) for step in (10, 13, 16, 40)] == [
        [1, 1, 0.25, 0], [1, 1, 1, 0], [1, 1, 1, 0.5], [1, 1, 1, 1]]
    assert BlockLock("noise", 10).gains(2, 0) == [1, 1]
    assert prores_gains(4, 0, 8) == [0, 0, 0, 0] and prores_gains(4, 2, 8) == [1, 0.5, pytest.approx(1 / 3), 0.25]
    assert prores_gains(4, 8, 8) == [1, 1, 1, 1]


def test_bad_schedules_are_refused():
    for wrong in ({"reading": "zero"}, {"share": 1.0}, {"groups": 0}, {"interval": -1}, {"ramp": 0}):
        with pytest.raises(LabError):
            BlockLock(**{"reading": "noise", "start": 0, **wrong})
    for wrong in ({"steps": 0}, {"rates": ()}, {"warmup": 7}, {"precision": "fp8"}):
        with pytest.raises(LabError):
            dataclasses.replace(PLAN, **wrong)


# attention written out --------------------------------------------------------------------------------------------

def drawn_heads(T=5, U=5, J=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, length, 6, generator=generator, dtype=torch.float64)
            for heads, length in ((4, T), (J, U), (J, U))]


def naive_attention(q, k, v, allowed, cap):
    """One query, one head, one row at a time; also the largest logit of each head."""
    out, peak = torch.zeros_like(q), torch.full((q.shape[1],), -torch.inf, dtype=q.dtype)
    for b, h, t in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        j = h // (q.shape[1] // k.shape[1])
        logits = {u: float(q[b, h, t] @ k[b, j, u]) / 6**0.5 for u in range(k.shape[2]) if allowed[b][t][u]}
        row = torch.tensor(list(logits.values()), dtype=q.dtype)
        row = cap * torch.tanh(row / cap) if cap else row
        out[b, h, t] = row.softmax(0) @ torch.stack([v[b, j, u] for u in logits])
        peak[h] = max(peak[h], row.max())
    return out, peak


@pytest.mark.parametrize(("T", "U", "J", "cap"), [(5, 5, 4, None), (5, 5, 2, None), (3, 7, 1, None), (1, 4, 2, None),
                                                 (1, 1, 4, 0.5), (5, 5, 2, 0.7)])
def test_explicit_attention_is_the_naive_loop(T, U, J, cap):
    """Causal with the last T of U positions, grouped queries, the cap, and the peaks of each head."""
    q, k, v = drawn_heads(T, U, J)
    allowed = [[[u <= t + U - T for u in range(U)] for t in range(T)] for _ in range(2)]
    attention = ExplicitAttention(cap)
    out, peak = naive_attention(q, k, v, allowed, cap)
    torch.testing.assert_close(attention(q, k, v), out, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(attention.peaks[0], peak, atol=1e-7, rtol=1e-7)


def test_explicit_attention_with_a_mask_is_the_fused_one():
    """A document mask replaces the causal one; what it hides is no peak. Empty input gives empty output and no peak."""
    q, k, v = drawn_heads()
    mask = document_mask(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]))
    attention = ExplicitAttention()
    torch.testing.assert_close(attention(q, k, v, mask), sdpa_attention(q, k, v, mask))
    torch.testing.assert_close(attention.peaks[0], naive_attention(q, k, v, mask, None)[1])
    assert attention(*(x[:0] for x in (q, k, v))).shape == (0, 4, 5, 6) and len(attention.peaks) == 1


def test_explicit_attention_has_a_second_derivative():
    inputs = [each[:1, :2, :3, :2].clone().requires_grad_() for each in drawn_heads()]
    assert torch.autograd.gradgradcheck(lambda *qkv: ExplicitAttention(2.0)(*qkv), inputs)


def test_qk_clip_brings_each_head_to_its_limit():
    """After the clip the same batch has the largest logit min(S, limit) in each head of each model, values and the
    other heads unchanged."""
    config = dataclasses.replace(TINY, kv_heads=2, layers=1)
    weights = stack_weights([GPT(config, seed=seed).double() for seed in range(3)])
    run = StackRun(config, TEXT, dataclasses.replace(PLAN, rates=(0.1,), seeds=(0, 1, 2)), Arm())
    run.model, run.weights = run.model.double(), weights
    windows = run.windows(0)
    before = run.losses(windows)[1]
    limit = float(before.flatten().sort().values[2:4].mean())
    values = block_parts(weights, 0, config)["v"].clone()
    clip_queries_and_keys(weights, [0], before, limit, config)
    torch.testing.assert_close(run.losses(windows)[1], before.clamp(max=limit))
    assert torch.equal(block_parts(weights, 0, config)["v"], values) and 0 < (before > limit).sum() < before.numel()
    with pytest.raises(LabError, match="key head of its own"):
        clip_queries_and_keys(weights, [0], before, limit, TINY)


# stacks -----------------------------------------------------------------------------------------------------------

def alone(config, plan, arm, rate, seed):
    """The ordinary way: one model, torch's AdamW, one loop. Losses by step and the weights at the end."""
    model = build_model(config, arm, seed)
    matrices = [each for each in model.parameters() if each.ndim >= 2]
    vectors = [each for each in model.parameters() if each.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": plan.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}], betas=plan.betas, eps=plan.eps)
    losses = []
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate_factor(step, plan.steps, warmup=plan.warmup,
                                                      decay=1 - plan.warmup / plan.steps)
        windows = random_windows(TEXT, batch=plan.batch, length=plan.context + 1, seed=seed, step=step)
        loss = next_token_loss(model(windows[:, :-1]), windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        if arm.clip:
            nn.utils.clip_grad_norm_(model.parameters(), arm.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: each.detach() for name, each in model.named_parameters()}


@pytest.mark.parametrize("arm", [Arm(), Arm(clip=0.3), Arm(qk_norm=True), Arm(cap=2.0)])
def test_a_stack_is_each_model_alone(arm):
    """Losses and weights of all four models of a stack equal those of four ordinary runs with torch's own AdamW."""
    plan = dataclasses.replace(PLAN, rates=(3e-3, 1e-2))
    run = StackRun(TINY, TEXT, plan, arm)
    loss_NM = torch.stack([run.advance()[0] for _ in range(plan.steps)])
    for place, (rate, seed) in enumerate(plan.models):
        losses, weights = alone(TINY, plan, arm, rate, seed)
        torch.testing.assert_close(loss_NM[:, place], torch.tensor(losses), atol=2e-5, rtol=2e-5)
        for name in weights:
            torch.testing.assert_close(run.weights[name][place], weights[name], atol=2e-4, rtol=2e-3)


def test_a_dead_lock_is_half_depth():
    """The blocks wake in neither, so losses agree bit for bit, though the dead ones are computed and in the optimizer;
    every other reading differs."""
    def losses(lock):
        return train_stack(TINY, TEXT, TEXT, PLAN, Arm(lock=lock)).loss_NM

    half = losses(BlockLock("dead", None))
    assert (losses(BlockLock("dead", 2)) == half).all()
    for reading in set(READINGS) - {"dead"}:
        other = losses(BlockLock(reading, 2, sigma=0.01))
        assert (other[:2] == half[:2]).all() and (other[-1] != half[-1]).all()


def test_a_locked_block_is_not_in_the_optimizer():
    """While locked no weight of the block changes, weight decay included; a group that joins starts at step 1."""
    run = StackRun(TINY, TEXT, dataclasses.replace(PLAN, weight_decay=0.5), Arm(lock=BlockLock("late", 3, 2)))
    start = {name: each.detach().clone() for name, each in run.weights.items()}
    for _ in range(4):
        run.advance()
    changed = {name[7] for name in start if name[:6] == "blocks" and not torch.equal(run.weights[name], start[name])}
    assert changed == {"0", "1", "2"}
    assert [run.optimizer.count[f"blocks.{layer}.ffn.down.weight"] for layer in range(4)] == [4, 4, 1, 0]


def test_one_broken_model_spoils_no_other():
    """A learning rate that overflows makes its own row not a number; the others are bit for bit as without it."""
    wild = train_stack(TINY, TEXT, TEXT, dataclasses.replace(PLAN, rates=(1e-2, 1e30)), Arm())
    calm = train_stack(TINY, TEXT, TEXT, dataclasses.replace(PLAN, rates=(1e-2, 1e-2)), Arm())
    assert (wild.loss_NM[:, :2] == calm.loss_NM[:, :2]).all() and not torch.tensor(wild.end_M[2:]).isfinite().any()
    assert wild.by_seed(1e-2) == calm.by_seed(1e-2) or len(calm.by_seed(1e-2)) == 2


def test_all_arms_start_alike():
    """Equal seeds have equal matrices whatever the arm, and equal text at each step."""
    base = build_model(TINY, Arm(), 3).state_dict()
    for arm in (Arm(qk_norm=True), Arm(prores=5), Arm(cap=9.0), Arm(lock=BlockLock("noise", 2))):
        other = build_model(TINY, arm, 3).state_dict()
        assert all(torch.equal(other[name], each) for name, each in base.items())
        assert torch.equal(StackRun(TINY, TEXT, PLAN, arm).windows(4), StackRun(TINY, TEXT, PLAN, Arm()).windows(4))


def test_flops_of_locked_blocks_are_not_counted():
    """By hand: 2 steps at two of four layers, one at three, three at four. torch's counter sees the same."""
    from torch.utils.flop_counter import FlopCounterMode

    config = dataclasses.replace(TINY, kv_heads=2)
    arm = Arm(lock=BlockLock("projections", 2, 1))

    def at(layers):
        return training_flops(dataclasses.replace(config, layers=layers), 3 * 7, 7)

    assert run_flops(config, PLAN, arm) == 2 * at(2) + at(3) + 3 * at(4) < run_flops(config, PLAN, Arm()) == 6 * at(4)
    for layers in (2, 4):
        model = GPT(config, attention=ExplicitAttention())
        set_locked(model, range(layers))
        with FlopCounterMode(display=False) as counter:
            model(rows(T=7)).sum().backward()
        assert counter.get_total_flops() == at(layers)


def test_the_gauge_looks_at_active_matrices():
    """Matrices of active blocks and no others, unless asked for; in fp32 also where training is not."""
    run = StackRun(TINY, TEXT, dataclasses.replace(PLAN, precision="bf16"), Arm(lock=BlockLock("late", 3)))
    run.advance()
    product, spread = run.curvature(run.windows(9))
    matrices = {f"blocks.{layer}.{name}" for layer in (0, 1) for name in BLOCK if "norm" not in name}
    assert set(spread) == matrices == set(product(spread))
    assert all(each.dtype == torch.float32 for each in product(spread).values())
    assert set(run.curvature(run.windows(9), ["embedding.weight"])[1]) == matrices | {"embedding.weight"}


def test_history_and_precision():
    """Held-out loss before and after by rate and seed; products in bfloat16 change little in one step."""
    plan = dataclasses.replace(PLAN, steps=2, warmup=1)
    history = train_stack(TINY, TEXT, TEXT, plan, Arm())
    assert history.loss_NM.shape == history.peak_NM.shape == (2, 4) and set(history.by_seed(1e-1)) == {0, 3}
    assert history.by_seed(1e-2, history.start_M) == history.by_seed(1e-1, history.start_M)
    short = train_stack(TINY, TEXT, TEXT, dataclasses.replace(plan, precision="bf16"), Arm(lock=BlockLock("ramp", 1)))
    assert torch.allclose(torch.tensor(short.loss_NM[0]), torch.tensor(history.loss_NM[0]), atol=0.05)


def test_clipping_by_model():
    """Each model's norm is cut by itself, as clip_grad_norm_ does it; a small one is left."""
    gradient = {"a": torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)), "b": torch.ones(3, 5)}
    gradient = {name: each * over(torch.tensor([5.0, 1e-3, 1.0]), each) for name, each in gradient.items()}
    clipped = clip_stack(gradient, 1.0)
    for place in range(3):
        leaves = [nn.Parameter(torch.zeros_like(each[place])) for each in gradient.values()]
        for leaf, each in zip(leaves, gradient.values(), strict=True):
            leaf.grad = each[place].clone()
        nn.utils.clip_grad_norm_(leaves, 1.0)
        for leaf, each in zip(leaves, clipped.values(), strict=True):
            torch.testing.assert_close(each[place], leaf.grad)
    assert dot(clipped, clipped).sqrt()[1] < 0.1


def test_spread_is_what_adam_divides_by():
    """sqrt(v / (1 - b2^t)) + eps; after one step that is |gradient| + eps."""
    weights = {"w": torch.zeros(2, 3, requires_grad=True)}
    optimizer = StackedAdamW(weights, torch.tensor([0.1, 0.2]), eps=0.25)
    gradient = torch.tensor([[1.0, -2.0, 0.0], [3.0, 4.0, -5.0]])
    optimizer.step({"w": gradient})
    torch.testing.assert_close(optimizer.spread("w"), gradient.abs() + 0.25)


def test_a_tensor_that_joins_late_starts_afresh():
    """Against torch's AdamW, which counts by tensor too: one joins at step 4 and gets a first step of full size."""
    generator, weights = torch.Generator().manual_seed(0), {name: torch.ones(2, 3, requires_grad=True) for name in "ab"}
    ours = StackedAdamW(weights, torch.tensor([0.1, 0.1]))
    theirs = {name: nn.Parameter(each.detach().clone()) for name, each in weights.items()}
    optimizer = torch.optim.AdamW(theirs.values(), lr=0.1, weight_decay=0.0)
    for step in range(6):
        gradient = {name: torch.randn(2, 3, generator=generator) for name in ("ab" if step >= 3 else "a")}
        for name, each in theirs.items():
            each.grad = gradient.get(name)
        ours.step(gradient)
        optimizer.step()
    for name, each in theirs.items():
        torch.testing.assert_close(weights[name].detach(), each.detach())


# stability --------------------------------------------------------------------------------------------------------

def test_sensitivity_and_range_by_hand():
    """A diverged rate counts as untrained; the range is relative to the best; a spike stands above its recent past."""
    losses = {1e-3: 3.0, 1e-2: 2.0, 1e-1: 2.19, 1.0: float("nan"), 10.0: 9.0}
    assert rate_sensitivity(losses, 5.0) == pytest.approx((1 + 0 + 0.19 + 3 + 3) / 5)
    assert stable_up_to(losses) == 1e-1 and stable_up_to(losses, 1.05) == 1e-2
    assert stable_up_to({1.0: float("inf")}) != stable_up_to({1.0: float("inf")})
    curve = [3.0] * 12 + [3.31, 3.29, float("nan"), 3.0]
    assert spikes(curve).nonzero()[0].tolist() == [12, 14]
    with pytest.raises(LabError):
        rate_sensitivity({}, 5.0)
