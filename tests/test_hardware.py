"""The planning arithmetic agrees with published figures, with itself, and with the bytes of a real model.

Expected values are written out here from the sources (not computed by the code under test), so a wrong factor of
2, a lost term or a mistyped card fails at least one line.
"""

import pytest
import torch

from labkit.errors import LabError
from labkit.measure import hardware
from labkit.measure.hardware import CARDS, RECIPES, SHAPES, SOURCES
from labkit.models import GPT, GPTConfig


def test_every_figure_of_every_card_says_how_it_is_known():
    """A card is data with a source for each figure; an unknown tag would be an unsourced number."""
    facts = [fact for card in CARDS.values() for fact in vars(card).values() if isinstance(fact, hardware.Fact)]
    assert len(facts) == len(CARDS) * 9
    assert {fact.source for fact in facts} <= set(SOURCES)


def test_a_card_is_found_by_its_exact_name_only():
    """A laptop's or a Max-Q's peak is another one: guessing the card would give a wrong MFU."""
    assert hardware.find_card("NVIDIA H200").name == "H200 SXM"
    for other in ("NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", ""):
        assert hardware.find_card(other) is None


@pytest.mark.parametrize("name, ridge", [("RTX 4090", 164), ("RTX 5090", 117), ("RTX PRO 6000", 281),
                                         ("H200 SXM", 206)])
def test_ridge_points_are_the_published_ones(name, ridge):
    """Peak and bandwidth both enter: a wrong unit or a mistyped figure moves the ridge."""
    assert round(hardware.ridge_point(CARDS[name].peak, CARDS[name].bandwidth)) == ridge


def test_the_two_blackwell_cards_share_a_die():
    """209.5 x 2 (full-rate accumulation) x 188/170 SMs x 2.617/2.407 GHz = the vendor's 503.8: both figures hold."""
    small, big = CARDS["RTX 5090"], CARDS["RTX PRO 6000"]
    per_sm_and_clock = big.sms.value / small.sms.value * 2.617 / 2.407
    assert small.bf16_tflops.value * 2 * per_sm_and_clock == pytest.approx(big.bf16_tflops.value, rel=1e-3)
    assert small.bandwidth == big.bandwidth


def test_attainable_is_memory_below_the_ridge_and_peak_above():
    """Continuous at the ridge, linear below it, flat above it; also elementwise."""
    assert hardware.attainable(5, 1000.0, 10.0) == 50
    assert hardware.attainable(100, 1000.0, 10.0) == hardware.attainable(1e6, 1000.0, 10.0) == 1000
    assert hardware.attainable([1, 200], 1000.0, 10.0).tolist() == [10, 1000]


def test_matmul_intensity_of_known_shapes():
    """A 128 x 128 bf16 tile over a long K has 64 FLOP per byte, a 256 x 256 one 128; a matrix-vector product has 1."""
    assert hardware.matmul_intensity(128, 128, 10**7) == pytest.approx(64, rel=1e-3)
    assert hardware.matmul_intensity(256, 256, 10**7) == pytest.approx(128, rel=1e-3)
    assert hardware.matmul_intensity(1, 10**4, 10**4) == pytest.approx(1, rel=1e-3)
    assert hardware.matmul_intensity(96, 96, 96, element_bytes=4) == 16


def test_flops_per_token_of_gpt2():
    """8.6e8 for 124M parameters at T = 1024, of which the attention term adds 15% to 6N."""
    flops = hardware.training_flops_per_token(124.4e6, 12, 12, 64, 1024)
    assert flops == pytest.approx(8.6e8, rel=2e-3)
    assert flops / (6 * 124.4e6) == pytest.approx(1.15, abs=0.005)


@pytest.mark.parametrize("name, hours", [("RTX 4090", (48, 36, 29)), ("RTX 5090", (38, 29, 23)),
                                         ("RTX PRO 6000", (16, 12, 9.5)), ("H200 SXM", (8, 6, 4.8))])
def test_hours_of_gpt2_on_ten_billion_tokens(name, hours):
    """The brief's table at 30, 40 and 50% MFU, to the digits it prints."""
    attention = SHAPES["124M"].attention_flops_per_position * 1024
    for mfu, expected in zip((0.3, 0.4, 0.5), hours, strict=True):
        got = hardware.training_hours(124e6, 10e9, mfu, CARDS[name].peak, attention_flops=attention)
        assert got == pytest.approx(expected, abs=0.6 if expected > 10 else 0.06)


