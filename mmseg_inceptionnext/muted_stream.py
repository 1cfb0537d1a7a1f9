"""Mute a stream for a while; the rest of the package is not needed for it."""

from __future__ import annotations

from typing import TextIO


class MutedStream:
    """A stream that drops what is written inside its ``with`` block, and passes on what comes later.

    Loggers that are created in the block keep the stream, as mmdet's does: what they say later must not be lost.

    Args:
        stream: The stream that it stands for.
    """

    def __init__(self, stream: TextIO):
        self._stream, self._muted = stream, False

    def __enter__(self) -> MutedStream:
        self._muted = True
        return self

    def __exit__(self, *exception) -> None:
        self._muted = False

    def write(self, text: str) -> int:
        return len(text) if self._muted else self._stream.write(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
