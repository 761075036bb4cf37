"""Lighthouse attention is what the paper and its code say: against naive loops in float64, and by perturbation.

The loops below share nothing with labkit: plain Python over batch, head, tile and entry.
"""

import itertools

import pytest
import torch

from labkit.errors import LabError
from labkit.kernels import gather_select, pyramid_pool, unselect
from labkit.kernels.lighthouse_levels import Levels, TakeRows, inverted
from labkit.models import GPT, GPTConfig, KVCache, sdpa_attention
from labkit.models.lighthouse import Lighthouse, Selection, contributors, lighthouse_layers, positions_first
from labkit.models.lighthouse_select import RandomScores, in_order

SHAPES = [(64, 4, 3, 8, 4), (61, 4, 3, 4, 4), (37, 2, 3, 4, 2), (48, 2, 4, 4, 4), (50, 3, 3, 6, 2), (7, 2, 2, 8, 4),
          (3, 4, 3, 8, 8), (1, 2, 2, 2, 2)]  # T, p, L, k, m


def draw(T, heads=2, key_heads=2, K=4, B=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, count, T, K, generator=generator, dtype=torch.float64)
            for count in (heads, key_heads, key_heads)]


def chosen_by(method, q, k, v):
    q, k, v = positions_first(q, k, v)
    return method.select(method.pyramid(q, k, v), q.shape[1])


