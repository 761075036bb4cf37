"""Arithmetic for one GPU: how fast it can go, how long a run takes, what fits into its memory.

    attainable  = min(peak, intensity * bandwidth)                     the roofline; the two meet at the ridge point
    FLOPs/token = 6 N + 12 L H K T                                     training, forward and backward
    seconds     = tokens * FLOPs/token / (MFU * peak)
    bytes       = states + activations + logits

Letters: N parameters, L layers, H heads, K head size, T context, B batch, D width, V vocabulary.
MFU is model FLOPs utilisation: useful FLOPs per second over the card's dense peak at the same precision.
Sources: roofline: Williams, Waterman, Patterson (CACM 2009). FLOPs per token: PaLM (arXiv 2204.02311, appendix B).
Activations: Korthikanti et al. (2205.05198). The cards: each figure carries its own tag (`SOURCES`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from labkit.errors import LabError

SOURCES = {
    "vendor": "an NVIDIA document, table or source file",
    "code": "a table of peaks in somebody else's training code (nanochat, llm.c)",
    "blog": "the press or a hardware database",
    "measured": "measured by this project on one H200, October to November 2026",
    "inferred": "our arithmetic from figures with one of the other tags",
}


class Fact(NamedTuple):
    """A figure and how it is known (a key of SOURCES)."""

    value: float
    source: str


@dataclass(frozen=True)
class Card:
    """What a data sheet should say about a GPU for training. All rates are dense, with fp32 accumulation."""

    name: str
    reported_as: str  # by torch.cuda.get_device_name()
    capability: Fact  # CUDA compute capability
    sms: Fact
    bf16_tflops: Fact  # 10^12 FLOP/s
    fp8_tflops: Fact
    memory_gb: Fact  # 10^9 bytes
    bandwidth_gb_s: Fact  # 10^9 bytes/s, of the data sheet
    l2_mb: Fact
    board_power_w: Fact
    block_shared_kb: Fact  # 1024 bytes: the most shared memory that one block may ask for

    @property
    def peak(self) -> float:
        """bf16 FLOP/s."""
        return self.bf16_tflops.value * 1e12

    @property
    def bandwidth(self) -> float:
        """Bytes/s."""
        return self.bandwidth_gb_s.value * 1e9

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gb.value * 1e9


def _card(name: str, reported_as: str, **facts: tuple[float, str]) -> Card:
    return Card(name, reported_as, **{field: Fact(*fact) for field, fact in facts.items()})


# State of November 2026. The Max-Q edition of the RTX PRO 6000 has 438.9 TFLOP/s at 300 W [vendor].
CARDS = {card.name: card for card in (
    _card("RTX 4090", "NVIDIA GeForce RTX 4090", capability=(8.9, "vendor"), sms=(128, "blog"),
          bf16_tflops=(165.2, "code"), fp8_tflops=(330.3, "code"), memory_gb=(24, "blog"),
          bandwidth_gb_s=(1008, "blog"), l2_mb=(72, "blog"), board_power_w=(450, "blog"),
          block_shared_kb=(99, "vendor")),
    _card("RTX 5090", "NVIDIA GeForce RTX 5090", capability=(12.0, "vendor"), sms=(170, "blog"),
          bf16_tflops=(209.5, "code"), fp8_tflops=(419, "inferred"), memory_gb=(32, "blog"),
          bandwidth_gb_s=(1792, "blog"), l2_mb=(96, "blog"), board_power_w=(575, "blog"),
          block_shared_kb=(99, "vendor")),
    _card("RTX PRO 6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", capability=(12.0, "vendor"),
          sms=(188, "vendor"), bf16_tflops=(503.8, "vendor"), fp8_tflops=(1008, "inferred"), memory_gb=(96, "blog"),
          bandwidth_gb_s=(1792, "blog"), l2_mb=(128, "blog"), board_power_w=(600, "blog"),
          block_shared_kb=(99, "vendor")),
    _card("H200 SXM", "NVIDIA H200", capability=(9.0, "vendor"), sms=(132, "measured"),
          bf16_tflops=(989, "vendor"), fp8_tflops=(1979, "inferred"), memory_gb=(141, "blog"),
          bandwidth_gb_s=(4800, "blog"), l2_mb=(60, "measured"), board_power_w=(700, "blog"),
          block_shared_kb=(227, "vendor")),
)}


def find_card(device_name: str) -> Card | None:
    """The card that torch reports under exactly this name; None for all others.

    A near match is no match: laptop, Max-Q and server editions have other peaks, and an MFU against a foreign peak is
    the commonest wrong number in training logs.
    """
    return next((card for card in CARDS.values() if card.reported_as == device_name), None)


# ---- speed ----------------------------------------------------------------------------------------------------------

def attainable(intensity: float | np.ndarray, peak: float, bandwidth: float) -> float | np.ndarray:
    """FLOP/s that a kernel of this arithmetic intensity (FLOP per byte) can reach: min(peak, intensity * bandwidth)."""
    return np.minimum(peak, np.multiply(intensity, bandwidth))


def ridge_point(peak: float, bandwidth: float) -> float:
    """Intensity, in FLOP per byte, at which memory stops being the limit: peak / bandwidth."""
    return peak / bandwidth


def matmul_intensity(M: int, N: int, K: int, element_bytes: int = 2) -> float:
    """FLOP per byte of [M, K] @ [K, N] if each matrix crosses memory once: 2MNK / (bytes (MK + KN + MN))."""
    return 2 * M * N * K / (element_bytes * (M * K + K * N + M * N))


def training_flops_per_token(parameters: float, layers: int, heads: int, head_size: int, context: int) -> float:
    """6N + 12 L H K T: two FLOPs a parameter forward, four backward; and attention over all T keys, as if unmasked."""
    return 6 * parameters + 12 * layers * heads * head_size * context


def training_hours(parameters: float, tokens: float, mfu: float, peak: float, *, attention_flops: float = 0.0) -> float:
    """Hours to train on `tokens`: tokens (6N + attention_flops) / (MFU peak) / 3600.

    Args:
        mfu: between 0 and 1; plan with 0.3 to 0.5 until you have measured your own.
        peak: dense FLOP/s at the precision of training.
        attention_flops: 12 L H K T of `training_flops_per_token`; 0 gives the common 6ND rule.
    Raises:
        LabError: an MFU outside (0, 1].
    """
    if not 0 < mfu <= 1:
        raise LabError(f"An MFU of {mfu} is impossible.", "Give a fraction between 0 and 1, such as 0.4.")
    return tokens * (6 * parameters + attention_flops) / (mfu * peak) / 3600


# What one multiply-add unit's figure is multiplied by on the way from dense bf16 to the box of a GeForce.
PRECISION_FACTOR = {"fp16": 1, "bf16": 1, "fp8": 2, "int8": 2, "fp4": 4}


def marketing_to_dense(tops: float, precision: str, *, sparse: bool, accumulate: str = "fp32") -> float:
    """Dense bf16 TFLOP/s with fp32 accumulation behind an advertised number.

        dense = tops / (precision: 1, 2, 4 for 16, 8, 4 bits) / (2 if 2:4 sparse) / (2 if accumulated in fp16)

    `accumulate="fp16"` is for GeForce cards, whose fp32-accumulate rate is half; on PRO and data-centre cards both
    rates are equal, so say "fp32". Exact for the RTX 5090 (838 -> 209.5); the PRO 6000's 4,000 is a rounded 4,030.
    """
    if precision not in PRECISION_FACTOR or accumulate not in ("fp16", "fp32"):
        raise LabError(f"There is no rule for {precision} accumulated in {accumulate}.",
                       f"Choose from {', '.join(PRECISION_FACTOR)}, accumulated in fp16 or fp32.")
    return tops / PRECISION_FACTOR[precision] / (2 if sparse else 1) / (2 if accumulate == "fp16" else 1)


# ---- memory ---------------------------------------------------------------------------------------------------------

# Bytes per parameter that live from one step to the next, or from backward to the optimizer's step.
RECIPES = {
    "fp32": {"weights": 4, "gradients": 4, "Adam m": 4, "Adam v": 4},
    "bf16 Adam": {"weights": 2, "gradients": 2, "master weights": 4, "Adam m": 4, "Adam v": 4},
    "bf16 Adam, fp32 gradients": {"weights": 2, "gradients": 4, "master weights": 4, "Adam m": 4, "Adam v": 4},
    "8-bit Adam": {"weights": 2, "gradients": 2, "master weights": 4, "Adam m": 1, "Adam v": 1},
}


def state_bytes(parameters: float, recipe: str = "bf16 Adam") -> float:
    """Bytes of weights, gradients and optimizer state: N times the sum of the recipe (16, 16, 18, 10 bytes)."""
    if recipe not in RECIPES:
        raise LabError(f"There is no recipe {recipe!r}.", f"Choose from: {'; '.join(RECIPES)}.")
    return parameters * sum(RECIPES[recipe].values())


def activation_bytes(layers: int, width: int, tokens: int, per_width: float = 34.0) -> float:
    """Bytes kept for the backward pass: per_width * L * D * tokens.

    34 is the published count for GPT-2's block in 16 bits with fused attention: 16 numbers of width D a token, and two
    dropout masks of one byte. It is a property of the block; `swiglu_per_width` has this course's.
    """
    return per_width * layers * width * tokens


def swiglu_per_width(ffn_over_width: float, element_bytes: int = 2) -> float:
    """`per_width` of labkit's block (no dropout): element_bytes * (8 + 4 F/D).

    8: two norms with input and output each, and q, k, v and the attention's output. 4 F/D: gate, up, silu(gate) and
    their product. PyTorch keeps more where an operation is not fused; notebook 00 counts how much.
    """
    return element_bytes * (8 + 4 * ffn_over_width)


def logits_bytes(tokens: int, vocab: int, element_bytes: int = 4) -> float:
    """Bytes of one copy of the logits [tokens, V]; cross-entropy's gradient is a second copy unless it is fused."""
    return element_bytes * tokens * vocab


