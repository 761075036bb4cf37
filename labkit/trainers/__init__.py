"""One loop, and what is special about each way of training.

schedule     learning rates as pure functions of the step
loop         train: the loop that all trainers share; History, its plain table
checkpoint   weights and optimizer in one safetensors file, whole or not at all
pretrain     next-token training on windows of a text; held-out loss
superposition  pre-training on bags of tokens (notebook 02)
sft          supervised fine-tuning on prompts and answers
sweep        many independent runs on the cores there are
"""

from labkit.trainers.loop import History, TrainSettings, train
from labkit.trainers.pretrain import held_out_loss, pretrain
from labkit.trainers.sft import Example, sft
from labkit.trainers.superposition import Superposition, pretrain_superposed
from labkit.trainers.sweep import run_all

__all__ = ["Example", "History", "Superposition", "TrainSettings", "held_out_loss", "pretrain", "pretrain_superposed",
           "run_all", "sft", "train"]
