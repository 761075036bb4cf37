"""What two menus share equals loops over tokens in float64, and closed forms; rows that are no distribution show.

The loops sort by (logit, id) and add up probabilities one at a time, so they share nothing with the masks and cumsums
under test. Each test says which mistake it would notice.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.errors import LabError
from labkit.measure import menu_overlap, nucleus_overlap
from labkit.measure.distance import token_kl
from labkit.measure.menu import menu, nucleus

TENSORS = ["shared_N", "ratio_N", "student_mass_N", "teacher_mass_N", "student_menu_mass_N", "teacher_menu_mass_N",
           "advantage_N", "student_entropy_N", "teacher_entropy_N", "kl_N"]
NUCLEUS = ["student_size_N", "teacher_size_N", "jaccard_N", "student_cross_mass_N", "teacher_cross_mass_N"]


def case(N=6, V=9, seed=0, scale=1.5, dtype=torch.float64):
    """Student and teacher logits [N, V], some of them equal (multiples of a half)."""
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, N, V, generator=draw, dtype=torch.float64)
    logits[:, ::2] = (logits[:, ::2] * 2).round() / 2
    return logits.to(dtype).unbind()


def probabilities(logits_V):
    top = max(logits_V)
    weights = [math.exp(z - top) for z in logits_V]
    return [weight / sum(weights) for weight in weights]


def best_first(logits_V):
    """Ids of the allowed tokens, the likeliest first, lower ids before equals."""
    return [v for v in sorted(range(len(logits_V)), key=lambda v: (-logits_V[v], v)) if logits_V[v] > -math.inf]


def kl(a, b):
    return sum(x * math.log(x / y) if y else math.inf for x, y in zip(a, b, strict=True) if x)


def looped_overlap(student_V, teacher_V, k):
    """One row, token by token, from the definitions in the module's docstring."""
    q, p = probabilities(student_V), probabilities(teacher_V)
    mine, theirs = best_first(student_V)[:k], best_first(teacher_V)[:k]
    shared = sorted(set(mine) & set(theirs))
    q_I, p_I = sum(q[v] for v in shared), sum(p[v] for v in shared)
    advantage = math.nan
    if shared:
        terms = [q[v] / q_I * (math.log(p[v] / p_I) - math.log(q[v] / q_I)) for v in shared]
        advantage = sum(terms) / len(shared)
    return {"shared_N": len(shared), "ratio_N": len(shared) / max(len(mine), len(theirs)),
            "student_mass_N": q_I, "teacher_mass_N": p_I,
            "student_menu_mass_N": sum(q[v] for v in mine), "teacher_menu_mass_N": sum(p[v] for v in theirs),
            "advantage_N": advantage, "student_entropy_N": -sum(x * math.log(x) for x in q if x),
            "teacher_entropy_N": -sum(x * math.log(x) for x in p if x), "kl_N": kl(q, p)}


def looped_nucleus(student_V, teacher_V, mass):
    """Tokens are added, the likeliest first, until they hold the mass."""
    both = []
    for logits_V in (student_V, teacher_V):
        probability, kept = probabilities(logits_V), []
        for v in best_first(logits_V):
            if sum(probability[u] for u in kept) >= mass - 1e-9:
                break
            kept.append(v)
        both.append((probability, set(kept)))
    (q, mine), (p, theirs) = both
    return {"student_size_N": len(mine), "teacher_size_N": len(theirs),
            "jaccard_N": len(mine & theirs) / len(mine | theirs),
            "student_cross_mass_N": sum(q[v] for v in theirs), "teacher_cross_mass_N": sum(p[v] for v in mine)}


def assert_equals_loop(result, loop, student_NV, teacher_NV, setting):
    rows = [loop(*row, setting) for row in zip(student_NV.tolist(), teacher_NV.tolist(), strict=True)]
    for name in rows[0]:
        expected_N = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        torch.testing.assert_close(getattr(result, name).double(), expected_N, atol=1e-12, rtol=1e-12, equal_nan=True,
                                   msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3, 8, 9])
def test_equals_the_loop(k, dtype):
    """Every column, with ties inside the menu and at its edge, and in the dtype's own rounding."""
    student_NV, teacher_NV = case(N=12, dtype=dtype)
    assert_equals_loop(menu_overlap(student_NV, teacher_NV, k), looped_overlap, student_NV, teacher_NV, k)


