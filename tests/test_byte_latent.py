"""The byte-latent model sees what it may and no more, computes what loops compute, and costs what is counted."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from labkit.errors import LabError
from labkit.measure.flops import byte_latent_flops
from labkit.models import ByteLatent, ByteLatentConfig

SHAPES = [(1, 12), (2, 12), (3, 12), (4, 12), (12, 12)]  # patch, context: one byte, several, the whole text at once


def make(patch=4, context=12, **changes):
    shape = dict(width=20, layers=2, heads=2, local_width=12, local_layers=2, local_heads=2, vocab_size=17) | changes
    model = ByteLatent(ByteLatentConfig(patch, context, **shape), seed=3).double()
    torch.nn.init.normal_(model.head.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    return model


def text(B=2, S=12, V=17):
    return torch.randint(V, (B, S), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("patch", "context"), SHAPES)
def test_each_byte_sees_exactly_the_bytes_before_it(patch, context):
    """The logits at place t have a gradient at every byte before t and exactly none at t or later: one check of the
    shift of the latent, of the shift inside the patch, and of both masks."""
    model = make(patch, context)
    e_BSK = model.embedding(text(B=1, S=context)).detach().requires_grad_()
    logits_SV = model.from_embedded(e_BSK)[0]
    for t in range(context):
        reach_S = torch.autograd.grad(logits_SV[t].square().sum(), e_BSK, retain_graph=True)[0][0].abs().sum(-1)
        assert (reach_S[:t] > 0).all() and (reach_S[t:] == 0).all()


@pytest.mark.parametrize("reach", [1, 2, 3, 12])
def test_the_local_module_reaches_so_far_back(reach):
    """With one local layer, the byte at t sees all earlier patches and the last `reach` bytes of its own, no others."""
    model = make(patch=6, local_layers=1, local_reach=reach)
    e_BSK = model.embedding(text(B=1)).detach().requires_grad_()
    logits_SV = model.from_embedded(e_BSK)[0]
    for t in range(12):
        reach_S = torch.autograd.grad(logits_SV[t].square().sum(), e_BSK, retain_graph=True)[0][0].abs().sum(-1)
        assert [u for u in range(12) if reach_S[u] > 0] == [u for u in range(t) if u < t // 6 * 6 or u >= t - reach]


def naive_block(block, x_TD, heads, base=10_000.0):
    """One decoder block by loops over places, heads and earlier places."""
    def norm(vector, weight):
        return vector / (vector.square().mean() + 1e-5).sqrt() * weight

    def turn(vector, place):
        half = len(vector) // 2
        angles = [place * base ** (-2 * i / len(vector)) for i in range(half)]
        pairs = [(vector[i] * math.cos(a) - vector[i + half] * math.sin(a),
                  vector[i + half] * math.cos(a) + vector[i] * math.sin(a)) for i, a in enumerate(angles)]
        return torch.stack([first for first, _ in pairs] + [second for _, second in pairs])

    T, D = x_TD.shape
    K = D // heads
    rows = [block.attention.qkv.weight @ norm(x, block.attention_norm.weight) for x in x_TD]
    out = []
    for t in range(T):
        mixed = []
        for h in range(heads):
            q, *keys = [turn(row[offset + h * K : offset + (h + 1) * K], place) for row, offset, place in
                        [(rows[t], 0, t), *((rows[u], D, u) for u in range(t + 1))]]
            weights = torch.stack([q @ k / math.sqrt(K) for k in keys]).softmax(0)
            mixed.append(sum(w * rows[u][2 * D + h * K : 2 * D + (h + 1) * K] for u, w in enumerate(weights)))
        x = x_TD[t] + block.attention.out.weight @ torch.cat(mixed)
        gate, up = (block.ffn.gate_up.weight @ norm(x, block.ffn_norm.weight)).chunk(2)
        out.append(x + block.ffn.down.weight @ (F.silu(gate) * up))
    return torch.stack(out)


def naive_stack(stack, x_TD, heads):
    for block in stack.blocks:
        x_TD = naive_block(block, x_TD, heads)
    return torch.stack([x / (x.square().mean() + 1e-5).sqrt() * stack.norm.weight for x in x_TD])


def naive_logits(model, row):
    """The four equations of the file's head, patch by patch and byte by byte."""
    config, e = model.config, [model.embedding.weight[byte] for byte in row]
    patches = [list(range(p, p + config.patch)) for p in range(0, len(row), config.patch)]
    y = [model.start_D, *(model.read.weight @ torch.cat([e[i] for i in patch]) for patch in patches[:-1])]
    latent = naive_stack(model.latent, torch.stack(y), config.heads)
    logits = []
    for g, patch in zip(latent, patches, strict=True):
        spread = (model.write.weight @ g).view(config.patch, -1)
        seen = [model.begin_K, *(e[i] for i in patch[:-1])]
        x_TK = torch.stack([a + b for a, b in zip(spread, seen, strict=True)])
        h = naive_stack(model.local, x_TK, config.local_heads)
        logits += [model.head.weight @ place for place in h]
    return torch.stack(logits)


