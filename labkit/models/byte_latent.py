"""A language model that reads bytes and thinks in patches of T bytes: the compression rate as a dial.

    y_p = W_in [e(x_pT) ; ... ; e(x_pT+T-1)]                          read: a patch's bytes, side by side
    g_p = Global(start, y_0, ..., y_p-1)_p                            the latent: causal, one step a patch
    h_j = Local(W_out,j g_p + e(x_pT+j-1))_j,    e(x_pT-1) := begin   write: causal inside the patch only
    p(x_pT+j | all bytes before it) = softmax(W_head norm(h_j))

The latent for patch p has read the patches before p, never p itself: its input is moved by one patch. Inside the patch
a byte sees the bytes before it. So each byte is predicted from exactly the bytes before it, the first of a text too,
and whatever comes from earlier patches has passed through the global module. The parameters hardly change with T, so T
can be dialled without a tokenizer or a vocabulary. `local_reach` bounds how far the local module looks back in its
patch; without a bound it becomes a model of its own as patches get long. Fixed patches are the control experiment of
Compute Optimal Tokenization (arXiv 2605.01188, appendix C); the Byte Latent Transformer (2412.09871) draws its borders
by entropy, looks further back in its local modules, and reads with an encoder where this file has one matrix.
Letters: B batch, S bytes, T bytes in a patch, P = S / T patches, D global and K local width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.errors import LabError
from labkit.models.attention import sdpa_attention
from labkit.models.gpt import Block, GPTConfig, RMSNorm, no_gate, rope_tables


@dataclass(frozen=True)
class ByteLatentConfig:
    """Shape: `patch` bytes a patch (T), `context` bytes a sequence (the longest S); the global and the local module."""

    patch: int
    context: int
    width: int  # D
    layers: int
    heads: int
    local_width: int = 32  # K
    local_layers: int = 1
    local_heads: int = 2
    local_ffn: int | None = None
    local_reach: int | None = None  # bytes of its patch that a local layer looks back on; None: all of them
    vocab_size: int = 256

    def __post_init__(self):
        if self.patch < 1 or self.context < 1 or self.context % self.patch:
            raise LabError(f"A context of {self.context} bytes can't be cut into patches of {self.patch}.",
                           "Choose a context that is a multiple of the patch.")
        if self.local_layers < 1 or self.local_reach == 0:
            raise LabError("Without a local layer and its reach no byte of a patch would see another.",
                           "Use local_layers >= 1 and local_reach >= 1.")
        _ = self.global_module, self.local_module  # they refuse what cannot be built

    @property
    def global_module(self) -> GPTConfig:
        """The blocks that see one step a patch."""
        return GPTConfig(self.vocab_size, self.context // self.patch, self.width, self.layers, self.heads)

    @property
    def local_module(self) -> GPTConfig:
        """The blocks that see the bytes of one patch."""
        return GPTConfig(self.vocab_size, self.patch, self.local_width, self.local_layers, self.local_heads,
                         ffn=self.local_ffn)


class Stack(nn.Module):
    """The blocks and the last norm of a decoder, without embedding and head; `reach`: places that a layer sees."""

    def __init__(self, config: GPTConfig, reach: int | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, layer, no_gate) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        cos_TK, sin_TK = rope_tables(config.context, config.head_size, config.rope_base)
        self.register_buffer("cos_TK", cos_TK, persistent=False)
        self.register_buffer("sin_TK", sin_TK, persistent=False)
        near_1TT = torch.ones(1, config.context, config.context, dtype=torch.bool).tril()
        near_1TT = None if reach is None or reach >= config.context else near_1TT.triu(1 - reach)
        self.register_buffer("near_1TT", near_1TT, persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        T = x_BTD.shape[1]
        near_1TT = None if self.near_1TT is None else self.near_1TT[:, :T, :T]
        for block in self.blocks:
            x_BTD = block(x_BTD, (self.cos_TK[:T], self.sin_TK[:T]), sdpa_attention, near_1TT, None)
        return self.norm(x_BTD)


class ByteLatent(nn.Module):
    """`model(bytes_BS)` gives logits_BSV: those at place t predict byte t itself, from the bytes before it.

    The initial weights depend on `seed` and the shape alone. Raises LabError for a text that is not whole patches.
    """

    def __init__(self, config: ByteLatentConfig, *, seed: int = 0):
        super().__init__()
        K, D, T = config.local_width, config.width, config.patch
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, K)
        self.read, self.write = nn.Linear(T * K, D, bias=False), nn.Linear(D, T * K, bias=False)
        self.start_D, self.begin_K = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(K))
        self.latent, self.local = Stack(config.global_module), Stack(config.local_module, config.local_reach)
        self.head = nn.Linear(K, config.vocab_size, bias=False)
        self.initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Bytes and start vectors: N(0, 1). Head: N(0, 0.02^2). Other matrices: N(0, 1/fan_in), those that end a
        branch smaller by sqrt(2L), as in labkit.models.gpt."""
        for vectors in (self.embedding.weight, self.start_D, self.begin_K):
            vectors.normal_(generator=generator)
        self.head.weight.normal_(0, 0.02, generator=generator)
        for name, matrix in self.named_parameters():
            layers = len((self.latent if name.startswith("latent") else self.local).blocks)
            if name.endswith(("read.weight", "write.weight", ".qkv.weight", ".gate_up.weight")):
                matrix.normal_(0, matrix.shape[1] ** -0.5, generator=generator)
            elif name.endswith((".out.weight", ".down.weight")):
                matrix.normal_(0, (2 * layers * matrix.shape[1]) ** -0.5, generator=generator)

    def forward(self, bytes_BS: Tensor) -> Tensor:
        return self.from_embedded(self.embedding(bytes_BS))

    def from_embedded(self, e_BSK: Tensor) -> Tensor:
        """Logits from embedded bytes, where a gradient can show who sees whom."""
        B, S, T = *e_BSK.shape[:2], self.config.patch
        if S % T or S > self.config.context:
            raise LabError(f"{S} bytes are not whole patches of {T} within {self.config.context}.",
                           "Cut the text to a multiple of the patch, no longer than the context.")
        if not B * S:
            return e_BSK.new_zeros(B, S, self.config.vocab_size)
        e_BPTK = e_BSK.unflatten(1, (-1, T))
        y_BPD = self.read(e_BPTK[:, :-1].flatten(2))  # the last patch informs nothing
        latent_BPD = self.latent(torch.cat((self.start_D.expand(B, 1, -1), y_BPD), 1))
        from_latent_NTK = self.write(latent_BPD).view(-1, T, self.config.local_width)
        before_NTK = torch.cat((self.begin_K.expand(len(from_latent_NTK), 1, -1), e_BPTK.flatten(0, 1)[:, :-1]), 1)
        return self.head(self.local(from_latent_NTK + before_NTK)).view(B, S, -1)

    def latent_parameters(self) -> int:
        """N of the scaling laws: the global module's blocks, without reading, writing, embedding and local module."""
        return sum(parameter.numel() for parameter in self.latent.parameters())

    def count_parameters(self) -> int:
        """All trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())
