"""One loop, and what is special about each way of training.

schedule       learning rates, and other numbers that move with time, as pure functions of the step
loop           train: the loop that all trainers share; History, its plain tables
checkpoint     weights and optimizer in one safetensors file, whole or not at all
keep           Keep: every k-th checkpoint of a run, in memory or on disk
pretrain       next-token training on windows of a text; held-out loss
superposition  pre-training on bags of tokens (notebook 02)
stack          many small models trained as one; architecture_warmup: the arms of notebook 05 on it
late_weights   train_late: weights that lack the last updates, as an asynchronous pipeline reads them (notebook 06)
sft            supervised fine-tuning on prompts and answers
chat_tuning    fine-tuning on whole conversations; trace_models: the shipped base and student of notebook 14
imitate        supervised training on solutions that small worlds write
rollout        answers that a policy draws, and what the verifier says; accuracy
grpo           reinforcement learning with verifiable rewards
dpo            preference pairs: one model, or many at once; self_play: proposer and rounds (notebook 15)
self_play_pool the pairs of self-play and their filters; self_play_text: the lab on a real instruct model, whose parts
               are self_play_text_model (prompts, answers, log p), _pool (pairs and arms) and _rubrics (what is asked)
distill        on-policy distillation; distill_settings, distill_losses: its settings and the loss of a rollout
extrapolate    a later checkpoint from early ones, without training (notebook 07)
bases          the shipped decoders of English; world_bases: those of the small worlds
recipes        how those are made, as data; sum_bases: the recipes of labs 09 to 12; hint_bases: of lab 15
sweep          many independent runs on the cores there are
"""

from labkit.trainers.distill import distill
from labkit.trainers.distill_settings import DistillSettings
from labkit.trainers.dpo import DPOSettings, Pairs, dpo
from labkit.trainers.extrapolate import Trajectory, extrapolate_rank1
from labkit.trainers.grpo import GRPOSettings, grpo
from labkit.trainers.imitate import Lesson, imitate
from labkit.trainers.keep import Keep
from labkit.trainers.late_weights import LateHistory, train_late
from labkit.trainers.loop import History, TrainSettings, train
from labkit.trainers.pretrain import held_out_loss, pretrain
from labkit.trainers.rollout import accuracy, roll_out, written
from labkit.trainers.sft import Example, sft
from labkit.trainers.superposition import Superposition, pretrain_superposed
from labkit.trainers.sweep import run_all
from labkit.trainers.world_bases import load_world_base

__all__ = ["DPOSettings", "DistillSettings", "Example", "GRPOSettings", "History", "Keep", "LateHistory", "Lesson",
           "Pairs", "Superposition", "TrainSettings", "Trajectory", "accuracy", "distill", "dpo", "extrapolate_rank1",
           "grpo", "held_out_loss", "imitate", "load_world_base", "pretrain", "pretrain_superposed", "roll_out",
           "run_all", "sft", "train", "train_late", "written"]
