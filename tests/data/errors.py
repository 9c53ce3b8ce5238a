"""What every refusal of bad data has in common."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdfast.io.errors import UsageError


def refusal(call: Callable[..., Any], *arguments: Any, names: Path | str, **options: Any) -> str:
    """The message of the UsageError that the call raises: one line, which names the file or folder."""
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(names) in message
    return message