def naive_cascade(q_TK, k_TK, p, L, k, m):
    """The set of (level, index) of one head, by loops."""
    T, f = len(q_TK), p ** (L - 1)
    whole = T - T % f

    def score(x_TK, level, i):
        return max(x_TK[j].norm().item() for j in range(i * p**level, (i + 1) * p**level))

    coarse, tiles = list(range(whole // f)), k // m
    width = -(-len(coarse) // tiles)
    chosen = {(0, i) for i in range(whole, T)}
    for tile in range(tiles):
        candidates = coarse[tile * width : (tile + 1) * width]
        for level in range(L - 1, -1, -1):
            chosen |= {(level, i) for i in candidates}
            if level:
                by_query = sorted(candidates, key=lambda i: -score(q_TK, level, i))[: m // 2]
                rest = [i for i in candidates if i not in by_query]
                by_key = sorted(rest, key=lambda i: -score(k_TK, level, i))[: m // 2]
                candidates = [child for i in by_query + by_key for child in range(i * p, (i + 1) * p)]
    return chosen


def naive_attention(q_TK, k_TK, v_TK, chosen, p):
    """Outputs and contributor counts of one head for a set of (level, index), by loops."""
    T, K = q_TK.shape
    order = sorted(chosen, key=lambda entry: ((entry[1] + 1) * p ** entry[0], entry[0]))

    def mean(x_TK, level, i):
        return x_TK[i * p**level : (i + 1) * p**level].mean(0)

    out_TK, count_T = torch.zeros(T, K, dtype=q_TK.dtype), torch.zeros(T, dtype=torch.long)
    for row, (level, i) in enumerate(order):
        query = mean(q_TK, level, i)
        keys = torch.stack([mean(k_TK, *entry) for entry in order[: row + 1]])
        values = torch.stack([mean(v_TK, *entry) for entry in order[: row + 1]])
        row_K = torch.softmax(keys @ query / K**0.5, 0) @ values
        f = p**level
        for n in range(i * f + f - 1, min(T, i * f + 2 * f - 1)):
            out_TK[n] = out_TK[n] + row_K
            count_T[n] += 1
    return out_TK, count_T


def entries_of(index_S, place):
    level_S, i_S = place.place(index_S[index_S >= 0])
    return list(zip(level_S.tolist(), i_S.tolist(), strict=True))


@pytest.mark.parametrize("T, p, L, k, m", SHAPES)
def test_equals_the_loops(T, p, L, k, m):
    """Chosen sets, outputs, contributor counts and gradients equal the loops', in float64, for odd lengths too."""
    method, place = Lighthouse(p, L, k, m), Levels(T, p, L)
    parts = [part.requires_grad_() for part in draw(T)]
    out, selection = method(*parts), chosen_by(method, *parts)
    count_BHT = contributors(selection, T, p, L)
    expected = torch.zeros_like(out)
    for b, h in itertools.product(range(2), range(2)):
        q_TK, k_TK, v_TK = (part[b, h] for part in parts)
        chosen = naive_cascade(q_TK.detach(), k_TK.detach(), p, L, k, m)
        entries = entries_of(selection.index_BHS[b, h], place)
        assert set(entries) == chosen and len(entries) == len(chosen) == method.length(T)
        expected[b, h], count_T = naive_attention(q_TK, k_TK, v_TK, chosen, p)
        assert torch.equal(count_BHT[b, h], count_T) and count_T.max() <= L
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-10)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((out * weight).sum(), parts)
    theirs = torch.autograd.grad((expected * weight).sum(), parts)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


def test_length_formula():
    """S = N / p^(L-1) + (L-1) p k wherever the shape allows it: the brief's and the paper's sizes."""
    assert Lighthouse(4, 3, 8, 8).length(256) == 256 // 16 + 2 * 4 * 8 == 80
    assert Lighthouse(2, 3, 1536, 128).length(98_304) == 98_304 // 4 + 2 * 2 * 1536
    assert Lighthouse(4, 4, 4096, 128).length(2**20) == 65_536
    assert Lighthouse(2, 3, 16, 16, choice="joint").length(256) == Lighthouse(2, 3, 16, 16).length(256) == 128


@pytest.mark.parametrize("choice", ["cascade", "joint"])
@pytest.mark.parametrize("T, p, L, k, m", SHAPES)
def test_selection_is_well_formed(T, p, L, k, m, choice):
    """No entry twice, as many as `length` says, the coarsest level and the tail whole, empty slots last."""
    method, place = Lighthouse(p, L, k, m, choice=choice), Levels(T, p, L)
    index_BHS, inverse_BHN = chosen_by(method, *draw(T))
    assert inverse_BHN.shape[-1] == place.starts[-1]
    for index_S in index_BHS.flatten(0, 1):
        real = index_S[index_S >= 0]
        assert len(real.unique()) == len(real) == method.length(T)
        assert (index_S[: len(real)] >= 0).all()
        assert set(range(place.starts[L - 1], place.starts[L])) <= set(real.tolist())
        assert set(range(place.whole, T)) <= set(real.tolist())


def test_joint_takes_the_highest():
    """With the whole budget on queries and keys that agree, the joint choice is the largest scores of all levels."""
    q, _, v = draw(64)
    method = Lighthouse(4, 3, 4, 4, choice="joint")
    pyramid = method.pyramid(*positions_first(q, q, v))
    index_BHS = method.select(pyramid, 64).index_BHS
    score_N = pyramid.q_score_BHN[0, 0]
    finer = index_BHS[0, 0][index_BHS[0, 0] < 80]
    others = torch.tensor([i for i in range(80) if i not in finer.tolist()])
    assert len(finer) == 32 and score_N[finer].min() >= score_N[others].max()


def test_queries_first_then_keys():
    """Half of the parents by query score, half by key score among the rest: one loud query, one loud key, m = 2."""
    q, k, v = (0.01 * part for part in draw(64, B=1, heads=1, key_heads=1))
    q[0, 0, 5], k[0, 0, 5], k[0, 0, 40], v[0, 0, 0] = 9.0, 9.0, 5.0, 1.0
    index_S = chosen_by(Lighthouse(4, 3, 2, 2), q, k, v).index_BHS[0, 0]
    fine = sorted(index_S[index_S < 64].tolist())
    assert fine == [4, 5, 6, 7, 40, 41, 42, 43]


def test_tiles_never_compete():
    """However loud one tile is, the other expands as many entries: selection is stratified."""
    q, k, v = draw(64)
    q[:, :, :32] *= 100
    k[:, :, :32] *= 100
    index_BHS = chosen_by(Lighthouse(4, 3, 4, 2), q, k, v).index_BHS
    fine = (index_BHS < 64) & (index_BHS >= 32)
    assert (fine.sum(-1) == 8).all()


def test_keeps_coarser_levels_as_maxima():
    """A pooled entry's score is the largest norm inside it, not the norm of its mean, which here is zero."""
    q = torch.zeros(1, 16, 1, 2, dtype=torch.float64)
    q[0, 4, 0, 0], q[0, 5, 0, 0] = 3.0, -3.0
    pyramid = pyramid_pool(q, 2 * q, q, 4, 3)
    assert pyramid.q_score_BHN[0, 0, 16:].tolist() == [0, 3, 0, 0, 3]
    assert pyramid.k_score_BHN[0, 0, 16:].tolist() == [0, 6, 0, 0, 6]
    assert not pyramid.q_BMHK.any()


def test_causal_with_a_frozen_choice():
    """With the choice held fixed, changing inputs from t on changes no output before t, exactly, and t's own."""
    method, T = Lighthouse(4, 3, 8, 4), 61
    q, k, v = positions_first(*draw(T))
    selection = method.select(method.pyramid(q, k, v), T)
    before = method.attend(q, k, v, method.pyramid(q, k, v), selection)
    for t in range(0, T, 4):
        changed = [part.clone() for part in (q, k, v)]
        for part in changed:
            part[:, t:] = torch.randn_like(part[:, t:])
        after = method.attend(*changed, method.pyramid(*changed), selection)
        assert torch.equal(after[:, :t], before[:, :t]) and not torch.equal(after[:, t:], before[:, t:])


def test_gradient_reaches_all_inputs_before_and_none_after():
    """By autograd: the last position hears of every key and value, and no position of a later one."""
    T = 61
    parts = [part.requires_grad_() for part in draw(T)]
    out = Lighthouse(4, 3, 8, 4)(*parts)
    for t in (0, 14, 15, 16, 30, 47, T - 1):
        for grad in torch.autograd.grad(out[:, :, t].square().sum(), parts, retain_graph=True):
            assert not grad[:, :, t + 1 :].any()
    _, k_grad, v_grad = torch.autograd.grad(out[:, :, T - 1].square().sum(), parts)
    assert (k_grad.abs().sum((0, 1, 3)) > 0).all() and (v_grad.abs().sum((0, 1, 3)) > 0).all()


def test_the_choice_may_look_ahead():
    """Choosing again after a change of the last position can change earlier outputs: the leak of notebook 03."""
    method = Lighthouse(4, 3, 4, 4)
    q, k, v = draw(64)
    loud = q.clone()
    loud[:, :, 63] *= 100
    changed = (method(loud, k, v) - method(q, k, v)).abs().sum((0, 1, 3)) > 0
    assert changed[:48].any()


def test_positions_without_a_contributor():
    """Before the end of the first window nobody may write: unless expanded, the first p^(L-1) - 1 outputs are 0."""
    q, k, v = draw(64)
    q[:, :, :16] *= 1e-3
    k[:, :, :16] *= 1e-3
    method = Lighthouse(4, 3, 2, 2)
    count_BHT = contributors(chosen_by(method, q, k, v), 64, 4, 3)
    assert (count_BHT[..., :15] == 0).all() and (count_BHT[..., 15:] > 0).all()
    assert not method(q, k, v)[:, :, :15].any()


def test_one_level_is_dense_attention():
    """L = 1 chooses all tokens, and so does a text shorter than one window: the outputs are SDPA's."""
    for method, T in ((Lighthouse(4, 1, 8, 8), 33), (Lighthouse(4, 3, 8, 8), 15), (Lighthouse(4, 3, 8, 8), 0)):
        q, k, v = draw(T, heads=4)
        torch.testing.assert_close(method(q, k, v), sdpa_attention(q, k, v))


@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries(key_heads):
    """Fewer key heads equal the same key heads written out, gradients summed over the group."""
    method = Lighthouse(4, 3, 8, 4)
    q, k, v = (part.requires_grad_() for part in draw(61, heads=4, key_heads=key_heads))
    wide = [part.repeat_interleave(4 // key_heads, 1).detach().requires_grad_() for part in (k, v)]
    out, expected = method(q, k, v), method(q, *wide)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward(inputs=(q, k, v))
    expected.square().sum().backward(inputs=wide)
    for grad, wide_part in zip((k.grad, v.grad), wide, strict=True):
        torch.testing.assert_close(grad, wide_part.grad.unflatten(1, (key_heads, -1)).sum(2))


def test_autograd_against_finite_differences():
    """gradgradcheck of a look-up, and gradcheck of attention with its choice held fixed."""
    method, T = Lighthouse(2, 3, 2, 2), 13
    q, k, v = positions_first(*draw(T, B=1))
    selection = method.select(method.pyramid(q, k, v), T)
    parts = [part.clone().requires_grad_() for part in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: method.attend(*x, method.pyramid(*x), selection), parts)
    rows = torch.randn(1, 1, 5, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[[3, -1, 0]]])
    assert torch.autograd.gradgradcheck(lambda x: TakeRows.apply(x, index).square(), rows)


def test_unselect_undoes_gather_at_level_0():
    """With every token chosen and nothing else, gathering and summing back is the identity."""
    x_BTHK, place = torch.randn(2, 10, 3, 4), Levels(10, 2, 1)
    index = torch.arange(10).expand(2, 3, 10)
    pyramid = pyramid_pool(x_BTHK, x_BTHK, x_BTHK, 2, 1)
    rows, _, _ = gather_select(x_BTHK, x_BTHK, x_BTHK, pyramid, index)
    assert torch.equal(unselect(rows, inverted(index, 10), 10, 2, 1), x_BTHK) and place.starts == [0, 10]


def test_empty_slots_change_nothing():
    """Slots of -1, wherever a caller puts them, go behind all entries and take no part."""
    method, T = Lighthouse(4, 3, 4, 4), 48
    q, k, v = positions_first(*draw(T))
    pyramid, place = method.pyramid(q, k, v), method.place(T)
    index_BHS = method.select(pyramid, T).index_BHS
    holes = torch.cat((torch.full_like(index_BHS[..., :3], -1), index_BHS), -1)
    again = in_order(holes, place)
    torch.testing.assert_close(
        method.attend(q, k, v, pyramid, Selection(again, inverted(again, place.starts[-1]))),
        method.attend(q, k, v, pyramid, Selection(index_BHS, inverted(index_BHS, place.starts[-1]))))


def test_order_holds_at_any_length():
    """Integer keys have no ties: at T = 2^23 and five levels, where fp32 keys tie, the order is still causal."""
    place = Levels(2**23, 2, 5)
    last = 2**23 - 16
    entries = torch.tensor([place.starts[level] + last // 2**level + 2 ** (4 - level) - 1 for level in (4, 2, 0, 3, 1)])
    assert torch.equal(in_order(entries.view(1, 1, -1), place)[0, 0], entries[[2, 4, 1, 3, 0]])


def test_random_scores_forget_the_input():
    """The control's choice depends on its seed and call alone, and differs from call to call."""
    q, k, v = draw(64)
    first, other = Lighthouse(scorer=RandomScores(1)), Lighthouse(scorer=RandomScores(1))
    drawn = [chosen_by(first, q, k, v).index_BHS for _ in range(2)]
    assert torch.equal(chosen_by(other, 5 * k, q, v).index_BHS, drawn[0]) and not torch.equal(*drawn)


CONFIG = GPTConfig(vocab_size=31, context=64, width=16, layers=3, heads=4, kv_heads=2)


def test_switches_inside_a_gpt():
    """Layer by layer, on and off, with the same weights; dense layers only is the ordinary model."""
    tokens_BT = torch.randint(31, (2, 50), generator=torch.Generator().manual_seed(0))
    model, plain = GPT(CONFIG), GPT(CONFIG)
    method = Lighthouse(2, 3, 4, 4)
    model.attention = lighthouse_layers(3, method)
    assert model.attention == [sdpa_attention, method, sdpa_attention]
    assert lighthouse_layers(3, method, dense=()) == [method] * 3
    sparse = model(tokens_BT)
    assert not torch.equal(sparse, plain(tokens_BT))
    sparse.square().mean().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    model.attention = lighthouse_layers(3, method, dense=(0, 1, 2))
    assert torch.equal(model(tokens_BT), plain(tokens_BT))


def test_bfloat16_stays_bfloat16():
    """Outputs keep the input's type; sums over levels are made in float32."""
    parts = [part.to(torch.bfloat16) for part in draw(64)]
    out = Lighthouse(4, 3, 8, 4)(*parts)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_refuses_what_it_cannot_do():
    """One clear sentence for decoding, masks and sizes that fit no pyramid."""
    method, (q, k, v) = Lighthouse(), draw(8)
    with pytest.raises(LabError, match="cannot decode"):
        method(q[:, :, -1:], k, v)
    with pytest.raises(LabError, match="takes no mask"):
        method(q, k, v, torch.ones(2, 8, 8, dtype=torch.bool))
    model = GPT(CONFIG, attention=lighthouse_layers(3, method))
    with pytest.raises(LabError, match="cannot decode"), torch.no_grad():
        cache = KVCache(CONFIG, 1, 64)
        for token in torch.zeros(1, 2, dtype=torch.long).split(1, dim=1):
            model(token, cache=cache)
    for bad in ({"pooling": 1}, {"levels": 0}, {"tile": 3}, {"budget": 12}, {"choice": "best"}):
        with pytest.raises(LabError):
            Lighthouse(**bad)
