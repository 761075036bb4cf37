"""What published code computes when it distils, as settings of distill_loss: the same words, five different losses.

    distill_loss(student_logits_NV, teacher_logits_NV, **PRESETS["thunlp-opd"].loss)
    DistillSettings(steps, rate, **PRESETS["lsm"].loss, **PRESETS["lsm"].rollout)

Each was re-derived in float64 from its source, and the tests hold our losses against that. What a preset leaves out is
what those trainers add around the loss: task rewards, clipping of ratios that on-policy are 1, LoRA.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """Keyword arguments of distill_loss, those of drawing and weighting in DistillSettings, and where they are from."""

    loss: dict[str, object]
    source: str
    rollout: dict[str, object] = field(default_factory=dict)


PRESETS = {
    # JSD_beta over all V; a coin with lambda 0.5 decides for each step whether the student or the data set wrote it
    "trl-gkd": Preset({"support": "full", "direction": "jsd", "beta": 0.5},
                      "TRL GKDTrainer (July 2026), generalized_jsd_loss; arXiv 2306.13649",
                      {"on_policy": 0.5, "temperature": 0.9}),
    # reward -w (log p_s - log p_t) for each of the student's 16, w their softmax, everything but log p_s detached
    "thunlp-opd": Preset({"support": "topk", "k": 16, "menu": "student", "mode": "stop_gradient"},
                         "thunlp/OPD at 0a44395, compute_distillation_reward with student_p; arXiv 2604.13016"),
    "thunlp-opd-sampled": Preset({"support": "sampled"}, "thunlp/OPD at 0a44395, LOG_PROB_TOP_K=0"),
    # sum over the teacher's 32 of p (log p - log q), not renormalised; verl also clamps each row at 0
    "verl-forward-topk": Preset({"support": "topk", "k": 32, "direction": "forward", "mode": "none"},
                                "verl, trainer/distillation (August 2026), forward_kl_topk"),
    "verl-k1": Preset({"support": "sampled"}, "verl, trainer/distillation (August 2026), k1 as a policy gradient"),
    # advantage -(log q_y - log p_y), importance-weighted; kl_discount_factor 0
    "tinker-cookbook": Preset({"support": "sampled"}, "tinker-cookbook, distillation/train_on_policy.py",
                              {"gamma": 0.0}),
    "lsm": Preset({"support": "topk", "k": 32, "menu": "teacher", "mode": "renorm"},
                  "local support matching, arXiv 2603.25562", {"top_p": 0.9}),
    "vopd": Preset({"support": "sampled", "baseline": True}, "vOPD, arXiv 2605.07865"),
}
