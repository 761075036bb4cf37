"""The decoder computes what it says: against Hugging Face's Llama, by gradients, and with and without its cache."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from labkit.errors import LabError
from labkit.models import GPT, GPTConfig, KVCache, document_mask, generate
from labkit.models.gpt import rope_tables, rotate
from labkit.models.llama import from_llama
from labkit.models.sample import cut_to_top_k, cut_to_top_p

SMALL = GPTConfig(vocab_size=61, context=32, width=24, layers=2, heads=4, kv_heads=2, qk_norm=True)


def tokens(B=3, T=16, V=61, seed=0):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_llama(tied, kv_heads):
    """At equal weights the logits equal those of transformers' Llama to 1e-5: every part is the standard one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_theta=10_000.0, attention_bias=False)).eval()
    for parameter in theirs.parameters():  # norms start at one and weights small: make both visible
        torch.nn.init.normal_(parameter, std=0.3)
    config = GPTConfig(vocab_size=61, context=64, width=32, layers=3, heads=4, kv_heads=kv_heads, ffn=80, tied=tied)
    with torch.no_grad():
        ours = from_llama(theirs.state_dict(), config)(tokens(T=48))
        torch.testing.assert_close(ours, theirs(tokens(T=48)).logits, atol=1e-5, rtol=1e-5)


def test_causal_by_gradient():
    """The gradient of position t's logits is exactly zero for inputs after t and not zero up to t."""
    model = GPT(SMALL)
    x_BTD = model.embed(tokens(B=1)).detach().requires_grad_()
    model.head(model.trunk(x_BTD))[0, 7].square().sum().backward()
    reach_T = x_BTD.grad[0].abs().sum(-1)
    assert (reach_T[:8] > 0).all() and (reach_T[8:] == 0).all()


def test_documents_are_isolated():
    """With the document mask a packed document's logits equal those of the document alone: RoPE is relative."""
    model, row = GPT(SMALL).double(), tokens(B=1)
    document_BT = torch.tensor([[0] * 6 + [1] * 10])
    packed = model(row, document_mask_BTT=document_mask(document_BT))
    torch.testing.assert_close(packed[:, 6:], model(row[:, 6:]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(packed[:, :6], model(row[:, :6]), atol=1e-6, rtol=1e-6)


def test_rope_is_relative():
    """q_t . k_u depends on t - u only: shift both and nothing changes."""
    cos, sin = rope_tables(64, 8, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1))
    score = [(rotate(q, cos[t : t + 1], sin[t : t + 1]) * rotate(k, cos[t - 5 : t - 4], sin[t - 5 : t - 4])).sum()
             for t in (5, 23, 60)]
    torch.testing.assert_close(torch.stack(score), score[0].expand(3), atol=1e-5, rtol=1e-5)
    assert abs(score[0] - (q * k).sum()) > 1e-3


@pytest.mark.parametrize("chunks", [[16], [1] * 16, [5, 1, 7, 3]])
def test_cache_changes_nothing(chunks):
    """Logits with a cache, fed in pieces of any size, equal those of one pass."""
    model, row_BT = GPT(SMALL).double(), tokens()
    cache = KVCache(SMALL, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        pieces = [model(part, cache=cache) for part in row_BT.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(row_BT).detach(), atol=1e-6, rtol=1e-6)


def test_sampled_logprob_is_the_models():
    """The log-probability that comes with a sample equals a fresh pass over prompt and sample."""
    model, prompt_BT = GPT(SMALL), tokens(B=5, T=7)
    new = generate(model, prompt_BT, max_new_tokens=20, temperature=0.7, generator=torch.Generator().manual_seed(3))
    whole_BT = torch.cat((prompt_BT, new.tokens_BT), dim=1)
    logprob = F.log_softmax(model(whole_BT)[:, 6:-1] / 0.7, dim=-1).gather(2, new.tokens_BT[:, :, None]).squeeze(2)
    torch.testing.assert_close(new.logprob_BT, logprob.detach(), atol=1e-4, rtol=1e-4)
    assert (new.length_B == 20).all() and not new.stopped_B.any()


def test_stop_tokens_end_a_row():
    """After the first stop token a row holds only the fill and zero log-probability, and its length says where."""
    model, stop = GPT(SMALL), tuple(range(0, 61, 3))
    new = generate(model, tokens(B=64, T=4), max_new_tokens=28, stop_tokens=stop,
                   generator=torch.Generator().manual_seed(0))
    for row, length, logprob, stopped in zip(new.tokens_BT, new.length_B, new.logprob_BT, new.stopped_B, strict=True):
        inside = torch.isin(row[:length], torch.tensor(stop))
        assert inside[:-1].sum() == 0 and bool(inside[-1]) == bool(stopped)
        assert (row[length:] == stop[0]).all() and (logprob[length:] == 0).all() and (logprob[:length] < 0).all()


def test_greedy_is_argmax_and_cuts_cut():
    """Temperature 0 takes the argmax; top-k and top-p keep exactly the sets their definitions name."""
    model, prompt_BT = GPT(SMALL), tokens(B=2, T=3)
    first = generate(model, prompt_BT, max_new_tokens=1, temperature=0).tokens_BT[:, 0]
    assert torch.equal(first, model(prompt_BT)[:, -1].argmax(-1))
    logits_BV = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert cut_to_top_k(logits_BV, 2).isfinite().tolist() == [[True, True, False, False]]
    assert cut_to_top_p(logits_BV, 0.75).isfinite().tolist() == [[True, True, False, False]]
    assert cut_to_top_p(logits_BV, 0.81).isfinite().tolist() == [[True, True, True, False]]
    assert cut_to_top_p(logits_BV, 1e-6).isfinite().tolist() == [[True, False, False, False]]


def test_sampling_follows_the_distribution():
    """Frequencies of 20,000 draws agree with the softmax: the sampler has no bias."""
    model, prompt_BT = GPT(SMALL), tokens(B=1, T=5).expand(20_000, 5)
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # far from uniform
        new = generate(model, prompt_BT, max_new_tokens=1, generator=torch.Generator().manual_seed(0))
        expected_V = model(prompt_BT[:1])[0, -1].softmax(-1)
    seen_V = new.tokens_BT[:, 0].bincount(minlength=61) / 20_000
    assert (seen_V - expected_V).abs().max() < 4 * (0.25 / 20_000) ** 0.5


@pytest.mark.parametrize("change", [{"kv_heads": 3}, {"head_size": 5}])
def test_bad_shapes_are_refused(change):
    """A shape that cannot work is refused in a sentence before any weight is made."""
    with pytest.raises(LabError):
        dataclasses.replace(SMALL, **change)


def test_too_long_is_refused():
    """Input beyond the context is refused, with and without a cache, and so are impossible sampling settings."""
    model = GPT(SMALL)
    with pytest.raises(LabError, match="context of 32"):
        model(tokens(T=33))
    with pytest.raises(LabError, match="exceed a context"):
        generate(model, tokens(T=16), max_new_tokens=20)
    with pytest.raises(LabError, match="describe no distribution"):
        generate(model, tokens(T=4), max_new_tokens=2, top_p=0.0)


def test_seed_decides_the_weights():
    """Equal seeds give equal weights whatever was drawn before; different seeds differ."""
    torch.rand(7)
    first, again, other = GPT(SMALL, seed=4), GPT(SMALL, seed=4), GPT(SMALL, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
