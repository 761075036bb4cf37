"""The shape of a path through weight space: is it a line, and is it straighter than a walk of pure chance?

    m_t = vec(W_t - W_0), t = 1..N          displacements from the base, rows of M [N, D]; nothing is centred
    G   = M M^T = U diag(sigma^2) U^T       [N, N]: all that the questions below need
    EV_r = sum_{k <= r} sigma_k^2 / sum_k sigma_k^2      explained variance of the first r directions
    c_tk = m_t . v_k = sigma_k u_tk                      coordinate along direction k; its R^2 against t is "linearity"

EV and R^2 mean nothing against 0. A random walk of independent steps in many dimensions has G_ij proportional to
min(i, j): its first direction is a quarter of a sine, explains 8 / pi^2 = 0.811 of the path and fits a line with
R^2 = 0.958 (N large). "Almost rank 1, and almost linear" has to be read against these two numbers.
Sources: RELEX, arXiv 2605.21468 (EV and R^2); Antognini and Sohl-Dickstein, arXiv 1806.08805 (random walks; centred,
as theirs are, the first direction explains 6 / pi^2).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.errors import LabError

COLUMNS = 2**20  # columns turned to float64 at once
SMALLEST = 1e-6  # directions with sigma_k below this share of sigma_1 are noise (RELEX's code)
WALK_SHARE = 8 / math.pi**2  # EV_1 of a random walk, N and D large
WALK_LINEARITY = 12 * (4 / math.pi**2 - 1 / math.pi) ** 2 / (0.5 - 4 / math.pi**2)  # R^2 of sin(pi t / 2) on [0, 1]


class Geometry(NamedTuple):
    """Explained variance of the first directions, and R^2 of a line through the coordinate along one of them."""

    explained_variance: float
    linearity: float


def explained_variance(displacement_ND: Tensor) -> Tensor:
    """EV_N: the share of all movement within the first 1, 2, ... N directions, float64.

    Weights that never move have no directions: all shares are 0 then, as in RELEX's code.
    Raises LabError for an input that is not [N, D] with N >= 1, or not finite.
    """
    return shares(displacement_gram(displacement_ND))


def linearity(displacement_ND: Tensor, *, rank: int = 1) -> float:
    """R^2 of a straight line, with intercept, through coordinate number `rank` (from 1) against the row index.

    0 where that coordinate doesn't vary. Raises LabError for fewer than two rows, and as `explained_variance`.
    """
    return gram_linearity(displacement_gram(displacement_ND), rank=rank)


def displacement_gram(displacement_ND: Tensor) -> Tensor:
    """G = M M^T in float64, [N, N]; a few columns at a time, so no second copy of M is made."""
    displacement_ND = torch.as_tensor(displacement_ND)
    if displacement_ND.ndim != 2 or not len(displacement_ND):
        raise LabError(f"Displacements of shape {list(displacement_ND.shape)} are not rows of a path.",
                       "Give [N, D]: one flattened displacement W_t - W_0 a row, at least one row.")
    parts = (part.double() for part in displacement_ND.split(COLUMNS, dim=1))
    gram_NN = sum(part_NC @ part_NC.T for part_NC in parts)
    if not gram_NN.isfinite().all():
        raise LabError("The displacements are not all finite.", "Find the checkpoint that diverged, and leave it out.")
    return gram_NN


def flat_displacements(base: Mapping[str, Tensor], checkpoints: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """M [N, D]: whole state dicts as rows, minus the base. For small models; Trajectory never builds it."""
    def flat(state):
        return torch.cat([state[name].detach().flatten() for name in base])
    return torch.stack([flat(state) for state in checkpoints]) - flat(base)


def eigenpairs(gram_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of G, largest first and never below 0, and their eigenvectors as columns; on the CPU in float64."""
    value_N, vector_NN = torch.linalg.eigh(gram_NN.detach().cpu().double())
    return value_N.flip(0).clamp(min=0), vector_NN.flip(1)


def kept(value_N: Tensor, rank: int) -> int:
    """How many of the first `rank` directions are more than noise: sigma_k > 1e-6 sigma_1. At most N."""
    if rank < 1:
        raise LabError(f"There is no rank {rank}.", "Ask for 1 or more.")
    return int((value_N[:rank] > SMALLEST**2 * value_N[0]).sum())


