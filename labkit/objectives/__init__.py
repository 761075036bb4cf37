"""Pure functions from tensors to a loss.

language_model   next_token_loss, and its mask for supervised fine-tuning
bags             losses on bags of tokens: bag_cross_entropy and the alternatives its authors tried
policy_gradient  policy_loss (GRPO, Dr. GRPO, DAPO, GMPO, GSPO, HölderPO), group_advantage, reference_kl
distillation     distill_loss: divergence from a teacher, over all tokens, a menu of k, or the sampled one
menus            whose k tokens; TeacherList: a teacher whose logits nobody sees
future           future_cost: what a token does to the costs of later ones
preference       dpo_loss, length-normalised or summed; hint_delta: how far a hint moves a model
proposer_rewards what self-play pays a proposer; duplicates: the share of near duplicates by BLEU
presets          what published trainers compute, as settings of distill_loss
"""

from labkit.objectives.bags import (
    bag_any_cross_entropy,
    bag_binary_cross_entropy,
    bag_cross_entropy,
    bag_margin_loss,
    split_into_bags,
)
from labkit.objectives.distillation import distill_loss
from labkit.objectives.future import future_cost
from labkit.objectives.language_model import next_token_loss
from labkit.objectives.menus import TeacherList, top_list
from labkit.objectives.policy_gradient import PUBLISHED_CLIPS, group_advantage, policy_loss, reference_kl
from labkit.objectives.preference import dpo_loss, hint_delta
from labkit.objectives.presets import PRESETS

__all__ = ["PRESETS", "PUBLISHED_CLIPS", "TeacherList", "bag_any_cross_entropy", "bag_binary_cross_entropy",
           "bag_cross_entropy", "bag_margin_loss", "distill_loss", "dpo_loss", "future_cost", "group_advantage",
           "hint_delta", "next_token_loss", "policy_loss", "reference_kl", "split_into_bags", "top_list"]
