"""What is measured, and how well: intervals over seeds, paths of weights, gradients, distances, FLOPs, hardware.

Names are looked up on first use, so that reading the ledger doesn't wait for torch.
"""

import importlib

_FILES = {  # file of this room -> its public names
    "intervals": ["interval"],
    "holder_mean": ["power_mean"],
    "trajectory": ["explained_variance", "linearity", "over_tensors", "random_walk_null"],
    "gradient_variance": ["fisher_diagonal", "holder_coefficients", "sequence_variance", "token_gram"],
    "distance": ["bootstrap_r2", "forward_kl", "quadratic_fit", "reverse_kl", "sequence_kl", "spearman"],
    "menu": ["menu_overlap", "nucleus_overlap"],
    "repetition": ["advantage_by_repetition", "looped_weight_share", "periodic_tail", "repetition_ratio",
                   "repetition_share", "truncation_share"],
    "coherence": ["coherence_by", "gradient_coherence", "head_coherence", "norm_split", "permuted_teacher",
                  "position_gradients", "sketched_gradients"],
    "commands": ["command_kind", "command_match", "mark_commands"],
    "continuation": ["continuation_advantage", "continue_prefixes"],
    "diagnosis": ["diagnose_distillation"],
    "scaling_laws": ["bootstrap_law_two", "fit_law_one", "fit_law_two", "parabola_vertex"],
}
_HOME = {name: file for file, names in _FILES.items() for name in names}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
