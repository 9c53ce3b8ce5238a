"""What of a round's result deserves a warning."""

from typing import Any

from pdfast.config import GuardConfig
from pdfast.io.text import count_steps

Row = dict[str, Any]


def complaints(student: Row, before: Row, teacher: list[Row], bounds: GuardConfig) -> list[str]:
    """Return one line for each bound that a student's row of metrics breaks: against the round before, the teacher's own
    DDIM at the same step count, and the colours of what the teacher draws at its first count."""
    steps, fd = count_steps(student["steps"]), student["fd"]
    said = []
    if fd > bounds.ratio * before["fd"] > 0:
        said.append(
            f"the student of {steps} has a Frechet distance of {fd:.3f}, {fd / before['fd']:.2f} times the {before['fd']:.3f} "
            f"at {count_steps(before['steps'])}: more than {bounds.ratio:g} times; give the round more updates (--updates)"
        )
    ddim = next((row["fd"] for row in teacher if row["steps"] == student["steps"]), None)
    if ddim is not None and fd > ddim:
        said.append(f"the student of {steps} ({fd:.3f}) is behind its first teacher's own DDIM at {steps} ({ddim:.3f})")
    drift = max(abs(a - b) for a, b in zip(student["channel_mean"], teacher[0]["channel_mean"], strict=True))
    if drift > bounds.colour:
        said.append(
            f"colours drift: a channel's mean of the student of {steps} is {drift:.3f} off, more than {bounds.colour:g}"
        )
    return said + _seeds(student, bounds)


def _seeds(student: Row, bounds: GuardConfig) -> list[str]:
    """Return what is to be said of the student's images next to the teacher's from the same noise; of what is not known, nothing."""
    steps, said = count_steps(student["steps"]), []
    distance, diversity = student.get("feature_distance"), student.get("diversity_ratio")
    if distance is not None and distance > bounds.seeds:
        said.append(
            f"the student of {steps} does not keep its teacher's seeds: the same noise gives images {distance:.2f} times as far apart as "
            f"different noise does, more than {bounds.seeds:g}"
        )
    if diversity is not None and diversity < bounds.diversity:
        said.append(
            f"the student of {steps} draws much the same for every seed: its images differ {diversity:.2f} times as much as its "
            f"teacher's, less than {bounds.diversity:g}"
        )
    for what, low, high in (("contrast", "washed out", "overdone"), ("saturation", "faded", "oversaturated")):
        ratio, most = student.get(f"{what}_ratio"), getattr(bounds, what)
        if ratio is not None and abs(ratio - 1) > most:
            said.append(
                f"images of the student of {steps} are {low if ratio < 1 else high}: {what} {ratio:.2f} times the teacher's, more than "
                f"{most:g} off"
            )
    return said
