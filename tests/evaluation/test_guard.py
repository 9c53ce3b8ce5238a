"""What of a round's result deserves a warning."""

from pdfast.config import GuardConfig
from pdfast.evaluation.guard import complaints


def row(steps, fd, mean=0.5):
    return {"steps": steps, "fd": fd, "channel_mean": [0.5, mean]}


TEACHER = [row(8, 2.0), row(4, 5.0), row(2, 9.0)]
BOUNDS = GuardConfig(ratio=1.5, colour=0.02)


def test_nothing_to_say():
    assert complaints(row(4, 2.9, 0.51), row(8, 2.0), TEACHER, BOUNDS) == []


def test_each_bound():
    (ratio,) = complaints(row(4, 3.2), row(8, 2.0), TEACHER, BOUNDS)
    assert "4 steps has a Frechet distance of 3.200, 1.60 times the 2.000 at 8 steps: more than 1.5 times" in ratio
    (behind,) = complaints(row(4, 5.5), row(8, 4.0), TEACHER, BOUNDS)
    assert "behind its first teacher's own DDIM at 4 steps (5.000)" in behind
    (colour,) = complaints(row(4, 2.0, 0.47), row(8, 2.0), TEACHER, BOUNDS)
    assert "is 0.030 off, more than 0.02" in colour


def test_a_step_count_at_which_the_teacher_was_not_judged():
    assert complaints(row(1, 2.5), row(2, 2.0), TEACHER, BOUNDS) == []


def test_a_model_that_drew_the_real_images_themselves():
    """Nothing is a number of times 0."""
    assert complaints(row(1, 2.5), row(2, 0.0), TEACHER, BOUNDS) == []
