"""Notice logits that are NaN while texts are written: greedy decoding would take a token."""

from __future__ import annotations

from torch import Tensor


class NanError(ArithmeticError):
    """A model's logits are not numbers."""


class NanWatch:
    """Notes NaN among logits; the flag stays on their device, so that no pass waits for it."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def see(self, logits: Tensor) -> None:
        """Look at logits of any shape."""
        found = logits.amax().isnan()  # the largest of numbers and NaN is NaN
        self._seen = found if self._seen is None else self._seen.to(found.device) | found

    @property
    def seen(self) -> bool:
        """Whether any was seen; waits for the passes so far."""
        return self._seen is not None and bool(self._seen.item())

    def raise_if_seen(self) -> None:
        """Raise ``NanError`` if any was seen."""
        if self.seen:
            raise NanError
