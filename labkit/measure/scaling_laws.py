"""Scaling laws with the compression rate as an axis: how long should a token be, and how much text should a model read?

C training FLOPs, T bytes per token, N parameters, B bytes of text, D = B / T tokens; C = 6 N D = 6 N B / T.

    law I    B*(C, T) = B0 C^alpha T^beta      so  N* = C T / (6 B*),  B*/N* = 6 B0^2 C^(2 alpha - 1) T^(2 beta - 1)
    law II   L(C, T)  = L0 C^gamma + F ln^2(C^delta T / T0) + E      so  T*(C) = T0 / C^delta

In law I, beta = 1/2 makes bytes per parameter free of T, beta = 1 tokens per parameter. In law II the best T moves
with compute where delta is not 0. Our own variant lets the curvature bend too, F C^phi for F. Source: Compute Optimal
Tokenization, arXiv 2605.01188, sections 3.2 to 3.4, appendix B. The paper fits by L-BFGS from a grid of starts; law II
is solved here by Levenberg and Marquardt's method on centred logarithms, where its numbers hardly hinder each other,
many resampled tables at once. Needs numpy only.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from labkit.errors import LabError

OPTIMA = {"moving": (0, 1, 2, 3, 4, 5), "fixed": (0, 1, 2, 4, 5), "none": (0, 1, 5),
          "bent": (0, 1, 2, 3, 4, 5, 6)}  # which of theta is fitted
RESAMPLES = ("points", "budgets", "residuals")
GAMMA_BOUNDS = (-2.0, -1e-4)  # the paper's start at -2 and end at 0, where L0 C^gamma and E become one
STARTS = np.linspace(-0.05, -1.0, 13)  # of gamma; the rest of a start is linear least squares


# law I -------------------------------------------------------------------------------------------------------------

class Vertex(NamedTuple):
    """The lowest point of a parabola through a sweep: where, how low, how curved, and whether the sweep brackets it."""

    x: float
    y: float
    curvature: float
    inside: bool


def parabola_vertex(x_M, y_M) -> Vertex:
    """Least-squares parabola y = y* + curvature (x - x*)^2; `inside` if it opens upward between the outer points.

    Raises LabError with fewer than three different x.
    """
    x_M, y_M = np.asarray(x_M, float), np.asarray(y_M, float)
    if x_M.shape != y_M.shape or len(np.unique(x_M)) < 3:
        raise LabError(f"A parabola needs three places, not x of shape {x_M.shape} with {len(np.unique(x_M))} of them.",
                       "Measure the loss at three sizes or more.")
    middle = x_M.mean()
    a, b, c = np.polyfit(x_M - middle, y_M, 2)
    place = middle - b / (2 * a) if a else np.nan
    return Vertex(float(place), float(c - b * b / (4 * a)) if a else np.nan, float(a),
                  bool(a > 0 and x_M.min() < place < x_M.max()))


@dataclass(frozen=True)
class LawOne:
    """Text and size that are best for C training FLOPs at T bytes per token."""

    B0: float
    alpha: float
    beta: float

    def bytes(self, compute, bytes_per_token):
        """B* = B0 C^alpha T^beta."""
        return self.B0 * np.power(compute, self.alpha) * np.power(bytes_per_token, self.beta)

    def parameters(self, compute, bytes_per_token):
        """N* = C T / (6 B*)."""
        return np.multiply(compute, bytes_per_token) / (6 * self.bytes(compute, bytes_per_token))

    def ratio(self, compute, bytes_per_token):
        """Bytes per parameter, B* / N*."""
        return self.bytes(compute, bytes_per_token) / self.parameters(compute, bytes_per_token)


def fit_law_one(compute, bytes_per_token, best_bytes) -> LawOne:
    """Ordinary least squares of log B* on log C and log T. Raises LabError where the two do not both vary."""
    c_M, u_M, b_M = _logarithms(compute=compute, bytes_per_token=bytes_per_token, best_bytes=best_bytes)
    design_M3 = np.stack([np.ones_like(c_M), c_M - c_M.mean(), u_M], 1)
    if np.linalg.matrix_rank(design_M3, tol=1e-9) < 3:
        raise LabError("Law I needs optima at two budgets and two compression rates at least, not all on one line.",
                       "Add a budget or a T.")
    (level, alpha, beta), *_ = np.linalg.lstsq(design_M3, b_M, rcond=None)
    return LawOne(float(np.exp(level - alpha * c_M.mean())), float(alpha), float(beta))


# law II ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class LawTwo:
    """The best loss for C training FLOPs at T bytes per token. A field is a number, or an array over resamples."""

    L0: float
    gamma: float
    F: float
    delta: float
    T0: float
    E: float
    phi: float = 0.0  # the paper's law has none

    def loss(self, compute, bytes_per_token):
        """L0 C^gamma + F C^phi ln^2(C^delta T / T0) + E, in the unit of the losses that were fitted."""
        compute, bytes_per_token = np.asarray(compute, float), np.asarray(bytes_per_token, float)
        away = self.delta * np.log(compute) + np.log(bytes_per_token) - np.log(self.T0)
        return self.L0 * compute**self.gamma + self.F * compute**self.phi * away**2 + self.E

    def optimum(self, compute):
        """T*(C) = T0 / C^delta, in bytes per token."""
        if np.all(np.equal(self.F, 0)):
            raise LabError("A law without the term in T has no best T.", 'Fit with optimum="moving" or "fixed".')
        return self.T0 / np.asarray(compute, float) ** self.delta


def fit_law_two(compute, bytes_per_token, loss, *, optimum: str = "moving") -> LawTwo:
    """Least-squares fit of law II to M measured losses, in bits per byte or any other unit.

    optimum: "moving", all six numbers; "fixed", delta = 0, one T* for all budgets; "none", F = 0, the loss does not
        depend on T, the paper's baselines (table 7); "bent", with phi as the seventh.
    Raises LabError for unequal lengths, values that are not positive, and fewer than three budgets or T.
    """
    c_M, u_M, y_M = _checked(compute, bytes_per_token, loss, optimum)
    starts = np.array([_start(c_M, u_M, y_M, gamma, optimum) for gamma in STARTS])
    many = np.ones((len(starts), 1))
    theta_R7, error_R = _solve(c_M, u_M, y_M * many, np.ones_like(y_M) * many, starts, optimum)
    return _law(theta_R7[error_R.argmin()], c_M.mean())


def bootstrap_law_two(compute, bytes_per_token, loss, *, resample: str = "points", optimum: str = "moving",
                      draws: int = 1000, seed: int = 0) -> LawTwo:
    """Law II on `draws` resampled tables: a LawTwo whose fields are arrays [draws], for quantiles of any of them.

    resample: "points" draws cells of the table; "budgets" draws whole rows of equal C, since cells of a row share what
        went wrong in it; "residuals" keeps the cells and deals out anew, with replacement, what the fit left over.
    """
    if resample not in RESAMPLES:
        raise LabError(f"There is no way to resample called {resample!r}.", f"Choose one of {', '.join(RESAMPLES)}.")
    c_M, u_M, y_M = _checked(compute, bytes_per_token, loss, optimum)
    law, rng = fit_law_two(compute, bytes_per_token, loss, optimum=optimum), np.random.default_rng(seed)
    weight_RM, y_RM = np.ones((draws, len(y_M))), np.tile(y_M, (draws, 1))
    if resample == "points":
        weight_RM = rng.multinomial(len(y_M), np.full(len(y_M), 1 / len(y_M)), size=draws).astype(float)
    elif resample == "budgets":
        budgets, row_M = np.unique(c_M, return_inverse=True)
        weight_RM = rng.multinomial(len(budgets), np.full(len(budgets), 1 / len(budgets)), size=draws)[:, row_M] * 1.0
    else:
        fitted_M = law.loss(compute, bytes_per_token)
        y_RM = fitted_M + rng.choice(y_M - fitted_M, size=(draws, len(y_M)))
    start_R7 = np.tile(_theta(law, c_M.mean()), (draws, 1))
    theta_R7, _ = _solve(c_M, u_M, y_RM, weight_RM, start_R7, optimum)
    return _law(theta_R7.T, c_M.mean())


# how law II is solved: theta = (a, gamma, f, delta, tau, E, phi) with c = ln C - mean, u = ln T, and
#     L = exp(a + gamma c) + exp(f + phi c) (u + delta c - tau)^2 + E;     tau = ln T* at the mean budget

def _law(theta, mean: float) -> LawTwo:
    """Back from centred logarithms; theta is [7] or [7, R]."""
    a, gamma, f, delta, tau, E, phi = theta
    return LawTwo(np.exp(a - gamma * mean), gamma, np.exp(f - phi * mean), delta, np.exp(tau + delta * mean), E, phi)


def _theta(law: LawTwo, mean: float) -> np.ndarray:
    return np.array([np.log(law.L0) + law.gamma * mean, law.gamma, np.log(law.F) + law.phi * mean, law.delta,
                     np.log(law.T0) - law.delta * mean, law.E, law.phi])


def _start(c_M, u_M, y_M, gamma: float, optimum: str) -> np.ndarray:
    """Linear least squares at a given gamma, with (u + delta c - tau)^2 multiplied out and its c^2 and c left free."""
    c_M = c_M - c_M.mean()
    power_M, one_M = np.exp(gamma * c_M), np.ones_like(c_M)
    if optimum == "none":
        (height, E), *_ = np.linalg.lstsq(np.stack([power_M, one_M], 1), y_M, rcond=None)
        return np.array([np.log(max(height, 1e-6)), gamma, -np.inf, 0.0, 0.0, E, 0.0])
    (height, E, square, cross, slope), *_ = np.linalg.lstsq(
        np.stack([power_M, one_M, u_M**2, u_M * c_M, u_M], 1), y_M, rcond=None)
    square = max(square, 1e-6)
    tau, delta = -slope / (2 * square), cross / (2 * square) if optimum in ("moving", "bent") else 0.0
    return np.array([np.log(max(height, 1e-6)), gamma, np.log(square), delta, tau, E - square * tau**2, 0.0])


def _model(theta_R7, c_M, u_M) -> tuple[np.ndarray, np.ndarray]:
    """Losses [R, M] and their derivatives by theta [R, M, 7]."""
    a, gamma, f, delta, tau, E, phi = (column[:, None] for column in theta_R7.T)
    with np.errstate(over="ignore"):
        power_RM, F = np.exp(a + gamma * c_M), np.exp(f + phi * c_M)
        away_RM = u_M + delta * c_M - tau
        bowl_RM, slope_RM = F * away_RM**2, 2 * F * away_RM
        parts = (power_RM, power_RM * c_M, bowl_RM, slope_RM * c_M, -slope_RM, np.ones_like(power_RM), bowl_RM * c_M)
        return power_RM + bowl_RM + E, np.stack(parts, -1)


def _solve(c_M, u_M, y_RM, weight_RM, theta_R7, optimum: str, rounds: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg and Marquardt for R weighted problems side by side; returns theta and the weighted squared errors."""
    c_M, free = c_M - c_M.mean(), list(OPTIMA[optimum])
    damping_R = np.full(len(theta_R7), 1e-2)
    fitted_RM, slope_RM7 = _model(theta_R7, c_M, u_M)
    error_R = (weight_RM * (y_RM - fitted_RM) ** 2).sum(1)
    for _ in range(rounds):
        J_RMK = slope_RM7[:, :, free]
        JW_RKM = (J_RMK * weight_RM[:, :, None]).transpose(0, 2, 1)
        normal_RKK, right_RK = JW_RKM @ J_RMK, (JW_RKM @ (y_RM - fitted_RM)[:, :, None])[:, :, 0]
        scale_RK = np.einsum("rkk->rk", normal_RKK) + 1e-12
        damped_RKK = normal_RKK + (damping_R[:, None] * scale_RK)[:, :, None] * np.eye(len(free))
        step_RK = np.linalg.solve(damped_RKK, right_RK[:, :, None])[:, :, 0]
        tried_R7 = theta_R7.copy()
        tried_R7[:, free] += np.clip(step_RK, -1.0, 1.0)
        tried_R7[:, 1] = tried_R7[:, 1].clip(*GAMMA_BOUNDS)
        tried_fit_RM, tried_slope_RM7 = _model(tried_R7, c_M, u_M)
        tried_error_R = (weight_RM * (y_RM - tried_fit_RM) ** 2).sum(1)
        better_R = tried_error_R < error_R  # not a number is not better
        gain = np.max((error_R - tried_error_R)[better_R] / error_R[better_R].clip(1e-300), initial=0.0)
        for kept, tried in ((theta_R7, tried_R7), (fitted_RM, tried_fit_RM), (slope_RM7, tried_slope_RM7),
                            (error_R, tried_error_R)):
            kept[better_R] = tried[better_R]
        damping_R = np.where(better_R, damping_R / 5, damping_R * 4).clip(1e-12, 1e12)
        if gain < 1e-12 and (better_R | (damping_R > 1e6)).all():
            break
    return theta_R7, error_R


