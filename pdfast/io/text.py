"""Numbers in words."""


def count_steps(steps: int) -> str:
    """Return `1 step`, `2 steps`."""
    return f"{steps} step{'' if steps == 1 else 's'}"


def clock(seconds: float) -> str:
    """Return 1:05 or 2:01:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
