"""Best-fit packing: which items share a sequence. Used for conversations, and for documents with
data.packing_strategy=best_fit.
"""

from pathlib import Path

import numpy as np


class Packs:
    """Which items each sequence has."""

    def __init__(self, members: np.ndarray, ends: np.ndarray) -> None:
        """
        Args:
            members: items, sequence after sequence; int64.
            ends: the end of each sequence in `members`, int64.
        """
        self._members, self._ends = members, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._members[self._ends[index - 1] if index else 0 : self._ends[index]]

    @classmethod
    def of(cls, packs: list[list[int]]) -> "Packs":
        members = np.array([member for pack in packs for member in pack], dtype=np.int64)
        return cls(members, np.cumsum([len(pack) for pack in packs], dtype=np.int64))

    def renamed(self, names: np.ndarray) -> "Packs":
        """With names[i] in place of item i."""
        return Packs(names[self._members], self._ends)

    @classmethod
    def load(cls, folder: Path) -> "Packs":
        return cls(
            *(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("members", "ends"))
        )

    def save(self, folder: Path) -> None:
        for name, values in (("members", self._members), ("ends", self._ends)):
            np.save(folder / f"{name}.npy", values, allow_pickle=False)


def best_fit(places: np.ndarray, size: int) -> Packs:
    """Packs items into bins by best-fit decreasing: the largest item first, each into the fullest bin in which it fits
    (as in arXiv:2404.10830, section 3.2). Equal items are placed together, so that the time grows with the different
    sizes more than with the items.

    Args:
        places: size of each item, from 1 to `size`.

    Returns:
        Indices into `places` of the items of each bin.
    """
    order = np.argsort(-places, kind="stable")
    needs, counts = np.unique(places, return_counts=True)
    by_room: dict[int, list[int]] = {}
    """Bins with a free size, the newest last."""
    rooms = 0  # a bit for each free size that a bin has
    parts: list[np.ndarray] = []  # the bin of each item, in `order`
    bins = 0
    for need, left in zip(needs[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            fitting = rooms >> need
            room = need + (fitting & -fitting).bit_length() - 1 if fitting else size
            each = room // need  # a bin that gets one is the fullest until no more fits
            taken = -(-left // each)
            if fitting:
                stack = by_room[room]
                chosen = stack[: -taken - 1 : -1]
                del stack[-len(chosen) :]
                if not stack:
                    rooms &= ~(1 << room)
            else:
                chosen = list(range(bins, bins + taken))
                bins += taken
            placed = min(left, len(chosen) * each)
            parts.append(np.repeat(np.array(chosen, dtype=np.int64), each)[:placed])
            left -= placed
            short = len(chosen) * each - placed  # of the last bin
            full = chosen[:-1] if short else chosen
            for free, those in ((room - each * need, full), (room - (each - short) * need, chosen[len(full) :])):
                if those:
                    by_room.setdefault(free, []).extend(those)
                    rooms |= 1 << free
    bin_of_item = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    members = order[np.argsort(bin_of_item, kind="stable")]
    return Packs(members.astype(np.int64), np.cumsum(np.bincount(bin_of_item, minlength=bins)))
