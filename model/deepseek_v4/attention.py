"""V4 attention: sliding window in every layer, plus compressed entries (CSA, HCA).

Prefill runs context-parallel (local rows, tp head slice); decode runs tensor-parallel (all rows, world
head slice where sizes divide). Letters: T rows, H heads of the slice, d head_dim, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import (
    RowCopy,
    WindowRing,
    WindowRows,
    beside,
    copy_rows,
    kv_insert,
    load_entries,
    merge_lse,
    prepare_weight,
    q_norm_rope,
    qkv_norm_rope,
    sparse_attention,
    stack_weights,
    store_entries,
)
from model.deepseek_v4.attention_output import AttentionOutput
from model.deepseek_v4.entries import CompressedEntries
from model.deepseek_v4.projection import Activations, Projector
from model.parallel.context import exchange_streams, row_stream

if TYPE_CHECKING:
    from kernels import EntryPages, Numerics, PreparedWeight, RowStream
    from model.cache_spec import LayerCache
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config
    from model.forward_batch import DecodeBatch, PrefillBatch, WindowPlan
    from model.parallel.config import ParallelConfig
    from model.parallel.mesh import ParallelMesh


class Attention:
    """One layer's attention on one rank.

    Args:
        config, parallel, numerics: the model, the mesh's choices and the arithmetic.
        weights: this rank's slices.
        prefix: checkpoint prefix, e.g. ``layers.3``.
        ratio: 0 (window only), 4 (CSA) or 128 (HCA).
        mesh: live groups.
    """

    def __init__(
        self,
        config: DeepSeekV4Config,
        parallel: ParallelConfig,
        numerics: Numerics,
        weights: WeightDict,
        prefix: str,
        ratio: int,
        mesh: ParallelMesh,
    ) -> None:
        self.config, self.mesh = config, mesh
        self.eps, self.projector = config.rms_norm_eps, Projector(numerics)
        self.sharded = parallel.kv_shard == "cp" and mesh.cp.size > 1 and ratio != 0
        self.view = mesh.decode_view(config.num_attention_heads, config.o_groups)
        attn = f"{prefix}.attn"
        d = config.head_dim
        self.wq_a_wkv = stack_weights(
            [weights.block(f"{attn}.{name}.weight") for name in ("wq_a", "wkv")]
        )
        self.q_norm = weights.tensor(f"{attn}.q_norm.weight")
        self.wq_b = prepare_weight(weights.block(f"{attn}.wq_b.weight"))
        self.kv_norm = weights.tensor(f"{attn}.kv_norm.weight")
        self.attn_sink = weights.tensor(f"{attn}.attn_sink")
        self.inv_freq = torch.tensor(
            config.inv_freq(ratio), dtype=torch.float32, device=self.attn_sink.device
        )
        self.output = AttentionOutput(config, weights, attn, self.inv_freq, mesh, self.projector)
        lo, hi = self.view.heads
        self.decode_wq_b = self.wq_b.rows(lo * d, hi * d)
        self.decode_sink = self.attn_sink[lo:hi]
        self.entries: CompressedEntries | None = None
        if ratio:
            self.entries = CompressedEntries(
                config, parallel, numerics, weights, attn, ratio, self.inv_freq, mesh
            )

    def prefill(self, x: Activations, batch: PrefillBatch, cache: LayerCache) -> Tensor:
        """x: attn-normed local rows [T, D] -> [T, D]; stores window, state and entries on the way."""
        qr, kv = self._latents(x)
        q = q_norm_rope(self._heads(qr, self.wq_b), batch.positions, self.inv_freq, self.eps)
        # Window rows and compressor rows travel together.
        streams = [self._window_stream(kv, batch.positions, batch.window, cache)]
        rows = None
        if self.entries is not None:
            rows = self.entries.rows(x, batch)
            streams.append(self.entries.stream(rows, batch, cache))
        buffer, *more = exchange_streams(self.mesh.cp, tuple(streams))
        states = self.entries.kept(more[0], batch, cache) if self.entries is not None else []
        window = self._keep_window(buffer, batch.window, cache, states)
        entries = None
        if self.entries is not None and rows is not None:
            entries = self.entries.prefill(rows, more[0], qr, batch, cache)
        o, _ = sparse_attention(
            q, window, entries, sink=self.attn_sink, scale=self.config.softmax_scale
        )
        return self.output.prefill(o, batch.positions)

    def decode(self, x: Activations, batch: DecodeBatch, cache: LayerCache) -> Tensor:
        """x: attn-normed rows of all requests [T, D] -> [T, D], the same on every rank."""
        inserted = None
        if (layer := self.entries) is not None:
            # The compressors need no query: their chain runs beside that of the queries.
            inserted = beside(batch.positions.device, lambda: layer.insert(x, batch, cache))
        qr, kv = self._latents(x)
        q = self._heads(qr, self.decode_wq_b)
        index_q = layer.index_heads(qr) if layer else None
        q, _, index_q = qkv_norm_rope(
            q,
            kv,
            self.kv_norm,
            batch.positions,
            self.inv_freq,
            self.eps,
            cache.window,
            cache.window_layout,
            batch.window_dest,
            quantize=self.projector.quantize,
            index_q=index_q,
        )
        window = WindowRing(pool=cache.window, layout=cache.window_layout, slots=batch.window_slots)
        entries = None
        if layer is not None and inserted is not None:
            entries = layer.attended(inserted(), index_q, batch, cache)
        scale = self.config.softmax_scale
        if self.sharded and entries is not None:
            o = self._merge_shards(q, window, entries, scale)
        else:
            o, _ = sparse_attention(q, window, entries, sink=self.decode_sink, scale=scale)
        return self.output.decode(o, batch.positions)

    def store_window(
        self, x: Activations, positions: Tensor, plan: WindowPlan, cache: LayerCache
    ) -> None:
        """Only keep the window latents of these rows."""
        _, kv = self.wq_a_wkv.split(self.projector.product(x, self.wq_a_wkv.weight))
        stream = self._window_stream(kv, positions, plan, cache)
        (buffer,) = exchange_streams(self.mesh.cp, (stream,))
        self._keep_window(buffer, plan, cache, [])

    def _latents(self, x: Activations) -> tuple[Activations, Tensor]:
        """Normed query latents, and KV latents as the product gives them (a view)."""
        qr, kv = self.wq_a_wkv.split(self.projector.product(x, self.wq_a_wkv.weight))
        return self.projector.norm(qr, self.q_norm, self.eps), kv

    def _heads(self, qr: Activations, wq_b: PreparedWeight) -> Tensor:
        q = self.projector.product(qr, wq_b)
        d = self.config.head_dim
        return q.view(q.shape[0], q.shape[1] // d, d)

    def _window_stream(
        self, kv: Tensor, positions: Tensor, plan: WindowPlan, cache: LayerCache
    ) -> RowStream:
        """Finished local latents, and how they travel between the cp ranks."""
        # Through the cache format at once: a row read back from the ring equals the row just made.
        # Nothing is stored here: which rows the ring keeps is the plan's choice.
        kv = kv_insert(
            kv,
            self.kv_norm,
            positions,
            self.inv_freq,
            self.eps,
            cache.window,
            cache.window_layout,
            plan.nowhere,
            quantize=self.projector.quantize,
        )
        carried = load_entries(cache.window, cache.window_layout, plan.rows.carried, kv.dtype)
        return row_stream(kv, plan.rows, carried, None)

    @staticmethod
    def _keep_window(
        buffer: Tensor, plan: WindowPlan, cache: LayerCache, states: list[RowCopy]
    ) -> WindowRows:
        """Store ring and tails out of the exchanged rows; returns what queries may see.

        ``states`` are copies of other rows, made at the same time.
        """
        rows = plan.rows
        ring, tails, seen = (
            RowCopy(
                source=buffer,
                source_index=index,
                target=buffer.new_empty(index.shape[0], buffer.shape[1]),
            )
            for index in (rows.state_source, rows.tail_source, plan.workspace)
        )
        copy_rows((ring, tails, seen, *states))
        store_entries(cache.window, cache.window_layout, rows.state_dest, ring.target)
        store_entries(cache.tail_window, cache.tail_layout, rows.tail_dest, tails.target)
        return WindowRows(kv=seen.target, start=plan.start, length=plan.length)

    def _merge_shards(
        self, q: Tensor, window: WindowRing, entries: EntryPages, scale: float
    ) -> Tensor:
        """Attend to the entries this rank owns for all heads of the cp group; merge by lse.

        The window is on every rank, so each adds it for its own heads; the sink is added once, in the
        merge.
        """
        cp, (rows, heads, d) = self.mesh.cp, q.shape
        own, own_lse = sparse_attention(q, window, None, sink=None, scale=scale)
        if self.view.over_world:
            everyone = cp.all_gather(q).view(cp.size, rows, heads, d)
            q_all = everyone.transpose(0, 1).reshape(rows, cp.size * heads, d)
            o, lse = sparse_attention(q_all, None, entries, sink=None, scale=scale)
            counts = [rows] * cp.size
            by_rank = o.view(rows, cp.size, heads, d).transpose(0, 1).reshape(-1, heads, d)
            lse_by_rank = lse.view(rows, cp.size, heads).transpose(0, 1).reshape(-1, heads)
            parts = cp.all_to_all_v(by_rank, counts, counts)
            lses = cp.all_to_all_v(lse_by_rank, counts, counts)
        else:
            o, lse = sparse_attention(q, None, entries, sink=None, scale=scale)
            parts, lses = cp.all_gather(o), cp.all_gather(lse)
        parts = torch.cat([own[None], parts.view(cp.size, rows, heads, d)])
        lses = torch.cat([own_lse[None], lses.view(cp.size, rows, heads)])
        merged, _ = merge_lse(parts, lses, self.decode_sink)
        return merged
