"""Owns the logical KV blocks and the saved tails: who holds them, and which prefixes they cache.

A block holds ``block_size`` tokens. With ``num_shards`` C > 1 (``kv_shard: cp``) block ``i`` of a
request takes an id with ``id % C == i % C``, so every shard has its own free lists. A free block that
holds a published prefix stays reusable until its space is needed.

A cached prefix can be *used* only where a tail (window rows and compressor states at a block boundary)
was saved, so a hit ends at the last saved tail. Keys are a SHA-256 chain over the token ids.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from cluster.errors import CapacityError


def extend_chain(
    chain: list[bytes], token_ids: list[int], num_tokens: int, block_size: int, salt: bytes
) -> None:
    """Append to ``chain`` the hashes of the full blocks among the first ``num_tokens`` tokens.

    Entry i covers ``salt`` and tokens 0 .. (i + 1) * block_size - 1; ids must lie in 0 .. 2**32 - 1.
    """
    for index in range(len(chain), num_tokens // block_size):
        tokens = array("I", token_ids[index * block_size : (index + 1) * block_size]).tobytes()
        parent = chain[-1] if chain else hashlib.sha256(b"causeway prefix\0" + salt).digest()
        chain.append(hashlib.sha256(parent + tokens).digest())


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixHit:
    """A cached prefix that can be used: its full blocks and the tail saved at their end."""

    num_blocks: int = 0
    tail: int = -1


class TailPool:
    """Ids of saved tails. A tail is free, taken (being written), or attached to a key.

    Attached tails are evicted least recently used first; pinned ones never.
    """

    def __init__(self, num_tails: int) -> None:
        self.num_tails = num_tails
        self._free = list(range(num_tails - 1, -1, -1))
        self._taken: set[int] = set()
        self._by_key: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._pins: dict[int, int] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._by_key

    @property
    def num_free(self) -> int:
        """Tails that hold nothing."""
        return len(self._free)

    @property
    def num_taken(self) -> int:
        """Tails being written."""
        return len(self._taken)

    @property
    def num_attached(self) -> int:
        """Tails that cache a prefix."""
        return len(self._by_key)

    @property
    def num_pinned(self) -> int:
        """Attached tails that a starting request is about to read."""
        return len(self._pins)

    def get(self, key: bytes) -> int:
        """The tail attached to ``key``, or -1."""
        return self._by_key.get(key, -1)

    def pin(self, key: bytes) -> int:
        """Keep the tail of ``key`` until ``unpin``; it becomes the most recently used."""
        tail = self._by_key[key]
        self._by_key.move_to_end(key)
        self._pins[tail] = self._pins.get(tail, 0) + 1
        return tail

    def unpin(self, tail: int) -> None:
        """Undo one ``pin``."""
        self._pins[tail] -= 1
        if not self._pins[tail]:
            del self._pins[tail]

    def take(self) -> int:
        """A tail to write, evicting if needed; -1 when all are pinned or being written."""
        if not self._free:
            for key, tail in self._by_key.items():
                if tail not in self._pins:
                    self.drop(key)
                    break
            else:
                return -1
        tail = self._free.pop()
        self._taken.add(tail)
        return tail

    def attach(self, tail: int, key: bytes) -> None:
        """The taken ``tail`` now holds the state of ``key``; freed if another one does already."""
        self._taken.remove(tail)
        if key in self._by_key:
            self._free.append(tail)
        else:
            self._by_key[key] = tail

    def give_back(self, tail: int) -> None:
        """The taken ``tail`` was not needed."""
        self._taken.remove(tail)
        self._free.append(tail)

    def drop(self, key: bytes) -> None:
        """Forget the tail of ``key``, if there is one."""
        tail = self._by_key.pop(key, None)
        if tail is not None:
            if tail in self._pins:
                raise RuntimeError(f"tail {tail} was dropped while a request reads it")
            self._free.append(tail)


class BlockManager:
    """Block ids 0 .. num_blocks - 1: free lists per shard, reference counts, prefix cache."""

    def __init__(
        self, *, num_blocks: int, block_size: int, num_tails: int, num_shards: int = 1
    ) -> None:
        if num_blocks < num_shards:
            raise CapacityError(
                f"{num_blocks} KV blocks for {num_shards} shards: each shard needs one at least"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_shards = num_shards
        self.tails = TailPool(num_tails)
        self._ref_counts = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._block_by_key: dict[bytes, int] = {}
        # Free blocks without content (last in, first out) and with it (least recently freed first).
        self._blank = [
            list(range(num_blocks))[shard::num_shards][::-1] for shard in range(num_shards)
        ]
        self._cached: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_shards)]

    @property
    def num_free(self) -> int:
        """Blocks no request holds (those that cache a prefix included)."""
        return sum(map(len, self._blank)) + sum(map(len, self._cached))

    @property
    def num_cached(self) -> int:
        """Blocks that hold a published prefix, free or not."""
        return len(self._block_by_key)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens take."""
        return -(-num_tokens // self.block_size)

    def ref_count(self, block_id: int) -> int:
        """Requests that hold the block."""
        return self._ref_counts[block_id]

    def can_allocate(self, first: int, count: int) -> bool:
        """Whether blocks ``first .. first + count - 1`` of a request can be had."""
        for shard in range(self.num_shards):
            skip = (shard - first) % self.num_shards
            need = max(0, -(-(count - skip) // self.num_shards))
            if need > len(self._blank[shard]) + len(self._cached[shard]):
                return False
        return True

    def allocate(self, first: int, count: int) -> list[int]:
        """Blocks ``first .. first + count - 1`` of a request, empty; CapacityError if too few."""
        if not self.can_allocate(first, count):
            raise CapacityError(f"{count} KV blocks asked for, {self.num_free} are free")
        return [self._take(index % self.num_shards) for index in range(first, first + count)]

    def release(self, block_ids: SequenceOf[int]) -> None:
        """Give up one reference to each of a request's blocks.

        The last block is freed first: the end of a prefix is useless without its start, so it
        should be evicted earlier.
        """
        for block_id in reversed(block_ids):
            if self._ref_counts[block_id] <= 0:
                raise RuntimeError(f"KV block {block_id} was released twice")
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                shard = block_id % self.num_shards
                if self._keys[block_id] is None:
                    self._blank[shard].append(block_id)
                else:
                    self._cached[shard][block_id] = None

    def match(self, chain: SequenceOf[bytes], num_tokens: int) -> PrefixHit:
        """The longest cached prefix of ``num_tokens`` tokens that ends at a saved tail.

        ``chain`` holds their block hashes. At least one token is left to compute.
        """
        hit = PrefixHit()
        for index in range(min(len(chain), (num_tokens - 1) // self.block_size)):
            if chain[index] not in self._block_by_key:
                break
            tail = self.tails.get(chain[index])
            if tail >= 0:
                hit = PrefixHit(num_blocks=index + 1, tail=tail)
        return hit

    def acquire(self, chain: SequenceOf[bytes], hit: PrefixHit) -> list[int]:
        """Take a reference to the blocks of ``hit`` and pin its tail (``tails.unpin`` later)."""
        block_ids = [self._block_by_key[key] for key in chain[: hit.num_blocks]]
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._cached[block_id % self.num_shards][block_id]
            self._ref_counts[block_id] += 1
        if hit.num_blocks:
            self.tails.pin(chain[hit.num_blocks - 1])
        return block_ids

    def publish(
        self, chain: SequenceOf[bytes], block_ids: SequenceOf[int], first: int, end: int
    ) -> None:
        """Offer blocks ``first .. end - 1`` of a request, now full and final, to the prefix cache.

        A prefix that is cached already keeps the older block.
        """
        for index in range(first, end):
            if chain[index] not in self._block_by_key and self._keys[block_ids[index]] is None:
                self._block_by_key[chain[index]] = block_ids[index]
                self._keys[block_ids[index]] = chain[index]

    def wants_tail(self, key: bytes) -> bool:
        """Whether a tail at the end of the cached block ``key`` would be of use."""
        return key in self._block_by_key and key not in self.tails

    def attach_tail(self, tail: int, key: bytes) -> None:
        """Attach the taken ``tail`` to the published block ``key``."""
        if key in self._block_by_key:
            self.tails.attach(tail, key)
        else:
            self.tails.give_back(tail)

    def _take(self, shard: int) -> int:
        """One free block of a shard; a blank one if there is, else the oldest cached one."""
        if self._blank[shard]:
            block_id = self._blank[shard].pop()
        else:
            block_id, _ = self._cached[shard].popitem(last=False)
            key = self._keys[block_id]
            if key is None:
                raise RuntimeError(f"KV block {block_id} is on the cached list without a key")
            del self._block_by_key[key]
            self._keys[block_id] = None
            self.tails.drop(key)  # nobody can pin it: a reader holds the block as well
        self._ref_counts[block_id] = 1
        return block_id