@pytest.mark.parametrize(("patch", "context"), SHAPES)
@torch.no_grad()
def test_equals_the_equations_in_loops(patch, context):
    """float64 logits equal those of the written equations, one vector at a time (tables of RoPE are float32)."""
    model = make(patch, context)
    for row, logits_SV in zip(text(S=context), model(text(S=context)), strict=True):
        torch.testing.assert_close(logits_SV, naive_logits(model, row), atol=2e-6, rtol=2e-6)


@torch.no_grad()
def test_a_shorter_text_is_a_prefix_of_a_longer_one():
    """Causality again, by values: cutting whole patches off the end changes nothing before the cut."""
    model = make(patch=3)
    torch.testing.assert_close(model(text()[:, :6]), model(text())[:, :6], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("patch", "context"), [*SHAPES, (8, 192)])
def test_counted_flops_are_those_of_torch(patch, context):
    """The formula equals torch's own count of the products that run, forward and with the backward pass."""
    model = make(patch, context).float()
    bytes_BS, counted = text(B=3, S=context), byte_latent_flops(model.config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        model(bytes_BS)
    assert forward.get_total_flops() == 3 * (counted.latent + counted.bridge + counted.local)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
        model(bytes_BS).square().mean().backward()
    assert both.get_total_flops() == pytest.approx(3 * context * counted.training_per_byte, rel=1e-12)


def test_counted_flops_by_hand():
    """One small shape on paper. T=2, S=8, so P=4; D=8, one layer, ffn 16; K=4, one layer, ffn 16; V=10.

    latent:  a position 2 (8*24 + 8*8 + 3*8*16) = 1280, attention 4*8*4 = 128; times 4 patches      = 5632
    bridge:  in 2*(2*4)*8 = 128, three times; out 128, four times                                     = 896
    local:   a byte 2 (4*12 + 4*4 + 3*4*16) = 512, attention 4*4*2 = 32, head 2*4*10 = 80; times 8    = 4992
    """
    config = ByteLatentConfig(2, 8, 8, 1, 1, local_width=4, local_heads=1, local_ffn=16, vocab_size=10)
    counted = byte_latent_flops(config)
    assert (counted.latent, counted.bridge, counted.local) == (5632, 896, 4992)
    assert counted.training_per_byte == 3 * 11520 / 8 and counted.latent_share == 5632 / 11520


def test_latent_parameters_are_the_global_blocks_alone():
    """N of law I: 2 layers of 20*60 + 20*20 + 3*20*ffn(48) and their norms, and the last norm; T changes nothing."""
    per_layer = 20 * 60 + 20 * 20 + 3 * 20 * 48 + 2 * 20
    assert {make(patch).latent_parameters() for patch in (1, 3, 12)} == {2 * per_layer + 20}


def test_the_latent_is_needed_and_used():
    """With the way from the latent cut, bytes of other patches no longer matter; with it they do."""
    model, other = make(), text().clone()
    other[:, :4] = (other[:, :4] + 1) % 17  # the first patch
    assert not torch.allclose(model(text())[:, 4:], model(other)[:, 4:])
    torch.nn.init.zeros_(model.write.weight)
    torch.testing.assert_close(model(text())[:, 4:], model(other)[:, 4:])


def test_weights_depend_on_the_seed_alone():
    """Equal seeds give equal weights, other seeds others; what a fresh model predicts is nearly uniform."""
    config = ByteLatentConfig(4, 12, 16, 1, 2, local_width=8)
    one, same, other = (ByteLatent(config, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.read.weight, other.read.weight)
    loss = F.cross_entropy(one(text(V=256)).flatten(0, 1), text(V=256).flatten())
    assert abs(loss.item() - math.log(256)) < 0.05


def test_empty_batches_and_bad_shapes():
    """No text gives no logits; what cannot be cut into patches is refused in one sentence."""
    model = make()
    assert model(text()[:0]).shape == (0, 12, 17) and model(text()[:, :0]).shape == (2, 0, 17)
    for S in (13, 6, 16):
        with pytest.raises(LabError, match="whole patches"):
            model(text(S=S))
    with pytest.raises(LabError, match="cut into patches"):
        ByteLatentConfig(5, 12, 16, 1, 2)
    for nothing in ({"local_layers": 0}, {"local_reach": 0}):
        with pytest.raises(LabError, match="local layer"):
            ByteLatentConfig(4, 12, 16, 1, 2, **nothing)
    with pytest.raises(LabError, match="pairs for RoPE"):
        ByteLatentConfig(4, 12, 15, 1, 1)
