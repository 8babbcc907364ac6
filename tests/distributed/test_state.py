"""Slots, rings, pages and buffers of one rank: nobody sees or touches what is another's."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.deepseek_v4 import attention, model, mtp, projection
from model.forward_batch import DecodeBatch
from tests.helpers.cache_contents import poison_slot
from tests.helpers.model_setup import Setup, stream
from tests.helpers.parity_runs import shape_path
from tests.helpers.step_driver import Driver, Part, Request, Row, rows_of
from worker.decode_builder import DecodeBuilder, DecodeRows, PaddedShape
from worker.metadata_buffers import MetadataBuffers, aligned_bytes

BASE = Setup(shape=shape_path(), load_mtp=False)
TOLERANCE = 1e-4


def decode_builder(driver: Driver) -> DecodeBuilder:
    assert driver.worker._runner is not None
    return driver.worker._runner.decode_builder


def serve(driver: Driver, number: int, length: int, slot: int, count: int = 8) -> Any:
    """Prefill a prompt and decode some tokens: its logits, tokens, drafts and caches."""
    request = driver.open(stream(number, length), slot=slot)
    (out,) = driver.prefill(Part(request=request, count=length, sample=True))
    while len(request.tokens) < length + count:
        driver.decode(Row(request=request, drafts=driver.drafts(request)))
    contents = driver.contents(request)
    driver.release(request)
    return rows_of(out.logits), request.tokens, contents


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("length", [3, 130, 257])
def test_slot_reuse_does_not_leak_atom_1417(drafts: int, length: int) -> None:
    """The same slot and blocks after a longer request give, bit for bit, what fresh ones give."""
    driver = Driver(replace(BASE, mtp=drafts, slots=2))
    fresh_logits, fresh_tokens, fresh = serve(driver, 1, length, slot=1)
    driver.reset()
    serve(driver, 2, 700, slot=1)  # its blocks come first on the free list again
    logits, tokens, contents = serve(driver, 1, length, slot=1)
    assert torch.equal(logits, fresh_logits)
    assert tokens == fresh_tokens
    for a, b in zip(contents, fresh, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_rank_refuses_a_request_that_does_not_hold_the_slot() -> None:
    driver = Driver(replace(BASE, slots=2))
    first = driver.open(stream(0, 5), slot=0)
    driver.prefill(Part(request=first, count=5, sample=True))
    second = driver.open(stream(1, 5), slot=0)
    driver.prefill(Part(request=second, count=5, sample=True))
    with pytest.raises(RuntimeError, match="slot 0 is held by request 2, not by request 1"):
        driver.decode(Row(request=first))


@pytest.mark.parametrize("drafts", [0, 3])
def test_requests_at_once_equal_requests_alone_sglang_33397_vllm_41834(drafts: int) -> None:
    """Twelve requests that join and leave a running batch; tokens and caches as if each were alone."""
    driver = Driver(replace(BASE, mtp=drafts, slots=12, num_blocks=64))
    lengths = [3, 120, 127, 128, 129, 64, 255, 256, 31, 90, 1, 200]
    alone = {n: serve(driver, i, n, slot=0, count=6) for i, n in enumerate(lengths)}
    driver.reset()
    for slot in range(12):
        poison_slot(driver.pool, slot)
    running: list[Request] = []
    waiting = [(i, n) for i, n in enumerate(lengths)]
    seen = {}
    while waiting or running:
        joining = [driver.open(stream(i, n), slot=(5 * i + 3) % 12) for i, n in waiting[:3]]
        waiting = waiting[3:]
        if joining:
            parts = [Part(request=r, count=len(r.tokens), sample=True) for r in joining]
            for request, out in zip(joining, driver.prefill(*parts), strict=True):
                seen[request.id] = rows_of(out.logits)
            running += joining
        driver.decode(*(Row(request=r, drafts=driver.drafts(r)) for r in running))
        for request in [r for r in running if len(r.tokens) >= len(seen[r.id]) + 6]:
            length = len(seen[request.id])
            logits, tokens, _ = alone[length]
            assert (seen[request.id] - logits).abs().max() < TOLERANCE
            shared = min(len(tokens), len(request.tokens))
            assert request.tokens[:shared] == tokens[:shared]
            driver.release(request)
            running.remove(request)
    assert len(seen) == len(lengths)


def test_repeats_are_byte_equal_vllm_53257() -> None:
    """One step, again and again, in other slots and blocks: the same bits."""
    driver = Driver(BASE)
    first: bytes | None = None
    for i in range(20):
        request = driver.open(stream(6, 150), slot=i % 8)
        (out,) = driver.prefill(Part(request=request, count=150))
        first = first or out.logits
        assert out.logits == first
        if i % 3:
            driver.release(request)


def test_max_model_len_changes_nothing_vllm_42169() -> None:
    """Wider block tables pad scores and indices; the tokens stay the same."""
    found = []
    for length in (384, 900, 2048, 5000):
        driver = Driver(replace(BASE, max_len=length, slots=2, num_blocks=40))
        found.append(serve(driver, 4, 300, slot=1))
    for logits, tokens, _ in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert tokens == found[0][1]


def test_a_request_of_max_model_len_runs_vllm_54703() -> None:
    """The pool that start-up accepts holds the longest request to its last token."""
    driver = Driver(replace(BASE, max_len=384, num_blocks=3, slots=1, tails=0, mtp=1))
    assert driver.info.max_model_len == 384
    request = driver.open(stream(5, 380), slot=0)
    driver.prefill(Part(request=request, count=380, sample=True, logits=False))
    while request.computed < 383:
        driver.decode(Row(request=request, drafts=min(1, 383 - request.computed - 1)))
    assert driver.free == [[]]


# --- padded rows and canaries ------------------------------------------------------------------


def snapshot(driver: Driver) -> list[dict[str, Tensor]]:
    names = ("window", "main", "index", "state", "tail_window", "tail_state")
    return [{n: getattr(layer, n).clone() for n in names} for layer in driver.pool.layers]


def written(before: Tensor, after: Tensor, row_bytes: int) -> set[tuple[int, int]]:
    """(page, row) of every row of ``row_bytes`` bytes that changed."""
    a, b = (t.view(torch.uint8).flatten(1) for t in (before, after))
    page, byte = (a != b).nonzero(as_tuple=True)
    return set(zip(page.tolist(), (byte // row_bytes).tolist(), strict=True))


@pytest.mark.parametrize("counts", [(1, 3, 2), (2, 1, 1), (1, 1, 4), (4, 4, 4), (1, 1, 1)])
def test_padded_decode_rows_touch_nothing_vllm_42810_vllm_51593(counts: tuple[int, ...]) -> None:
    """Uneven rows per request, every width: only the real rows' places change, in every cache."""
    driver = Driver(replace(BASE, mtp=3))
    starts = (126, 254, 2)
    requests = [driver.open(stream(i, n + 4), slot=2 * i) for i, n in enumerate(starts)]
    driver.prefill(
        *(Part(request=r, count=n) for r, n in zip(requests, starts, strict=True)),
    )
    before = snapshot(driver)
    rows = [Row(request=r, forced=c, logits=True) for r, c in zip(requests, counts, strict=True)]
    answers = driver.decode(*rows)
    ring, size = driver.pool.spec.ring_rows, driver.setup.block_size
    new = [(r, p) for r, s in zip(requests, starts, strict=True) for p in range(s, r.computed)]
    for layer, old in zip(driver.pool.layers[:-1], before[:-1], strict=True):
        want = {(r.slot, p % ring) for r, p in new}
        assert written(old["window"], layer.window, layer.window_layout.entry_bytes) == want
        assert torch.equal(old["tail_window"], layer.tail_window)
        if not layer.ratio:
            continue
        states = driver.pool.spec.state_rows(layer.ratio)
        changed = (old["state"].view(torch.int32) != layer.state.view(torch.int32)).any(1)
        assert set(changed.nonzero().flatten().tolist()) == {
            r.slot * states + p % states for r, p in new
        }
        entries = {
            (r.blocks[p // size], p % size // layer.ratio)
            for r, p in new
            if (p + 1) % layer.ratio == 0
        }
        assert written(old["main"], layer.main, layer.main_layout.entry_bytes) == entries
        if layer.ratio == 4:
            assert written(old["index"], layer.index, layer.index_layout.entry_bytes) == entries
    for i, (start, count, answer) in enumerate(zip(starts, counts, answers, strict=True)):
        lone = driver.open(stream(i, start + count), slot=7)
        (whole,) = driver.prefill(Part(request=lone, count=start + count))
        found = rows_of(answer.logits)
        assert found.shape[0] == count
        assert (found - rows_of(whole.logits)[start:]).abs().max() < TOLERANCE


def test_metadata_buffers_keep_their_borders_vllm_42810() -> None:
    """Canaries behind every array survive steps of all widths: views never reach into the next one."""
    driver = Driver(replace(BASE, mtp=3, slots=3))
    builder = decode_builder(driver)
    requests = [driver.open(stream(i, 200), slot=i) for i in range(3)]
    driver.prefill(*(Part(request=r, count=120) for r in requests))
    canary, room = 0x5A, 256
    size = builder.buffers._device.numel()
    wide = torch.full((size + 2 * room,), canary, dtype=torch.uint8)
    builder.buffers._device = wide[room:-room]
    for counts in ((1, 4, 2), (4, 4, 4), (1, 1, 1), (3, 1, 4)):
        driver.decode(*(Row(request=r, forced=c) for r, c in zip(requests, counts, strict=True)))
    assert (wide[:room] == canary).all()
    assert (wide[-room:] == canary).all()


def test_metadata_is_dense_and_costs_no_memory_vllm_42135() -> None:
    """Whatever the shape, an array is dense and lies in the one buffer, arrays side by side."""
    most = np.zeros((8, 4), dtype=np.int64)
    buffers = MetadataBuffers(2 * aligned_bytes(most.nbytes), torch.device("cpu"))
    home = buffers._device
    for num_decodes, max_decode_len in ((8, 4), (5, 2), (3, 1), (1, 3), (8, 1)):
        values = np.arange(num_decodes * max_decode_len).reshape(num_decodes, max_decode_len)
        buffers.begin()
        first, second = buffers.put(values), buffers.put(values.astype(np.int32) + 7)
        buffers.commit()
        for view, want in ((first, values), (second, values.astype(np.int32) + 7)):
            assert view.shape == (num_decodes, max_decode_len)
            assert view.is_contiguous()
            assert view.untyped_storage().data_ptr() == home.untyped_storage().data_ptr()
            assert torch.equal(view, torch.from_numpy(want))
        assert first.data_ptr() == home.data_ptr()
    buffers.begin()
    with pytest.raises(ValueError, match="576 bytes of metadata after 0, the buffer holds 512"):
        buffers.put(np.zeros((18, 4), dtype=np.int64))
    with pytest.raises(ValueError, match="float64, allowed: int64, int32"):
        buffers.put(np.zeros(1))


def test_decode_batches_live_in_the_same_memory_vllm_42135() -> None:
    """Two steps of one shape put every array at the same address: what a captured graph reads."""
    driver = Driver(replace(BASE, mtp=3))
    for slot in range(4):
        request = driver.open(stream(slot, 200), slot=slot)
        driver.prefill(Part(request=request, count=190))
    builder = decode_builder(driver)
    for widths in ((1, 1, 1, 1), (1, 4, 2), (2,), (4, 4, 4, 4)):
        homes: list[dict[str, int]] = []
        for position in (190, 57):
            rows = [
                DecodeRows(slot=s, position=position, tokens=[1] * n) for s, n in enumerate(widths)
            ]
            batch = builder.build(rows, padded=PaddedShape(len(widths) + 1, 8))
            homes.append({name: t.data_ptr() for name, t in batch_tensors(batch)})
            assert all(t.is_contiguous() for _, t in batch_tensors(batch))
        assert homes[0] == homes[1]
        width = max(widths)
        assert batch.num_rows == (len(widths) + 1) * width
        padded = [i * width + j for i, n in enumerate((*widths, 0)) for j in range(n, width)]
        assert (batch.window_dest[padded] == -1).all()
        assert (batch.window_slots[padded] == -1).all()
        assert all((n[padded] == 0).all() for n in batch.num_entries.values())
        for group in batch.groups.values():
            assert (group.state_base[padded] == -1).all()
            assert (group.main_slots[padded] == -1).all()
        assert batch.block_table.shape == (len(widths) + 1, 8)
        assert (batch.block_table[-1] == -1).all()


def batch_tensors(batch: DecodeBatch) -> list[tuple[str, Tensor]]:
    """Every tensor of a decode batch, named."""
    found = [(f.name, getattr(batch, f.name)) for f in fields(batch)]
    plain = [(name, t) for name, t in found if isinstance(t, Tensor)]
    for ratio, group in batch.groups.items():
        plain.append((f"num_entries_{ratio}", batch.num_entries[ratio]))
        for f in fields(group):
            value = getattr(group, f.name)
            if isinstance(value, Tensor) and value.numel():
                plain.append((f"{f.name}_{ratio}", value))
    return plain


def test_each_norm_is_applied_once_vllm_42810(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count norms by their weight in a prefill and in a decode step: each one once per layer."""
    driver = Driver(replace(BASE, load_mtp=True))
    calls: dict[int, int] = {}

    def counted(fn: Any) -> Any:
        def wrapper(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls[weight.data_ptr()] = calls.get(weight.data_ptr(), 0) + 1
            result: Tensor = fn(x, weight, *args, **kwargs)
            return result

        return wrapper

    for module in (projection, model, mtp):
        monkeypatch.setattr(module, "rms_norm", counted(module.rms_norm))  # type: ignore[attr-defined]
    monkeypatch.setattr(attention, "kv_insert", counted(attention.kv_insert))
    fused = attention.qkv_norm_rope

    def qkv_norm_rope(q: Tensor, kv: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        return counted(lambda *_: fused(q, kv, weight, *args, **kwargs))(kv, weight)

    monkeypatch.setattr(attention, "qkv_norm_rope", qkv_norm_rope)
    net = driver.worker._model
    assert net is not None
    assert net.mtp is not None
    names = {}
    for number, layer in enumerate([*net.blocks, net.mtp.block]):
        names[layer.hc_attn.norm.data_ptr()] = f"{number}.attn_norm"
        names[layer.hc_ffn.norm.data_ptr()] = f"{number}.ffn_norm"
        names[layer.attn.q_norm.data_ptr()] = f"{number}.q_norm"
        names[layer.attn.kv_norm.data_ptr()] = f"{number}.kv_norm"
    names |= {net.norm.data_ptr(): "norm", net.mtp.norm.data_ptr(): "mtp.norm"}
    names |= {net.mtp.enorm.data_ptr(): "enorm", net.mtp.hnorm.data_ptr(): "hnorm"}
    assert len(names) == 4 * 5 + 4
    request = driver.open(stream(0, 140), slot=0)
    driver.prefill(Part(request=request, count=130, mtp_logits=True))
    # Keeping the MTP window is a second, smaller pass through its input norms and up to its kv.
    again = {"enorm", "hnorm", "4.attn_norm", "4.kv_norm"}
    assert {names[p]: n for p, n in calls.items()} == {
        name: 2 if name in again else 1 for name in names.values()
    }
    calls.clear()
    driver.decode(Row(request=request, forced=3, logits=True, mtp_logits=True))
    assert {names[p]: n for p, n in calls.items()} == dict.fromkeys(names.values(), 1)
