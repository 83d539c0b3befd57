"""A bound on the memory of all caches of one model, asked before a cache is made.

A cache's size is known from its rows, so a conversation that does not fit is refused at once, and
not by the system half-way through an answer.
"""

from __future__ import annotations

import threading
import weakref

from qvlm_runtime.errors import CapacityError


class CacheBudget:
    """Bytes that may be reserved at once. Safe to use from several threads."""

    def __init__(self, limit: int | None = None) -> None:
        """limit: bytes; None counts and refuses nothing."""
        self.limit = limit
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes reserved now."""
        with self._lock:  # another thread's new lease would end the iteration with an error
            return self._sum()

    def _sum(self) -> int:
        return sum(lease.size for lease in self._leases)

    def reserve(self, size: int) -> Lease:
        """Take ``size`` bytes until the lease is released or dropped.

        CapacityError if they are not free.
        """
        lease = Lease(0)
        self.resize(lease, size)
        return lease

    def resize(self, lease: Lease, size: int) -> None:
        """Make a lease ``size`` bytes large.

        CapacityError if they are not free; the lease is then as it was.
        """
        with self._lock:
            used = self._sum() - lease.size
            if self.limit is not None and used + size > self.limit:
                raise CapacityError(
                    f"a cache of {size} bytes does not fit: {used} of {self.limit} bytes are in "
                    "use. End another conversation, use fewer rows, or raise cache_limit."
                )
            lease.size = size
            self._leases.add(lease)


class Lease:
    """Reserved bytes; a lease that nobody holds any more counts nothing."""

    def __init__(self, size: int) -> None:
        self.size = size

    def release(self) -> None:
        """Give the bytes back."""
        self.size = 0
