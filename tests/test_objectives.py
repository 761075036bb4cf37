"""The losses equal their definitions, value and gradient, in float64; each term is visible in a test."""

import math

import pytest
import torch
import torch.nn.functional as F

from labkit.errors import LabError
from labkit.models import GPT, GPTConfig
from labkit.objectives import (
    bag_any_cross_entropy,
    bag_binary_cross_entropy,
    bag_cross_entropy,
    bag_margin_loss,
    next_token_loss,
    split_into_bags,
)
from labkit.trainers.superposition import (
    Superposition,
    bags_in_only_loss,
    bags_out_only_loss,
    superpose,
    superposed_loss,
    window_length,
)

CONFIG = GPTConfig(vocab_size=19, context=8, width=16, layers=2, heads=2, tied=False)


def case(B=2, N=3, S=4, V=19, seed=0):
    """Logits far from uniform, and bags that hold some token twice."""
    generator = torch.Generator().manual_seed(seed)
    logits_BNV = 3 * torch.randn(B, N, V, generator=generator, dtype=torch.float64)
    bag_BNS = torch.randint(V, (B, N, S), generator=generator)
    bag_BNS[:, :, -1] = bag_BNS[:, :, 0]
    return logits_BNV.requires_grad_(), bag_BNS


def assert_equal_with_gradient(loss, expected, logits):
    """Values and gradients agree to 1e-6 (the losses compute in float32)."""
    torch.testing.assert_close(loss.double(), expected, atol=2e-6, rtol=2e-6)
    (ours,), (theirs,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert theirs.abs().max() > 1e-3


def test_bag_loss_is_the_mean_of_cross_entropies():
    """The logsumexp form equals S ordinary cross-entropies on the same logits, a repeated token counted twice."""
    logits, bag = case()
    one_by_one = [F.cross_entropy(logits.flatten(0, 1), bag[:, :, j].flatten()) for j in range(bag.shape[2])]
    assert_equal_with_gradient(bag_cross_entropy(logits, bag), torch.stack(one_by_one).mean(), logits)


def test_bag_loss_is_a_divergence():
    """Loss minus the bag's entropy is KL(bag || softmax), by torch's own kl_div; so its floor is log S."""
    logits, bag = case()
    target = torch.zeros(logits.shape, dtype=torch.float64).scatter_add(2, bag, torch.full(bag.shape, 0.25).double())
    entropy = -torch.xlogy(target, target).sum(-1).mean()
    divergence = F.kl_div(logits.log_softmax(-1).flatten(0, 1), target.flatten(0, 1), reduction="batchmean")
    torch.testing.assert_close(bag_cross_entropy(logits, bag).double(), divergence + entropy, atol=2e-6, rtol=2e-6)
    distinct = torch.arange(4).expand(1, 1, 4)
    perfect = torch.full((1, 1, 19), -1e4).scatter(2, distinct, 0.0)
    assert bag_cross_entropy(perfect, distinct).item() == pytest.approx(math.log(4))


def test_bag_weights():
    """Weights by place multiply each place's cross-entropy; all weight on the first is next-token prediction."""
    logits, bag = case()
    weight = torch.tensor([0.4, 0.3, 0.2, 0.1])
    expected = sum(w * F.cross_entropy(logits.flatten(0, 1), bag[:, :, j].flatten())
                   for j, w in enumerate(weight.double()))
    assert_equal_with_gradient(bag_cross_entropy(logits, bag, weight), expected, logits)


def test_losses_of_bf16_logits_are_computed_in_float32():
    """bf16 logits give the loss of the same values in float32, to float32's precision: no sum is taken in bf16."""
    logits, bag = case(V=19)
    logits = logits.detach().bfloat16()
    for loss in (bag_cross_entropy, bag_any_cross_entropy, bag_binary_cross_entropy, bag_margin_loss):
        torch.testing.assert_close(loss(logits, bag), loss(logits.float(), bag), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(next_token_loss(logits, bag[..., 0]), next_token_loss(logits.float(), bag[..., 0]))


def test_bags_are_averaged_in_float32():
    """The mean of bf16 embeddings is that of the same values in float32, rounded once."""
    model = GPT(CONFIG).bfloat16()
    bag = torch.randint(19, (2, 3, 16), generator=torch.Generator().manual_seed(0))
    expected = model.embedding.weight.float()[bag].mean(2).bfloat16()
    assert torch.equal(superpose(model, bag), expected)
    one_by_one = sum(model.embedding.weight[bag[..., j]] for j in range(16)) / 16
    assert not torch.equal(expected, one_by_one), "the case would not notice a sum in bf16"


def test_bag_loss_ignores_order():
    """Permuting a bag changes the loss by nothing; exchanging tokens between bags does."""
    logits, bag = case()
    loss = bag_cross_entropy(logits, bag)
    torch.testing.assert_close(bag_cross_entropy(logits, bag.flip(2)), loss, atol=0, rtol=1e-6)
    assert (bag_cross_entropy(logits, bag.flip(1)) - loss).abs() > 1e-3


def test_alternatives_equal_their_definitions():
    """-log of the bag's mass; V binary questions over S; torch's own margin loss with each label once."""
    logits, bag = case()
    inside = torch.zeros(logits.shape, dtype=torch.float64).scatter(2, bag, 1.0)
    assert_equal_with_gradient(bag_any_cross_entropy(logits, bag),
                               -(logits.softmax(-1) * inside).sum(-1).log().mean(), logits)
    yes, no = logits.sigmoid(), (-logits).sigmoid()
    binary = -(inside * yes.log() + (1 - inside) * no.log()).sum(-1).mean() / 4
    assert_equal_with_gradient(bag_binary_cross_entropy(logits, bag), binary, logits)
    rows = zip(logits.flatten(0, 1), inside.bool().flatten(0, 1), strict=True)
    leads = [(1 - (z[y] - z[~m])).clamp(min=0).sum() for z, m in rows for y in m.nonzero()[:, 0]]
    margin = torch.stack(leads).sum() / (6 * 19)
    assert_equal_with_gradient(bag_margin_loss(logits, bag), margin, logits)


def test_bags_line_up():
    """Position i reads tokens iS to (i+1)S - 1 and must predict the S tokens that follow, in order, none twice."""
    read, target = split_into_bags(torch.arange(12)[None], 3)
    assert read.tolist() == [[[0, 1, 2], [3, 4, 5], [6, 7, 8]]]
    assert target.tolist() == [[[3, 4, 5], [6, 7, 8], [9, 10, 11]]]


@pytest.mark.parametrize("length, size", [(13, 3), (3, 3), (12, 0), (0, 2)])
def test_bags_that_do_not_fit_are_refused(length, size):
    """A window that is not a whole number of bags, or only one, is refused with the length that would do."""
    with pytest.raises(LabError, match="whole bags"):
        split_into_bags(torch.zeros(1, length, dtype=torch.long), size)


def test_bag_of_one_is_next_token_training_bit_for_bit():
    """With S = 1 loss and every gradient equal those of the baseline bit for bit: nothing is left of the method."""
    text = torch.randint(19, (2, 9), generator=torch.Generator().manual_seed(0))
    model, baseline = GPT(CONFIG), GPT(CONFIG)
    loss, expected = superposed_loss(model, text, 1), next_token_loss(baseline(text[:, :-1]), text[:, 1:])
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), baseline.parameters(), strict=True))


