"""The one alphabet of all worlds: a token is a symbol, and the token of digit d is d.

Worlds that share an alphabet can share a model, which is how a lab asks what a new task does to an old one. Every
answer ends with END; prompts have no special tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.errors import LabError

END = 10
SYMBOLS = "0123456789$+-*=()>,:|?abcdefghijklmnopqrstuvwxyz"  # "$" stands for END
VOCAB = len(SYMBOLS)
_ID = {symbol: token for token, symbol in enumerate(SYMBOLS)}


def encode(text: str) -> list[int]:
    """Token ids of a text. Raises LabError for a symbol that no world uses."""
    unknown = sorted(set(text) - set(SYMBOLS))
    if unknown:
        raise LabError(f"No world writes {' '.join(unknown)!r}.", f"The symbols are: {SYMBOLS}")
    return [_ID[symbol] for symbol in text]


def token(symbol: str) -> int:
    """The id of one symbol."""
    return encode(symbol)[0]


def decode(tokens: Sequence[int] | Tensor) -> str:
    """The text of a row of token ids."""
    return "".join(SYMBOLS[i] for i in (tokens.tolist() if isinstance(tokens, Tensor) else tokens))


def digits(number_N: Tensor, places: int) -> Tensor:
    """The last `places` decimal digits of each number, the highest first: [N, places]."""
    power_P = 10 ** torch.arange(places - 1, -1, -1, device=number_N.device)
    return number_N[:, None] // power_P % 10


def value(digit_NP: Tensor) -> Tensor:
    """The numbers that rows of digits spell, the highest first: [N]. The inverse of `digits`."""
    power_P = 10 ** torch.arange(digit_NP.shape[1] - 1, -1, -1, device=digit_NP.device)
    return (digit_NP * power_P).sum(1)
