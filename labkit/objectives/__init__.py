"""Pure functions from tensors to a loss.

language_model  next_token_loss, and its mask for supervised fine-tuning
bags            losses on bags of tokens: bag_cross_entropy and the alternatives its authors tried
"""

from labkit.objectives.bags import (
    bag_any_cross_entropy,
    bag_binary_cross_entropy,
    bag_cross_entropy,
    bag_margin_loss,
    split_into_bags,
)
from labkit.objectives.language_model import next_token_loss

__all__ = ["bag_any_cross_entropy", "bag_binary_cross_entropy", "bag_cross_entropy", "bag_margin_loss",
           "next_token_loss", "split_into_bags"]
