"""The settings of on-policy distillation: what is compared, on which answers, and what steadies it."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from labkit.errors import LabError
from labkit.trainers.loop import TrainSettings


@dataclass(frozen=True)
class DistillSettings:
    """One run of on-policy distillation: every step draws `prompts` x `samples` answers and learns from them once."""

    steps: int
    learning_rate: float
    prompts: int = 64
    samples: int = 2
    # what is compared at each position: see distill_loss
    support: str = "full"
    k: int | None = None
    menu: str = "teacher"
    mode: str | None = None
    baseline: bool = False
    direction: str = "reverse"
    beta: float = 0.5
    renormalize: bool = True
    gamma: float = 0.0  # how much of the costs of later positions a token answers for: see future_cost
    # which answers, and which of their positions
    temperature: float = 1.0  # of drawing; student and teacher are compared at 1
    top_p: float | None = None
    stop_also: tuple[int, ...] = ()  # an answer ends with these as well as with END
    on_policy: float = 1.0  # GKD's lambda: the share of steps whose answers are the student's, not written solutions
    drop_truncated: bool = False  # answers that did not end don't count
    ignore: tuple[int, ...] = ()  # positions where the answer has one of these don't count
    id_map: tuple[tuple[int, int], ...] = ()  # (student's id, teacher's id) of tokens that the two number differently
    weighting: str = "token"  # every token alike, or "sequence": every answer alike
    # the stabilisers
    gold: float = 0.0
    gold_dialect: str | None = None  # of written solutions; the world's first dialect without it
    kl_start: float = 0.0
    seed: int = 0
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: int = 0
    schedule: str = "constant"
    precision: str = "fp32"
    checkpoint_every: int = 0

    def __post_init__(self):
        if min(self.prompts, self.samples) < 1:
            raise LabError(f"{self.prompts} prompts x {self.samples} samples: this is no plan.",
                           "Use whole numbers of 1 or more.")
        if self.support == "sampled" and (self.temperature != 1 or self.on_policy != 1):
            raise LabError(f"Tokens drawn at temperature {self.temperature}, in a share of {self.on_policy} by the "
                           "student, are no sample of it.",
                           'Use temperature 1 and on_policy 1 with support="sampled".')
        if self.gamma and self.on_policy != 1:
            raise LabError("What a token does to later ones is only known for tokens that the student drew.",
                           "Use on_policy 1 with gamma, or gamma 0.")
        if self.weighting not in ("token", "sequence") or not 0 <= self.on_policy <= 1:
            raise LabError(f"weighting={self.weighting!r} and on_policy={self.on_policy} are no plan.",
                           'Use "token" or "sequence", and a share from 0 to 1.')
        if min(self.gold, self.kl_start) < 0:
            raise LabError(f"gold={self.gold} and kl_start={self.kl_start} cannot both be weights.", "Use 0 or more.")
        self.training()  # refuses what the loop would refuse

    def training(self) -> TrainSettings:
        """The settings of the loop underneath."""
        names = {field.name for field in fields(TrainSettings)} & set(vars(self))
        return TrainSettings(**self.only(names), batch=self.prompts * self.samples)

    def only(self, names: Iterable[str]) -> dict[str, object]:
        """Some of the settings, as keyword arguments."""
        return {name: getattr(self, name) for name in names}