def _logarithms(**columns) -> list[np.ndarray]:
    """Natural logarithms of columns of equal length, all values positive and finite."""
    arrays = {name: np.asarray(column, float).ravel() for name, column in columns.items()}
    if len({len(column) for column in arrays.values()}) != 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in arrays.items())
        raise LabError(f"The columns differ in length: {lengths}.", "Give one value of each for every measurement.")
    for name, column in arrays.items():
        if not (np.isfinite(column).all() and (column > 0).all()):
            raise LabError(f"{name} holds values that are not positive and finite.", "Leave those measurements out.")
    return [np.log(column) for column in arrays.values()]


def _checked(compute, bytes_per_token, loss, optimum: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if optimum not in OPTIMA:
        raise LabError(f"There is no law II with optimum={optimum!r}.", f"Choose one of {', '.join(OPTIMA)}.")
    c_M, u_M, log_y_M = _logarithms(compute=compute, bytes_per_token=bytes_per_token, loss=loss)
    if len(np.unique(c_M)) < 3 or len(np.unique(u_M)) < 3:
        raise LabError(f"Law II needs three budgets and three compression rates, not {len(np.unique(c_M))} and "
                       f"{len(np.unique(u_M))}.", "Add measurements.")
    return c_M, u_M, np.exp(log_y_M)
