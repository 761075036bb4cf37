"""Pure functions from tensors to a loss.

language_model   next_token_loss, and its mask for supervised fine-tuning
bags             losses on bags of tokens: bag_cross_entropy and the alternatives its authors tried
policy_gradient  policy_loss (GRPO, Dr. GRPO, DAPO, GMPO, GSPO, HölderPO), group_advantage, reference_kl
distillation     distill_loss: divergence from a teacher, over all tokens, its top k, or the sampled one
"""

from labkit.objectives.bags import (
    bag_any_cross_entropy,
    bag_binary_cross_entropy,
    bag_cross_entropy,
    bag_margin_loss,
    split_into_bags,
)
from labkit.objectives.distillation import distill_loss
from labkit.objectives.language_model import next_token_loss
from labkit.objectives.policy_gradient import PUBLISHED_CLIPS, group_advantage, policy_loss, reference_kl

__all__ = ["PUBLISHED_CLIPS", "bag_any_cross_entropy", "bag_binary_cross_entropy", "bag_cross_entropy",
           "bag_margin_loss", "distill_loss", "group_advantage", "next_token_loss", "policy_loss", "reference_kl",
           "split_into_bags"]