def test_superposed_loss_by_hand():
    """Mean embeddings in, next bag out: the whole of phase 1 against a version that loops over bags and tokens."""
    model, text, S = GPT(CONFIG), torch.randint(19, (2, 15), generator=torch.Generator().manual_seed(1)), 3
    bags = [[row[i : i + S] for i in range(0, 15, S)] for row in text]
    mean = [torch.stack([sum(model.embedding.weight[t] for t in bag) / S for bag in row[:-1]]) for row in bags]
    read = torch.stack(mean)
    logits = model.head(model.trunk(read))
    losses = [F.cross_entropy(logits[b, i][None], token[None]) for b, row in enumerate(bags)
              for i, bag in enumerate(row[1:]) for token in bag]
    torch.testing.assert_close(superposed_loss(model, text, S), torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_half_methods_by_hand():
    """Bags in only: the token after each bag. Bags out only: single tokens in, the S tokens after each as target."""
    model, text = GPT(CONFIG), torch.randint(19, (1, 12), generator=torch.Generator().manual_seed(2))
    read, target = split_into_bags(text, 3)
    logits = model.head(model.trunk(superpose(model, read)))
    torch.testing.assert_close(bags_in_only_loss(model, text, 3), next_token_loss(logits, target[:, :, 0]))
    short = text[:, : window_length(Superposition(3, 0.5, read=False), 8)]
    logits = model(short[:, :8])
    places = [F.cross_entropy(logits[0], short[0, 1 + j : 9 + j]) for j in range(3)]
    torch.testing.assert_close(bags_out_only_loss(model, short, 3), torch.stack(places).mean())


def test_no_position_sees_its_target():
    """Change one token of the text: the logits of every position that must predict it, or read before it, stay."""
    model, S = GPT(CONFIG).double(), 3
    text = torch.randint(19, (1, 15), generator=torch.Generator().manual_seed(3))
    changed = text.clone()
    changed[0, 7] = (text[0, 7] + 1) % 19  # in bag 2, the target of position 1
    before, after = (model.head(model.trunk(superpose(model, split_into_bags(t, S)[0]))) for t in (text, changed))
    same_N = (before == after).all(-1)[0]
    assert same_N.tolist() == [True, True, False, False]


def test_next_token_loss_mask():
    """The mean runs over the positions that count; if none does the loss is 0, not NaN."""
    logits, target = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)), torch.arange(10).view(2, 5) % 7
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)
    expected = F.cross_entropy(logits[mask], target[mask])
    torch.testing.assert_close(next_token_loss(logits, target, mask), expected)
    assert next_token_loss(logits, target, torch.zeros_like(mask)).item() == 0.0