@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9, 0.98, 0.999999])
def test_the_nucleus_equals_the_loop(mass):
    student_NV, teacher_NV = case(N=12, seed=1)
    result = nucleus_overlap(student_NV, teacher_NV, mass)
    assert_equals_loop(result, looped_nucleus, student_NV, teacher_NV, mass)


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 7), st.integers(0, 4))
def test_equals_the_loop_for_any_size_with_forbidden_tokens(seed, V, k, forbidden):
    """Odd sizes, V = 1, and -inf logits in each model at other tokens: on no menu, and they shrink the divisor."""
    student_NV, teacher_NV = (logits_NV.clone() for logits_NV in case(3, V, seed))
    draw = torch.Generator().manual_seed(seed)
    for logits_NV in (student_NV, teacher_NV):
        logits_NV[:, torch.randperm(V, generator=draw)[:min(forbidden, V - 1)]] = -math.inf
    k = min(k, V)
    result = menu_overlap(student_NV, teacher_NV, k)
    assert_equals_loop(result, looped_overlap, student_NV, teacher_NV, k)
    assert_equals_loop(nucleus_overlap(student_NV, teacher_NV), looped_nucleus, student_NV, teacher_NV, 0.98)
    shared_N = result.shared_N
    assert ((result.advantage_N <= 0) | (shared_N == 0)).all() and (result.kl_N >= 0).all()
    assert (result.student_mass_N <= result.student_menu_mass_N + 1e-15).all()


def test_equal_models_share_everything():
    """Also where fewer than k tokens are allowed, and where all logits are equal, so that ties decide the menu."""
    student_NV, _ = case()
    student_NV = torch.cat([student_NV, torch.zeros(1, 9), torch.tensor([[0.0, 1.0] + [-math.inf] * 7])])
    result, sets = menu_overlap(student_NV, student_NV, 4), nucleus_overlap(student_NV, student_NV)
    assert (result.ratio_N == 1).all() and result.shared_N.tolist() == [4] * 7 + [2]
    assert (result.advantage_N == 0).all() and (result.kl_N == 0).all() and (result.entropy_gap_N == 0).all()
    torch.testing.assert_close(result.student_mass_N, result.student_menu_mass_N)
    assert (sets.jaccard_N == 1).all() and (sets.student_cross_mass_N >= 0.98 - 1e-9).all()


def test_two_menus_drawn_by_chance_share_k_over_v():
    """The mean ratio of unrelated models is `chance`, within four standard errors; |I| is hypergeometric."""
    k, V, N = 5, 20, 4000
    student_NV, teacher_NV = torch.randn(2, N, V, generator=torch.Generator().manual_seed(0)).unbind()
    result = menu_overlap(student_NV, teacher_NV, k)
    deviation = math.sqrt(k * (k / V) * (1 - k / V) * (V - k) / (V - 1)) / k
    assert result.chance == k / V == 0.25
    assert abs(float(result.ratio_N.mean()) - result.chance) < 4 * deviation / math.sqrt(N)