def shares(gram_NN: Tensor) -> Tensor:
    """EV_N of a Gram matrix."""
    value_N, _ = eigenpairs(gram_NN)
    total = value_N.sum()
    return value_N.cumsum(0) / total if total > 0 else torch.zeros_like(value_N)


def gram_linearity(gram_NN: Tensor, *, rank: int = 1) -> float:
    """R^2 of coordinate `rank` against the row index, from a Gram matrix. The scale sigma does not matter for it."""
    if len(gram_NN) < 2:
        raise LabError("One checkpoint lies on many lines, so there is no R^2.", "Keep two checkpoints or more.")
    value_N, vector_NN = eigenpairs(gram_NN)
    if kept(value_N, rank) < rank:
        return 0.0
    c_N = vector_NN[:, rank - 1] - vector_NN[:, rank - 1].mean()
    t_N = torch.arange(len(c_N), dtype=torch.float64) - (len(c_N) - 1) / 2
    spread = c_N.square().sum()
    if spread < 1e-20:  # u has length 1, so a smaller spread is the rounding of a constant
        return 0.0
    return float((c_N @ t_N) ** 2 / (spread * t_N.square().sum()))


def geometry(gram_NN: Tensor, *, rank: int = 1) -> Geometry:
    """EV of the first `rank` directions, and R^2 along direction number `rank`. A rank above N counts as N for EV."""
    linear = gram_linearity(gram_NN, rank=rank)
    return Geometry(float(shares(gram_NN)[min(rank, len(gram_NN)) - 1]), linear)


def over_tensors(gram_by_name: Mapping[str, Tensor], *, rank: int = 1) -> dict[str, Geometry]:
    """Three answers to "how straight is this model's path?", which can be far apart:

    whole     all weights as one vector; its G is the sum of the tensors' G
    weighted  tensors apart, averaged by how far each moved (the trace of its G)
    mean      tensors apart, all counted alike, as RELEX reports it: a norm's 48 weights like a matrix of 12,000
    A tensor that never moved counts in the mean with 0, as there. Raises LabError without tensors.
    """
    if not gram_by_name:
        raise LabError("There is no tensor to measure.", "Give at least one Gram matrix by name.")
    each_S2 = torch.tensor([geometry(gram_NN, rank=rank) for gram_NN in gram_by_name.values()], dtype=torch.float64)
    moved_S = torch.stack([gram_NN.trace().cpu().double() for gram_NN in gram_by_name.values()])
    weighted_2 = moved_S @ each_S2 / moved_S.sum() if moved_S.sum() > 0 else torch.zeros(2)
    return {"whole": geometry(sum(gram_by_name.values()), rank=rank), "weighted": Geometry(*weighted_2.tolist()),
            "mean": Geometry(*each_S2.mean(0).tolist())}


def random_walk_null(steps: int, *, dimension: int | None = None, walks: int = 20, seed: int = 0) -> Geometry:
    """EV_1 and R^2 of a walk of `steps` independent Gaussian steps: what chance alone shows.

    dimension: weights that move. None takes the limit of many, where G_ij = min(i, j) exactly and nothing is random;
        a number simulates, and gives the mean over `walks` walks.
    Raises LabError for fewer than two steps.
    """
    if steps < 2 or walks < 1 or (dimension is not None and dimension < 1):
        raise LabError(f"There is no null for {steps} steps, dimension {dimension} and {walks} walks.",
                       "Use two steps or more, and whole numbers of 1 or more.")
    if dimension is None:
        step_N = torch.arange(1.0, steps + 1, dtype=torch.float64)
        return geometry(torch.minimum(step_N[:, None], step_N))
    generator = torch.Generator().manual_seed(seed)
    paths = (torch.randn(steps, dimension, generator=generator).cumsum(0) for _ in range(walks))
    each_W2 = torch.tensor([geometry(displacement_gram(path_ND)) for path_ND in paths], dtype=torch.float64)
    return Geometry(*each_W2.mean(0).tolist())
