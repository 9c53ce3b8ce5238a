"""Progressive Distillation as Salimans & Ho 2022 print it, in mpmath at 60 digits; shares no code with pdfast.

Data, noise and networks' outputs are single numbers. A schedule is a function u -> (alpha, sigma).
"""

from bisect import bisect_left

import mpmath as mp

mp.mp.dps = 60


def cosine(u):
    return mp.cos(mp.pi * u / 2), mp.sin(mp.pi * u / 2)


def clipped_cosine(u):
    """logsnr = -2 log tan(a u + b) from 20 at u = 0 to -20 at u = 1; alpha^2 = sigmoid(logsnr)."""
    b = mp.atan(mp.exp(-10))
    a = mp.atan(mp.exp(10)) - b
    logsnr = -2 * mp.log(mp.tan(a * u + b))
    return mp.sqrt(1 / (1 + mp.exp(-logsnr))), mp.sqrt(1 / (1 + mp.exp(logsnr)))


def linear_beta(u):
    """alpha^2 = exp(-integral of beta), beta from 0.1 to 20."""
    low, high = mp.mpf(0.1), mp.mpf(20)
    alpha2 = mp.exp(-(low * u + (high - low) * u**2 / 2))
    return mp.sqrt(alpha2), mp.sqrt(1 - alpha2)


def table(alpha_bars):
    """Entry i at u = (i + 1) / T, no noise at u = 0, angles linear in between."""
    angles = [mp.mpf(0)] + [mp.acos(mp.sqrt(mp.mpf(a))) for a in alpha_bars]
    size = len(alpha_bars)

    def schedule(u):
        i = min(max(bisect_left(range(size + 1), u * size) - 1, 0), size - 1)
        phi = angles[i] + (angles[i + 1] - angles[i]) * (u * size - i)
        return mp.cos(phi), mp.sin(phi)

    return schedule


def starting_at(schedule, u_start):
    return lambda u: schedule(u * mp.mpf(u_start))


def x_hat(prediction, output, z, alpha, sigma):
    """The prediction of x: section 4 of the paper. `both` gives (x~, eps~)."""
    if prediction == "x":
        return output
    if prediction == "eps":
        return (z - sigma * output) / alpha
    if prediction == "v":
        return alpha * z - sigma * output
    if prediction == "flow":  # eps - x
        return (z - sigma * output) / (alpha + sigma)
    x, eps = output
    return sigma**2 * x + alpha * (z - sigma * eps)  # = sigma^2 x~ + alpha^2 (z - sigma eps~) / alpha


def output(prediction, x, eps, alpha, sigma):
    """What a network of that prediction says that knows x and eps, tensors; `both` says the two."""
    return {
        "x": x,
        "eps": eps,
        "v": alpha * eps - sigma * x,
        "both": (x, eps),
        "flow": eps - x,
    }[prediction]


def weight(weighting, alpha, sigma):
    """w(lambda), the weight of |x - x_hat|^2."""
    snr = alpha**2 / sigma**2
    return {"snr": snr, "truncated_snr": max(snr, mp.mpf(1)), "snr_plus_one": snr + 1, "x_mse": mp.mpf(1)}[weighting]


class Algorithm2:
    """One sample of Algorithm 2: t = i/N, t' = t - 0.5/N, t'' = t - 1/N; or of m teacher steps in one of the student's, through any
    times. No noise is left at time 0."""

    def __init__(self, schedule, times, x, eps):
        self.levels = [schedule(t) if t > 0 else (mp.mpf(1), mp.mpf(0)) for t in times]
        alpha, sigma = self.levels[0]
        self.states = [alpha * x + sigma * eps]

    def teacher(self, prediction, output):
        """One DDIM step with what the teacher says; at the last, the target of x."""
        (alpha, sigma), (alpha1, sigma1) = self.levels[len(self.states) - 1 :][:2]
        x = x_hat(prediction, output, self.states[-1], alpha, sigma)
        self.states.append(alpha1 * x + sigma1 / sigma * (self.states[-1] - alpha * x))
        if len(self.states) == len(self.levels):
            alpha0, sigma0 = self.levels[0]
            ratio = sigma1 / sigma0
            self.x_target = (self.states[-1] - ratio * self.states[0]) / (alpha1 - ratio * alpha0)

    def loss(self, prediction, output, weighting):
        alpha, sigma = self.levels[0]
        x = x_hat(prediction, output, self.states[0], alpha, sigma)
        return weight(weighting, alpha, sigma) * (self.x_target - x) ** 2


def times_of_step(N, i, m=2):
    """Those of student step i of N and of the teacher's m steps in it."""
    return [mp.mpf(i) / N - mp.mpf(j) / (m * N) for j in range(m)] + [mp.mpf(i - 1) / N]


def times_of_closure(T, N, i):
    """Those of row i: a point of the teacher's grid, the next, and the end of its segment (TRACT, Berthelot et al. 2023)."""
    return [mp.mpf(i) / T, mp.mpf(i - 1) / T, mp.mpf((i - 1) // (T // N)) / N]