def test_hours_by_the_6nd_rule():
    """350M on 7B tokens at 45% of a PRO 6000: 1.47e19 FLOP, 18 hours."""
    assert hardware.training_hours(350e6, 7e9, 0.45, CARDS["RTX PRO 6000"].peak) == pytest.approx(18.01, abs=0.01)


@pytest.mark.parametrize("tops, precision, sparse, accumulate, dense", [
    (838, "fp16", True, "fp16", 209.5), (3352, "fp4", True, "fp16", 209.5),
    (4030.4, "fp4", True, "fp32", 503.8), (3958, "fp8", True, "fp32", 989.5), (209.5, "bf16", False, "fp32", 209.5)])
def test_marketing_to_dense(tops, precision, sparse, accumulate, dense):
    """Advertised figures of three cards come down to the dense figures of the table, which other sources gave."""
    got = hardware.marketing_to_dense(tops, precision, sparse=sparse, accumulate=accumulate)
    assert got == pytest.approx(dense, rel=1e-6)


def test_the_tables_fp8_figures_convert_to_its_bf16_figures():
    """fp8 is twice bf16 on every card here, within the vendor's rounding."""
    for card in CARDS.values():
        got = hardware.marketing_to_dense(card.fp8_tflops.value, "fp8", sparse=False)
        assert got == pytest.approx(card.bf16_tflops.value, rel=1e-3)


def test_bytes_per_parameter_of_each_recipe():
    """16, 16, 18 and 10 bytes, the counts used everywhere in the course."""
    per_parameter = {recipe: hardware.state_bytes(1, recipe) for recipe in RECIPES}
    assert per_parameter == {"fp32": 16, "bf16 Adam": 16, "bf16 Adam, fp32 gradients": 18, "8-bit Adam": 10}


@pytest.mark.parametrize("name, states, activations", [("124M", 2.0, 10.3), ("350M", 5.6, 27.4), ("774M", 12.4, 51.3)])
def test_memory_of_the_gpt2_family(name, states, activations):
    """The brief's table for 32 x 1024 tokens, in gigabytes to its digits, and 6.6 GB of fp32 logits for each."""
    stack = hardware.memory_stack(SHAPES[name], 32, 1024)
    assert stack["activations"] / 1e9 == pytest.approx(activations, abs=0.05)
    assert stack["logits"] / 1e9 == pytest.approx(6.6, abs=0.05)
    assert sum(stack.values()) - stack["activations"] - stack["logits"] == hardware.state_bytes(SHAPES[name].parameters)
    assert hardware.state_bytes(SHAPES[name].parameters) / 1e9 == pytest.approx(states, abs=0.05)


def test_activations_of_the_swiglu_block_against_gpt2s():
    """34 less two one-byte masks is 32; SwiGLU at 8/3 D holds 10.67 D numbers where GELU holds 8 D: 5.33 bytes more."""
    assert hardware.swiglu_per_width(8 / 3) == pytest.approx(34 - 2 + 2 * (4 * 8 / 3 - 8))
    assert hardware.swiglu_per_width(2.625, element_bytes=4) == 4 * 18.5
    assert hardware.activation_bytes(2, 8, 100, per_width=10) == 2 * 8 * 100 * 10


def test_state_bytes_are_the_bytes_of_a_real_model():
    """One AdamW step in fp32: weights, gradients, m and v counted tensor by tensor are 16 bytes a parameter.

    AdamW also keeps one 4-byte step counter a tensor, counted apart, so the comparison is exact.
    """
    model = GPT(GPTConfig(vocab_size=61, context=8, width=16, layers=2, heads=2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    tensors = [*parameters, *(p.grad for p in parameters), *states]
    counted = sum(tensor.nbytes for tensor in tensors) - 4 * len(parameters)
    assert counted == hardware.state_bytes(model.count_parameters(), "fp32")


@pytest.mark.parametrize("call", [
    lambda: hardware.state_bytes(10, "fp64"), lambda: hardware.training_hours(1, 1, 40, 1.0),
    lambda: hardware.training_hours(1, 1, 0, 1.0), lambda: hardware.marketing_to_dense(1, "fp2", sparse=True),
    lambda: hardware.marketing_to_dense(1, "fp4", sparse=True, accumulate="int8")])
def test_a_wrong_argument_gets_a_sentence(call):
    """An unknown recipe or precision and an MFU in per cent are user mistakes, not tracebacks."""
    with pytest.raises(LabError):
        call()
