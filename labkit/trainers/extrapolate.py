"""Extrapolating a path through weight space: a "future" checkpoint from early ones, without training (RELEX).

Every tensor by itself, with displacements m_t = vec(W_t - W_0), t = 1..N, and G = M M^T (labkit.measure.trajectory):

    v_k = M^T u_k / sigma_k       the first `rank` directions; those with sigma_k below 1e-6 sigma_1 are dropped
    c_tk = m_t . v_k              fitted by least squares against the step t: c ~ a t + b
    W_T^ = W_0 + sum_k (a_k T + b_k) v_k

A least-squares prediction is linear in what it was fitted to, c_k(T)^ = sum_t w_t c_tk with weights w that depend on N
and T alone. And c_k = sigma_k u_k, so sigma_k cancels, and no v is ever made:

    W_T^ = W_0 + sum_t alpha_t (W_t - W_0),      alpha = U_r U_r^T w        a mixture of saved checkpoints

Full rank has alpha = w: every weight extrapolated by its own line. The secant has alpha_N = T / N and 0 else.

G is summed in float64; the official code sums in fp32. The first directions agree to fp32's rounding, so nothing is
lost, and the rule for what to drop starts to work: where there is no second direction, rounding leaves a sigma near
2e-4 sigma_1 in fp32, far above the rule's 1e-6, and near 4e-8 sigma_1 in float64. Like the official code, a rank above
N counts as N, and nothing is centred. Unlike it, target steps are never doubled (it does so for one base model).
Source: arXiv 2605.21468; github weizhepei/RELEX, scripts/svd_extrapolation.py and precompute_deltas.py.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.measure.trajectory import displacement_gram, eigenpairs, kept

State = Mapping[str, Tensor]
NUMBERS = 2**24  # displacements held at once: 128 MB in float64


def extrapolate_rank1(base: State, checkpoints: Sequence[State], target_step: float, *, rank: int = 1, degree: int = 1,
                      window: int | None = None, intercept: bool = True) -> dict[str, Tensor]:
    """The weights RELEX predicts for step T = `target_step`, from the base and the checkpoints of steps 1..N.

    Args:
        base: W_0, a state dict.
        checkpoints: W_1..W_N, one an optimizer step, or one every k steps: the target then counts in units of k.
        rank: directions kept of each tensor.
        degree: 1 fits a line, 2 a parabola.
        window: fit to the last `window` coordinates only; the directions always come from all.
        intercept: False forces the fit through the base, c = 0 at step 0.
    Returns:
        a state dict with the base's dtypes, computed in fp32. Tensors that are not floating keep the base's values.
    Raises:
        LabError: no checkpoint, too few for the fit, differing names or shapes, weights that are not finite.
    To try many targets, prefixes or ranks, make one Trajectory.
    """
    path = Trajectory(base, checkpoints)
    return path.extrapolate(len(path), target_step, rank=rank, degree=degree, window=window, intercept=intercept)


def reconstruct(base: State, checkpoints: Sequence[State], step: int, rank: int) -> dict[str, Tensor]:
    """Checkpoint `step` (from 1), projected on the first `rank` directions that all N checkpoints span."""
    path = Trajectory(base, checkpoints)
    return path.reconstruct(len(path), step, rank=rank)


def scale_update(base: State, checkpoint: State, factor: float) -> dict[str, Tensor]:
    """W_0 + factor (W - W_0): the two controls of every extrapolation. With the last checkpoint and factor T / N it is
    the secant; with the first and a large factor, one update scaled."""
    path = Trajectory(base, [checkpoint])
    return path.mix(dict.fromkeys(path.gram, torch.tensor([float(factor)], dtype=torch.float64)))


def prediction_weights(rows: int, target: float, *, degree: int = 1, window: int | None = None,
                       intercept: bool = True) -> Tensor:
    """w [N], float64: the least-squares prediction at step T of a series c_1..c_N is sum_t w_t c_t.

    Whether steps count from 0 or 1 does not matter to a fit with an intercept; without one, c = 0 at step 0, the base.
    Raises LabError where the rows don't determine the fit.
    """
    if degree < 1 or not 1 <= target < float("inf") or (window is not None and window < 1):
        raise LabError(f"There is no extrapolation of degree {degree} to step {target} over a window of {window}.",
                       "Use degree >= 1, a target step >= 1, and a window >= 1 or None.")
    fitted = rows if window is None else min(window, rows)
    if fitted < degree + intercept:
        raise LabError(f"{fitted} checkpoint{'s' * (fitted != 1)} can't determine a fit of degree {degree}"
                       f"{' with an intercept' * intercept}.",
                       f"Give {degree + intercept} or more; from a single one, `scale_update` makes a secant.")
    power_C = torch.arange(0 if intercept else 1, degree + 1)
    step_N = torch.arange(1, rows + 1, dtype=torch.float64)[rows - fitted :]
    design_NC = (step_N[:, None] / rows) ** power_C  # powers of at most 1, or their columns would differ by decades
    weight_N = torch.linalg.pinv(design_NC).T @ (target / rows) ** power_C.double()
    return torch.cat((weight_N.new_zeros(rows - fitted), weight_N))


class Trajectory:
    """A base and its checkpoints, with the Gram matrix of every tensor computed once.

    The Gram matrix of the first n checkpoints is a corner of the whole one, so a sweep over prefixes, targets and ranks
    costs one small eigendecomposition a prefix, and one reading of the checkpoints for each state dict it asks for.

    Args:
        base, checkpoints: state dicts, kept as they are (also bf16, also on another device than the base, whose device
            does the work). A few columns at a time are copied.
        precast: round both weights to this dtype and subtract in it. torch.float16 is what the official code does; None
            subtracts in fp32.
    """

    def __init__(self, base: State, checkpoints: Sequence[State], *, precast: torch.dtype | None = None):
        self.base, self.checkpoints, self.precast = base, list(checkpoints), precast
        self._check()
        self.first = self._first_names()
        self.gram = {name: self._gram(name) for name in dict.fromkeys(self.first.values())}
        self._pairs: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.checkpoints)

    def grams(self, prefix: int) -> dict[str, Tensor]:
        """Gram matrices [n, n] of the first n = `prefix` checkpoints, by tensor: what `over_tensors` takes."""
        self._check_prefix(prefix)
        return {name: gram_NN[:prefix, :prefix] for name, gram_NN in self.gram.items()}

    def spectrum(self, prefix: int) -> dict[str, Tensor]:
        """sigma_k^2 of each tensor over the first `prefix` checkpoints, largest first."""
        return {name: value_N for name, (value_N, _) in self._eigenpairs(prefix).items()}

    def coefficients(self, prefix: int, rank: int = 1) -> dict[str, Tensor]:
        """Coordinates c_tk [n, rank] of each tensor, signed so that each sums to 0 or more; 0 where nothing is left."""
        coordinates = {}
        for name, (value_N, vector_NN) in self._eigenpairs(prefix).items():
            count = kept(value_N, rank)
            c_NR = vector_NN.new_zeros(prefix, min(rank, prefix))
            c_NR[:, :count] = vector_NN[:, :count] * value_N[:count].sqrt()
            coordinates[name] = torch.where(c_NR.sum(0) < 0, -c_NR, c_NR)
        return coordinates

    def weights(self, prefix: int, target: float, *, rank: int = 1, **fit) -> dict[str, Tensor]:
        """alpha [n] of each tensor: how much of each displacement goes into the prediction. `fit` as prediction_weights
        takes it."""
        self._check_prefix(prefix)
        return self._project(prefix, prediction_weights(prefix, target, **fit), rank)

    def extrapolate(self, prefix: int, target: float, *, rank: int = 1, **fit) -> dict[str, Tensor]:
        """The state predicted for step `target` from the first `prefix` checkpoints; see extrapolate_rank1."""
        return self.mix(self.weights(prefix, target, rank=rank, **fit))

    def reconstruct(self, prefix: int, step: int, *, rank: int = 1) -> dict[str, Tensor]:
        """Checkpoint `step` (from 1) on the first `rank` directions of the first `prefix` checkpoints."""
        self._check_prefix(prefix)
        if not 1 <= step <= prefix:
            raise LabError(f"Step {step} is not among the {prefix} checkpoints.", f"Use 1 to {prefix}.")
        return self.mix(self._project(prefix, torch.eye(prefix, dtype=torch.float64)[step - 1], rank))

    @torch.no_grad()
    def mix(self, alpha: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W_0 + sum_t alpha_t (W_t - W_0), alpha [n] by tensor for the first n checkpoints; summed in fp32."""
        made = {}
        for name, weight_N in alpha.items():
            base = self.base[name]
            parts = [weight_N.to(rows_NC) @ rows_NC for rows_NC in self._rows(name, len(weight_N))]
            update = torch.cat(parts) if parts else base.new_zeros(0)
            made[name] = (base.to(update.dtype) + update.view(base.shape)).to(base.dtype)
        return {name: made[self.first[name]] if name in self.first else weight for name, weight in self.base.items()}

    def _eigenpairs(self, prefix: int) -> dict[str, tuple[Tensor, Tensor]]:
        for name, gram_NN in self.grams(prefix).items():
            if (name, prefix) not in self._pairs:
                self._pairs[name, prefix] = eigenpairs(gram_NN)
        return {name: self._pairs[name, prefix] for name in self.gram}

    def _project(self, prefix: int, weight_N: Tensor, rank: int) -> dict[str, Tensor]:
        """U_r U_r^T w of each tensor."""
        alpha = {}
        for name, (value_N, vector_NN) in self._eigenpairs(prefix).items():
            u_NR = vector_NN[:, : kept(value_N, rank)]
            alpha[name] = u_NR @ (u_NR.T @ weight_N)
        return alpha

    def _rows(self, name: str, count: int):
        """Displacements of the first `count` checkpoints, some columns at a time: [count, C]."""
        base = self.base[name].detach()
        compute = torch.float64 if base.dtype == torch.float64 else torch.float32
        columns = max(1, NUMBERS // count)

        def read(weight: Tensor, start: int) -> Tensor:
            part_C = weight.detach().flatten()[start : start + columns].to(base.device)
            return part_C.to(compute if self.precast is None else self.precast)

        for start in range(0, base.numel(), columns):
            origin_C = read(base, start)
            yield torch.stack([read(state[name], start) - origin_C for state in self.checkpoints[:count]]).to(compute)

    def _gram(self, name: str) -> Tensor:
        gram_NN = torch.zeros(len(self), len(self), dtype=torch.float64)
        try:
            for rows_NC in self._rows(name, len(self)):
                gram_NN = gram_NN.to(rows_NC.device) + displacement_gram(rows_NC)
        except LabError:
            where = "" if self.precast is None else f" in {self.precast}"
            raise LabError(f"The weights of {name} are not all finite{where}.",
                           "Leave out the checkpoints from where the run diverged.") from None
        return gram_NN.cpu()

    def _check_prefix(self, prefix: int) -> None:
        if not 1 <= prefix <= len(self):
            raise LabError(f"A prefix of {prefix} does not fit {len(self)} checkpoints.", f"Use 1 to {len(self)}.")

    def _check(self) -> None:
        if not self.checkpoints:
            raise LabError("There is no checkpoint to extrapolate from.", "Keep at least one after the base.")
        for number, state in enumerate(self.checkpoints, 1):
            if state.keys() != self.base.keys():
                odd = sorted(state.keys() ^ self.base.keys())
                raise LabError(f"Checkpoint {number} and the base have different tensors: {', '.join(odd[:3])}.",
                               "Take all of them from one model.")
            for name, weight in self.base.items():
                if state[name].shape != weight.shape:
                    raise LabError(f"{name} is {list(state[name].shape)} in checkpoint {number} and "
                                   f"{list(weight.shape)} in the base.", "Take all of them from one model.")

    def _first_names(self) -> dict[str, str]:
        """Name of a floating tensor -> the first name of the same memory: tied matrices count once."""
        seen: dict[tuple, str] = {}
        names = {}
        for name, weight in self.base.items():
            if weight.is_floating_point():
                same = tuple((state[name].data_ptr(), state[name].stride()) for state in (self.base, *self.checkpoints))
                names[name] = seen.setdefault((weight.shape, same), name) if weight.numel() else name
        return names