@dataclass(frozen=True)
class Shape:
    """What the memory and time of a decoder with GPT-2's block depend on."""

    parameters: float
    layers: int
    width: int
    heads: int
    vocab: int = 50_304  # GPT-2's 50,257, rounded up to a multiple of 64

    @property
    def attention_flops_per_position(self) -> int:
        """12 L H K: multiply by the context for the attention's FLOPs per token (H K = D)."""
        return 12 * self.layers * self.width


# GPT-2's family; the last two are GPT-3's (arXiv 2005.14165, table 2.1) with GPT-2's vocabulary.
SHAPES = {
    "124M": Shape(124e6, 12, 768, 12),
    "350M": Shape(350e6, 24, 1024, 16),
    "774M": Shape(774e6, 36, 1280, 20),
    "1.56B": Shape(1.56e9, 48, 1600, 25),
    "2.7B": Shape(2.7e9, 32, 2560, 32),
    "6.7B": Shape(6.7e9, 32, 4096, 32),
}


def memory_stack(shape: Shape, batch: int, context: int, recipe: str = "bf16 Adam") -> dict[str, float]:
    """Bytes by part, for `batch` x `context` tokens: the parts of the recipe, then activations, then logits."""
    tokens = batch * context
    states = {part: size * shape.parameters for part, size in RECIPES[recipe].items()}
    return states | {"activations": activation_bytes(shape.layers, shape.width, tokens),
                     "logits": logits_bytes(tokens, shape.vocab)}
