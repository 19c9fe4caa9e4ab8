"""Detect NaN logits during generation: the argmax of NaN would pass for a token."""

from __future__ import annotations

from torch import Tensor


class NanError(ArithmeticError):
    """A model's logits are not numbers."""


class NanWatch:
    """Records whether logits were NaN, in a flag on their device, so that no pass waits for it."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def see(self, logits: Tensor) -> None:
        """Check logits of any shape."""
        found = logits.amax().isnan()  # the maximum is NaN if any of them is
        self._seen = found if self._seen is None else self._seen.to(found.device) | found

    @property
    def seen(self) -> bool:
        """Whether any was seen; waits for the passes so far."""
        return self._seen is not None and bool(self._seen.item())

    def raise_if_seen(self) -> None:
        """Raise ``NanError`` if any was seen."""
        if self.seen:
            raise NanError
