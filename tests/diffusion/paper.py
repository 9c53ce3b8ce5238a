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
    x, eps = output
    return sigma**2 * x + alpha * (z - sigma * eps)  # = sigma^2 x~ + alpha^2 (z - sigma eps~) / alpha


def weight(weighting, alpha, sigma):
    """w(lambda), the weight of |x - x_hat|^2."""
    snr = alpha**2 / sigma**2
    return {"snr": snr, "truncated_snr": max(snr, mp.mpf(1)), "snr_plus_one": snr + 1, "x_mse": mp.mpf(1)}[weighting]


class Algorithm2:
    """One sample of Algorithm 2: t = i/N, t' = t - 0.5/N, t'' = t - 1/N. No noise is left at t'' = 0."""

    def __init__(self, schedule, N, i, x, eps):
        t = mp.mpf(i) / N
        self.alpha, self.sigma = schedule(t)
        self.alpha1, self.sigma1 = schedule(t - mp.mpf(0.5) / N)
        self.alpha2, self.sigma2 = schedule(t - mp.mpf(1) / N) if i > 1 else (mp.mpf(1), mp.mpf(0))
        self.z = self.alpha * x + self.sigma * eps

    def teacher_first(self, prediction, output):
        x = x_hat(prediction, output, self.z, self.alpha, self.sigma)
        self.z1 = self.alpha1 * x + self.sigma1 / self.sigma * (self.z - self.alpha * x)
        return self.z1

    def teacher_second(self, prediction, output):
        x = x_hat(prediction, output, self.z1, self.alpha1, self.sigma1)
        z2 = self.alpha2 * x + self.sigma2 / self.sigma1 * (self.z1 - self.alpha1 * x)
        ratio = self.sigma2 / self.sigma
        self.x_target = (z2 - ratio * self.z) / (self.alpha2 - ratio * self.alpha)
        return self.x_target

    def loss(self, prediction, output, weighting):
        x = x_hat(prediction, output, self.z, self.alpha, self.sigma)
        return weight(weighting, self.alpha, self.sigma) * (self.x_target - x) ** 2