def test_the_whole_vocabulary_says_nothing():
    """At k = V ratio and masses are 1 for unrelated models, and the advantage is the full KL over -V."""
    student_NV, teacher_NV = case(seed=3)
    result = menu_overlap(student_NV, teacher_NV, 9)
    for name in ("ratio_N", "student_mass_N", "teacher_mass_N", "student_menu_mass_N", "teacher_menu_mass_N"):
        torch.testing.assert_close(getattr(result, name), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(result.advantage_N, -token_kl(student_NV, teacher_NV) / 9)
    assert result.chance == 1.0 and (result.kl_N > 0.1).all()


def test_a_ratio_of_one_does_not_mean_agreement():
    """q = (0.9, 0.1, 0, 0), p = (0.01, 0.99, 0, 0): one menu of two, and a KL above 3 nats. By hand."""
    student, teacher = torch.tensor([[[0.9, 0.1, 0.0, 0.0]], [[0.01, 0.99, 0.0, 0.0]]]).double().log().unbind()
    result = menu_overlap(student, teacher, 2)
    expected = 0.9 * math.log(90) + 0.1 * math.log(10 / 99)
    assert float(result.ratio_N) == 1 and float(result.kl_N) == pytest.approx(expected) and expected > 3
    assert float(result.advantage_N) == pytest.approx(-expected / 2)  # the whole KL is on the menu, over |I| = 2


def test_the_entropy_gap_is_the_teachers_minus_the_students():
    """A teacher that is sure beside a uniform student: the gap is -log V, its size log V."""
    sure = torch.tensor([[50.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    result = menu_overlap(torch.zeros_like(sure), sure, 1)
    assert float(result.entropy_gap_N) == pytest.approx(-math.log(5)) == -float(result.absolute_entropy_gap_N)
    assert float(menu_overlap(sure, torch.zeros_like(sure), 1).entropy_gap_N) == pytest.approx(math.log(5))


def test_menus_that_share_nothing_have_no_advantage():
    student = torch.tensor([[5.0, 4.0, 0.0, 0.0]])
    result = menu_overlap(student, student.flip(1), 2)
    assert int(result.shared_N) == 0 == float(result.ratio_N) == float(result.student_mass_N)
    assert math.isnan(float(result.advantage_N)) and float(result.kl_N) > 1
    assert float(nucleus_overlap(student, student.flip(1), 0.9).jaccard_N) == 0


def test_a_token_that_the_teacher_forbids_makes_only_the_full_kl_infinite():
    """It is on the student's menu, not on the teacher's: outside I, so the advantage stays finite."""
    student = torch.tensor([[3.0, 2.0, 1.0]])
    result = menu_overlap(student, torch.tensor([[-math.inf, 2.0, 1.0]]), 2)
    assert float(result.kl_N) == math.inf and float(result.advantage_N) == 0 and float(result.ratio_N) == 0.5


def test_rounding_does_not_move_a_nucleus():
    """Ten tokens of 0.1 hold 0.5 in five and 0.3 in three, though 0.1 + 0.1 + 0.1 is not 0.3 in floating point."""
    uniform = torch.zeros(1, 10)
    for tenths in range(1, 10):
        assert int(nucleus_overlap(uniform, uniform, tenths / 10).student_size_N) == tenths


def test_the_nucleus_follows_doubt_and_the_menu_does_not():
    """A sure and an unsure row: nuclei of 1 and of 10 tokens; the sure model's top 4 is noise beyond its first."""
    sure, other = torch.zeros(2, 1, 10, dtype=torch.float64).unbind()
    sure[0, 0], other[0, 0] = 20.0, 20.0
    sure[0, 1:4], other[0, 4:7] = 1e-3, 1e-3  # noise in the tail decides three of four places
    result, sets = menu_overlap(sure, other, 4), nucleus_overlap(sure, torch.zeros(1, 10))
    assert float(result.ratio_N) == 0.25 and float(result.student_mass_N) > 0.999999 and float(result.kl_N) < 1e-9
    assert float(nucleus_overlap(sure, other).jaccard_N) == 1
    assert sets.student_size_N.tolist() == [1] and sets.teacher_size_N.tolist() == [10]
    assert float(sets.teacher_cross_mass_N) == pytest.approx(0.1)
    assert float(sets.student_cross_mass_N) == pytest.approx(1)


@given(st.integers(0, 10**6), st.floats(-30, 30), st.integers(1, 9))
def test_neither_constants_nor_the_order_of_rows_and_of_tokens_matter(seed, constant, k):
    """Probabilities are what counts. Rows and tokens (all different here) may be renumbered in both models."""
    student_NV, teacher_NV = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(seed)).double().unbind()
    draw = torch.Generator().manual_seed(seed + 1)
    rows, tokens = torch.randperm(5, generator=draw), torch.randperm(9, generator=draw)
    for measure, setting, names in ((menu_overlap, k, TENSORS), (nucleus_overlap, 0.7, NUCLEUS)):
        plain = measure(student_NV, teacher_NV, setting)
        moved = measure((student_NV + constant)[rows][:, tokens], teacher_NV[rows][:, tokens], setting)
        for name in names:
            torch.testing.assert_close(getattr(moved, name), getattr(plain, name)[rows], equal_nan=True)


def test_exchanging_the_models_exchanges_the_columns():
    student_NV, teacher_NV = case(N=20, seed=5)
    one, other = menu_overlap(student_NV, teacher_NV, 3), menu_overlap(teacher_NV, student_NV, 3)
    for name, partner in (("ratio_N", "ratio_N"), ("student_mass_N", "teacher_mass_N"),
                          ("student_menu_mass_N", "teacher_menu_mass_N"), ("student_entropy_N", "teacher_entropy_N")):
        torch.testing.assert_close(getattr(one, name), getattr(other, partner))
    torch.testing.assert_close(other.kl_N, token_kl(teacher_NV, student_NV))
    one, other = nucleus_overlap(student_NV, teacher_NV, 0.6), nucleus_overlap(teacher_NV, student_NV, 0.6)
    torch.testing.assert_close(one.student_cross_mass_N, other.teacher_cross_mass_N)
    assert torch.equal(one.student_size_N, other.teacher_size_N) and torch.equal(one.jaccard_N, other.jaccard_N)


@pytest.mark.parametrize("broken", ["nan", "inf", "forbidden"])
@pytest.mark.parametrize("whose", [0, 1])
def test_a_row_that_is_no_distribution_shows_and_spoils_no_other(broken, whose):
    """NaN in all that compares the two models at that row; nothing else changes, so a mask can leave it out."""
    pair = [logits_NV.clone() for logits_NV in case(N=3)]
    fine = [logits_NV[[0, 2]] for logits_NV in pair]
    if broken == "forbidden":
        pair[whose][1] = -math.inf
    else:
        pair[whose][1, 4] = float(broken)
    own = ("student", "teacher")[whose]
    for result, expected, names in (
            (menu_overlap(*pair, 8), menu_overlap(*fine, 8),
             ["ratio_N", "student_mass_N", "teacher_mass_N", "advantage_N", "kl_N", f"{own}_entropy_N"]),
            (nucleus_overlap(*pair), nucleus_overlap(*fine),
             ["jaccard_N", "student_cross_mass_N", "teacher_cross_mass_N"])):
        for name in names:
            values_N = getattr(result, name)
            assert math.isnan(float(values_N[1])), name
            torch.testing.assert_close(values_N[[0, 2]], getattr(expected, name), equal_nan=True)


def test_a_few_rows_at_a_time_are_the_same(monkeypatch):
    """The last part is a shorter one, and one row may be more than a part."""
    student_NV, teacher_NV = case(N=7)
    whole, whole_sets = menu_overlap(student_NV, teacher_NV, 3), nucleus_overlap(student_NV, teacher_NV)
    for elements in (18, 1):
        monkeypatch.setattr("labkit.measure.menu.ELEMENTS", elements)
        parts, sets = menu_overlap(student_NV, teacher_NV, 3), nucleus_overlap(student_NV, teacher_NV)
        for one, other, names in ((parts, whole, TENSORS), (sets, whole_sets, NUCLEUS)):
            for name in names:
                torch.testing.assert_close(getattr(one, name), getattr(other, name), equal_nan=True)


def test_no_rows_give_no_rows_and_no_gradient_is_kept():
    nothing = torch.empty(0, 5)
    result, sets = menu_overlap(nothing, nothing, 2), nucleus_overlap(nothing, nothing)
    assert all(getattr(result, name).shape == (0,) for name in TENSORS) and result.chance == 0.4
    assert all(getattr(sets, name).shape == (0,) for name in NUCLEUS)
    student = torch.randn(2, 5, requires_grad=True)
    assert not menu_overlap(student, student, 2).kl_N.requires_grad


@pytest.mark.parametrize("measure, bad, says", [
    (menu_overlap, lambda q, p: (q, p, 0), "from 1 to 9"),
    (menu_overlap, lambda q, p: (q, p, 10), "from 1 to 9"),
    (menu_overlap, lambda q, p: (q, p, 2.5), "whole number"),
    (menu_overlap, lambda q, p: (q, p[:, :8], 3), "shape of the student's logits"),
    (menu_overlap, lambda q, p: (q[0], p[0], 3), r"\[N, V\]"),
    (menu_overlap, lambda q, p: (q.long(), p, 3), "floating type"),
    (menu_overlap, lambda q, p: (q[:, :0], p[:, :0], 1), "V of 1 or more"),
    (nucleus_overlap, lambda q, p: (q, p, 0.0), "above 0 and below 1"),
    (nucleus_overlap, lambda q, p: (q, p, 1.0), "above 0 and below 1"),
    (nucleus_overlap, lambda q, p: (q, p, math.nan), "above 0 and below 1"),
    (nucleus_overlap, lambda q, p: (q[:2], p), "shape of the student's logits"),
    (nucleus_overlap, lambda q, p: (q, p.long()), "floating type"),
])
def test_bad_input_gets_a_sentence(measure, bad, says):
    with pytest.raises(LabError, match=says):
        measure(*bad(*case()))


def test_the_menu_is_a_mask_with_the_lower_ids_of_equals():
    """On every device: the ids that topk returns for equal logits are not defined."""
    logits_NV = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [3.0, -math.inf, -math.inf, -math.inf, -math.inf]])
    assert menu(logits_NV, 2).tolist() == [[False, True, True, False, False], [True] + [False] * 4]
    assert nucleus(torch.zeros(1, 4), 0.5).tolist() == [[True, True, False, False]]
