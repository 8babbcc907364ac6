"""Blocks and tails: nothing is lost, nothing has two owners, and a hit is what was published."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.block_manager import BlockManager, PrefixHit, TailPool, extend_chain
from cluster.errors import CapacityError

SIZE = 4


def chain_of(tokens: list[int], salt: bytes = b"") -> list[bytes]:
    chain: list[bytes] = []
    extend_chain(chain, tokens, len(tokens), SIZE, salt)
    return chain


def cached(manager: BlockManager, tokens: list[int], *tail_blocks: int, salt: bytes = b"") -> None:
    """Compute ``tokens``, publish them, save tails after the given block counts, end."""
    chain = chain_of(tokens, salt)
    ids = manager.allocate(0, len(chain))
    manager.publish(chain, ids, 0, len(chain))
    for count in tail_blocks:
        manager.attach_tail(manager.tails.take(), chain[count - 1])
    manager.release(ids)


def test_a_hit_ends_at_the_last_saved_tail_and_leaves_a_token() -> None:
    manager = BlockManager(num_blocks=8, block_size=SIZE, num_tails=4)
    tokens = list(range(16))
    cached(manager, tokens, 2, 4)
    longer = [*tokens, 99]
    assert manager.match(chain_of(longer), len(longer)).num_blocks == 4
    assert manager.match(chain_of(tokens), len(tokens)).num_blocks == 2  # one token is computed
    other = [*tokens[:12], 50, 51, 52, 53, 54]
    assert manager.match(chain_of(other), len(other)).num_blocks == 2
    assert manager.match(chain_of([9, *tokens]), 17) == PrefixHit()


def test_salts_never_share() -> None:
    manager = BlockManager(num_blocks=8, block_size=SIZE, num_tails=4)
    tokens = list(range(9))
    cached(manager, tokens, 2, salt=b"a")
    assert manager.match(chain_of(tokens, b"a"), 9).num_blocks == 2
    for salt in (b"", b"b", b"a\0"):
        assert manager.match(chain_of(tokens, salt), 9) == PrefixHit()


def test_cached_blocks_are_kept_until_the_space_is_needed_oldest_first() -> None:
    manager = BlockManager(num_blocks=6, block_size=SIZE, num_tails=4)
    first, second = list(range(8)), list(range(100, 108))
    cached(manager, first, 2)
    cached(manager, second, 2)
    assert (manager.num_free, manager.num_cached, manager.tails.num_attached) == (6, 4, 2)
    held = manager.allocate(0, 2)  # the blank ones
    assert manager.num_cached == 4
    held += manager.allocate(2, 1)
    # The end of the older prefix went, and with it its tail; the newer one is whole.
    assert manager.match(chain_of([*first, 1]), 9) == PrefixHit()
    assert manager.match(chain_of([*second, 1]), 9).num_blocks == 2
    assert manager.tails.num_attached == 1
    manager.release(held)


def test_a_hit_is_held_while_used() -> None:
    manager = BlockManager(num_blocks=4, block_size=SIZE, num_tails=1)
    tokens = [*range(8), 0]
    cached(manager, tokens, 2)
    chain = chain_of(tokens)
    hit = manager.match(chain, 9)
    ids = manager.acquire(chain, hit)
    assert [manager.ref_count(i) for i in ids] == [1, 1]
    assert manager.num_free == 2
    assert manager.tails.take() == -1  # the only tail is about to be read
    with pytest.raises(CapacityError, match="3 KV blocks asked for, 2 are free"):
        manager.allocate(2, 3)
    manager.tails.unpin(hit.tail)
    manager.release(ids)
    assert manager.tails.take() == hit.tail


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_block_i_lives_on_shard_i(shards: int) -> None:
    manager = BlockManager(num_blocks=10, block_size=SIZE, num_tails=0, num_shards=shards)
    ids = manager.allocate(0, 10)  # every request of num_blocks blocks fits
    assert [i % shards for i in ids] == [index % shards for index in range(10)]
    assert sorted(ids) == list(range(10))
    manager.release(ids)
    held = [manager.allocate(0, 1) for _ in range(len(range(0, 10, shards)))]  # all of shard 0
    assert not manager.can_allocate(0, 1)
    assert not manager.can_allocate(1, shards)
    assert manager.can_allocate(1, shards - 1)
    for ids in held:
        manager.release(ids)


def test_releasing_twice_is_noticed() -> None:
    manager = BlockManager(num_blocks=2, block_size=SIZE, num_tails=0)
    ids = manager.allocate(0, 1)
    manager.release(ids)
    with pytest.raises(RuntimeError, match="released twice"):
        manager.release(ids)


def test_too_few_blocks_for_the_shards() -> None:
    with pytest.raises(CapacityError, match="3 KV blocks for 4 shards"):
        BlockManager(num_blocks=3, block_size=SIZE, num_tails=0, num_shards=4)


def test_a_tail_nobody_needs_is_given_back() -> None:
    pool = TailPool(2)
    a, b = pool.take(), pool.take()
    assert pool.take() == -1
    pool.attach(a, b"x")
    pool.attach(b, b"x")  # two requests saved the same prefix
    assert (pool.num_free, pool.num_attached) == (1, 1)
    assert pool.get(b"x") == a


def audit(manager: BlockManager, owners: dict[int, int]) -> None:
    """``owners``: how many requests hold each block. Lists, counts and keys must agree."""
    blank = [b for ids in manager._blank for b in ids]
    kept = [b for ids in manager._cached for b in ids]
    held = [b for b in range(manager.num_blocks) if owners.get(b, 0)]
    assert sorted(blank + kept + held) == list(range(manager.num_blocks))
    assert all(manager.ref_count(b) == owners.get(b, 0) for b in range(manager.num_blocks))
    assert all(manager._keys[b] is None for b in blank)
    assert {k: b for b, k in enumerate(manager._keys) if k is not None} == manager._block_by_key
    for shard in range(manager.num_shards):
        ids = [*manager._blank[shard], *manager._cached[shard]]
        assert all(b % manager.num_shards == shard for b in ids)
    tails = manager.tails
    assert tails.num_free + tails.num_taken + tails.num_attached == tails.num_tails
    everything = [*tails._free, *tails._taken, *tails._by_key.values()]
    assert sorted(everything) == list(range(tails.num_tails))
    assert set(tails._by_key) <= set(manager._block_by_key)
    assert set(tails._pins) <= set(tails._by_key.values())


class Histories(RuleBasedStateMachine):
    """Requests start (with hits), grow, publish, save tails and end in any order."""

    @initialize(
        shards=st.sampled_from([1, 2, 3]), blocks=st.integers(3, 12), tails=st.integers(0, 3)
    )
    def begin(self, shards: int, blocks: int, tails: int) -> None:
        self.manager = BlockManager(
            num_blocks=blocks, block_size=SIZE, num_tails=tails, num_shards=shards
        )
        self.requests: list[dict[str, Any]] = []
        self.content: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end
        self.tail_content: dict[int, tuple[int, ...]] = {}

    @rule(data=st.data(), length=st.integers(1, 20))
    def start(self, data: st.DataObject, length: int) -> None:
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
        chain = chain_of(tokens)
        hit = self.manager.match(chain, len(tokens))
        assert hit.num_blocks * SIZE < len(tokens)
        ids = self.manager.acquire(chain, hit)
        need = self.manager.num_blocks_for(len(tokens)) - len(ids)
        if not self.manager.can_allocate(len(ids), need):
            with pytest.raises(CapacityError):
                self.manager.allocate(len(ids), need)
            self.manager.release(ids)
            if hit.num_blocks:
                self.manager.tails.unpin(hit.tail)
            return
        for index, block in enumerate(ids):
            assert self.content[block] == tuple(tokens[: (index + 1) * SIZE])
        if hit.num_blocks:
            assert self.tail_content[hit.tail] == tuple(tokens[: len(ids) * SIZE])
        ids = ids + self.manager.allocate(len(ids), need)
        request = {"tokens": tokens, "chain": chain, "ids": ids, "published": hit.num_blocks}
        request["pin"] = hit.tail if hit.num_blocks else -1
        self.requests.append(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        first, full = request["published"], len(request["chain"])
        if first == full:
            return
        end = data.draw(st.integers(first + 1, full))
        key = request["chain"][end - 1]
        tail = self.manager.tails.take() if data.draw(st.booleans()) else -1
        for index in range(first, end):
            self.content[request["ids"][index]] = tuple(request["tokens"][: (index + 1) * SIZE])
        self.manager.publish(request["chain"], request["ids"], first, end)
        request["published"] = end
        if tail >= 0:
            self.tail_content[tail] = tuple(request["tokens"][: end * SIZE])
            self.manager.attach_tail(tail, key)
        self.unpin(request)

    def unpin(self, request: dict[str, Any]) -> None:
        if request["pin"] >= 0:
            self.manager.tails.unpin(request["pin"])
            request["pin"] = -1

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.requests.remove(request)
        self.unpin(request)
        self.manager.release(request["ids"])

    @invariant()
    def pools_sum_to_what_was_allocated(self) -> None:
        if hasattr(self, "manager"):
            owners: dict[int, int] = {}
            for request in self.requests:
                assert len(set(request["ids"])) == len(request["ids"])
                for block in request["ids"]:
                    owners[block] = owners.get(block, 0) + 1
            audit(self.manager, owners)
            # Who shares a block has the same tokens up to its end; fresh blocks have one owner.
            for request in self.requests:
                for index, block in enumerate(request["ids"]):
                    if owners[block] > 1:
                        end = (index + 1) * SIZE
                        assert self.content[block] == tuple(request["tokens"][:end])


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
