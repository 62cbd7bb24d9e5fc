"""Where a layer's tokens lie, and in which order they leave by age."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass
class Lane:
    """Where the tokens of some rows lie; kept on the host, so that decoding never waits for the device.

    Attributes:
        count: tokens held.
        extent: positions in use, holes included.
        pinned: oldest tokens that never leave by age.
        to_pin: tokens to come that will not leave by age either (sinks of a prompt shorter than they are).
        by_age: whether the order of age is kept track of.
        next_loose: position of the oldest loose token; up to `loose_end`, positions are in the order of age.
        loose_end: end of those positions.
        written: positions written since, oldest first.
        holes: empty positions.
    """

    count: int
    extent: int
    pinned: int = 0
    to_pin: int = 0
    by_age: bool = False
    next_loose: int = 0
    loose_end: int = 0
    written: deque[int] = field(default_factory=deque)
    holes: list[int] = field(default_factory=list)

    def pin(self, pinned: int, to_pin: int) -> None:
        """Starts to keep track of age, while positions are in that order."""
        self.pinned, self.to_pin, self.by_age = min(pinned, self.count), to_pin, True
        self.next_loose, self.loose_end = self.pinned, self.count
        self.written.clear()

    def take(self) -> int:
        """Position for one new token."""
        if self.holes:
            position = self.holes.pop()
        else:
            position, self.extent = self.extent, self.extent + 1
        self.count += 1
        if self.to_pin:
            self.to_pin, self.pinned = self.to_pin - 1, self.pinned + 1
        elif self.by_age:
            self.written.append(position)
        return position

    def leave(self) -> int | None:
        """Empties the position of the oldest loose token; None if there is none."""
        if self.next_loose < self.loose_end:
            position, self.next_loose = self.next_loose, self.next_loose + 1
        elif self.written:
            position = self.written.popleft()
        else:
            return None
        self.holes.append(position)
        self.count -= 1
        return position
