"""What racecheck reports although it is ordered: a list with the reasons, and who tells it from the rest.

racecheck follows ``mbarrier``s that every thread concerned arrives at, ``__syncthreads`` and
``__syncwarp``. It does not follow a named barrier that some warps only arrive at (``bar.arrive``), nor
one lane that arrives for its warp, nor words that carry their tag. Where such an order costs nothing in
a form that the tool follows, the kernel has that form; the others are here.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

_SOURCES = Path(__file__).resolve().parents[1] / "kernels"
_MARK = "========="
_ACCESS = r"\w+ access at .+\+0x[0-9a-f]+ in (?P<file>[^\s/]+):(?P<line>\d+)"
_FIRST = re.compile(rf"{_MARK} \w+: Race reported between {_ACCESS}\s*$")
_SECOND = re.compile(rf"{_MARK}     and {_ACCESS} \[\d+ hazards\]\s*$")
_SUMMARY = re.compile(rf"{_MARK} (RACECHECK|ERROR) SUMMARY: (\d+) (hazard|error)")
_HARMLESS = re.compile(rf"{_MARK}( COMPUTE-SANITIZER)?\s*$")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a source, by part of its text: line numbers move.

    Args:
        file: its name.
        text: what the line holds.
        callers: files that the tool may name instead, with this line's number, where it is inlined.
    """

    file: str
    text: str
    callers: tuple[str, ...] = ()

    def is_at(self, file: str, number: int) -> bool:
        """Whether line ``number`` of ``file``, as the tool names them, is the one.

        It may also be one of the next two: the tool names any line of a statement.
        """
        return file in (self.file, *self.callers) and any(
            self.text in "".join(lines[max(number - 3, 0) : number])
            for lines in _sources(self.file)
        )


@dataclass(frozen=True, slots=True)
class Known:
    """Accesses at ``one`` and at ``others``, in either order, and what orders them."""

    one: Line
    others: tuple[Line, ...]
    why: str


@dataclass(slots=True)
class Reports:
    """Reads the tool's output, line by line.

    Attributes:
        known: how often each entry of ``KNOWN`` was met.
        new: findings that are in no entry, and all that is not understood.
        complete: the tool has come to its end, and every report in its summary was read.
    """

    known: Counter[Known] = field(default_factory=Counter)
    new: list[str] = field(default_factory=list)
    complete: bool = False
    _first: re.Match[str] | None = None
    _read: int = 0

    def read(self, line: str) -> bool:
        """Whether the line is for people: not the tool's, or a finding."""
        if not line.startswith(_MARK):
            return True
        if first := _FIRST.match(line):
            self._first, self._read = first, self._read + 1
            return False
        if summary := _SUMMARY.match(line):
            self.complete = int(summary[2]) == self._read
            return True
        second = _SECOND.match(line)
        if second and self._first:
            entry = find(self._first, second)
            if entry is not None:
                self.known[entry] += 1
                return False
            self.new.append(f"{self._first.string.rstrip()}\n{line.rstrip()}")
        elif not _HARMLESS.match(line):
            self.new.append(line.rstrip())
        else:
            return False
        return True


def find(first: re.Match[str], second: re.Match[str]) -> Known | None:
    """The entry of two accesses."""
    places = [(m["file"], int(m["line"])) for m in (first, second)]
    for entry in KNOWN:
        for a, b in (places, places[::-1]):
            if entry.one.is_at(*a) and any(other.is_at(*b) for other in entry.others):
                return entry
    return None


@functools.cache
def _sources(name: str) -> list[list[str]]:
    return [path.read_text().splitlines() for path in sorted(_SOURCES.rglob(name))]


_LISTED = Line("decode_read.cuh", "table.scales[key] = scales;")
_PLACE = Line("decode_read.cuh", "Place place = table.places[key];")
_OWN_PLACE = Line("decode_wide.cuh", "send(s.table.places[own_key]);")
_PLACES = Line("decode_read.cuh", "places[at] = place;")
_ENTRIES = (
    Line("decode_read.cuh", "entry[r] = entries[r];"),
    Line("decode_read.cuh", "rest = entries[lane / 4];"),
)
_FIRST_BASE = Line("decode_wide.cuh", "s.lines[kPart].base[line + 8 * i] = base[i];")
_SCALES = Line("decode_read.cuh", "reinterpret_cast<const uint4*>(scales)[i]")
_PAIR = Line("decode_read.cuh", "reinterpret_cast<const uint16_t*>(scales)[lane]")
_TOTALS = (
    Line("hc_mixers.cuh", "float4 sum = fours[0];"),
    Line("hc_mixers.cuh", "const float4 more = fours[other * "),
)
_FOR_ITS_WARP = (
    "after a __syncwarp one lane arrives for its warp, at `p_full` when it has written and at `p_empty`"
    " when it has read, where all who read, or write the next, wait"
)
_SUMMED = (
    "who adds up waits at a named barrier where the mixing warps arrive; who writes the next sums there"
    " waits at `sent`, where those who added up arrive"
)

KNOWN: tuple[Known, ...] = (
    Known(
        Line("pair_tiles.cuh", "ld.shared.v2.f32", ("pair.cuh", "group.cuh")),
        (Line("hopper.cuh", "st.shared.b32 [%0], %1;"),),
        "all lanes of a warp read a stage's scales in one instruction; behind the next wgmma.wait_group,"
        " which is the whole warp's, a lane arrives at `empty`, which the warp that writes the next"
        " scales waits for (every lane arriving: 1 % slower)",
    ),
    Known(
        _LISTED,
        (_SCALES, _PAIR),
        "a warp that lists keys writes their scales; after a __syncwarp one lane of eight arrives at"
        " `listed`, which the warp that decodes those eight waits for",
    ),
    Known(
        Line("decode_wide.cuh", "s.table.places[threadIdx.x - 128] = place;"),
        (_SCALES, _PAIR, _PLACE, _OWN_PLACE),
        "the next item's places take the room of this one's scales behind kReady + 1, where every warp"
        " has arrived after it decoded its keys; a __syncthreads that warps reach from two places lies"
        " between these and who reads them",
    ),
    Known(
        _PLACES,
        (_PLACE,),
        "pages without FP8, narrow kernel: every warp has read this item's places ahead of a"
        " __syncthreads, behind which the next item's are written; another one, which warps reach from"
        " two places, lies between these and who reads them",
    ),
    Known(
        Line("decode_wide.cuh", "s.lines[kPart].total[line + 8 * i] = total;"),
        (Line("decode_wide.cuh", "total = s.lines[0].total[line];"),),
        "the first part's sums are told at kSums, where those who make them only arrive; they make the"
        " next item's behind kScored, where those who have read these arrive",
    ),
    Known(
        _OWN_PLACE,
        (Line("decode_read.cuh", "if (kPlain) table.places[key] = place;"),),
        "the warp that lists writes back the place that it has read; the other warps of its warpgroup"
        " read the place too, and do nothing with it",
    ),
    Known(
        _FIRST_BASE,
        (
            Line("decode_wide.cuh", "base[i] = next_base(s.lines[0].base[line + 8 * i], base[i]);"),
            *_ENTRIES,
        ),
        "the first warpgroup arrives at kBase when it has written, the last one waits there; entries"
        " have been sent for by every warp that arrives at kDecoded, which comes before",
    ),
    Known(
        Line("decode_wide.cuh", "s.lines[kPart].total[line + 8 * i] = total;"),
        _ENTRIES,
        "the sum takes the place of entries that every warp has sent for before it arrives at kDecoded",
    ),
    Known(
        Line("decode_wide.cuh", "if (lane == 0) s.next[0] = it;"),
        (Line("decode_wide.cuh", "if (!lists) it = s.next[parity];"),),
        "every warp that lists writes the same value; one of the reader's warpgroup has written it before"
        " both are at kListed",
    ),
    Known(
        Line("hc_mixers.cuh", "if (quad == 0) to[kTile * "),
        _TOTALS,
        _SUMMED,
    ),
    Known(
        Line("hc_mixers.cuh", "*reinterpret_cast<float2*>(to + ("),
        _TOTALS,
        _SUMMED,
    ),
    Known(
        Line("hc_columns.cuh", "to[half] = weight;"),
        (Line("hc_columns.cuh", "weight[2] = {norm_weight["),),
        "a lane reads what it wrote itself; the other column warps write the same values there",
    ),
    Known(
        Line("hopper.cuh", "mbarrier.init.shared::cta.b64"),
        (Line("hc_factors.cuh", "mbarrier.arrive.expect_tx"),),
        "the lane that sets a barrier up is the one that tells it its bytes; those of three other warps"
        " lie beside it, and all wait behind a __syncthreads",
    ),
    Known(
        Line("prefill_scores.cuh", "s.shrink[step & 1][line + 8 * i] = shrink;"),
        (Line("prefill_values.cuh", "float shrink[2] = {s.shrink["),),
        _FOR_ITS_WARP,
    ),
    Known(
        Line("prefill_scores.cuh", "s.state[step & 1][thread / 32] = (uint8_t)state;"),
        (Line("prefill_values.cuh", "state = s.state[step & 1][warp];"),),
        _FOR_ITS_WARP,
    ),
    Known(
        Line("prefill_values.cuh", "float factor[2] = {s.factor[line]"),
        (
            Line("prefill_scores.cuh", "s.factor[line + 8 * i] = empty_row"),
            Line("prefill_scores.cuh", "s.factor[line + 8 * i] = 0.0f;"),
        ),
        "as the probabilities, but written ones are told at `factor_full`",
    ),
    Known(
        Line("prefill_scores.cuh", "int count = s.num_tiles[slot.at];"),
        (Line("prefill_load.cuh", "s.num_tiles[slot.at] = count;"),),
        "after a __syncwarp one lane of each warp that has read it arrives at `empty`, where the lane"
        " that writes the next waits",
    ),
    Known(
        Line("prefill_scores.cuh", "reinterpret_cast<const uint2*>(s.mask[slot.at])"),
        (
            Line("prefill_load.cuh", "s.mask[slot.at][warp] = (uint8_t)mask;"),
            Line("prefill_load.cuh", "s.mask[slot.at][4 + warp] = (uint8_t)(mask >> 8);"),
        ),
        "who has read the mask writes probabilities, a lane of each warp arrives at `p_full`, who waits"
        " there multiplies, and a lane of each of those warps arrives at `empty`, where the next mask"
        " waits",
    ),
    Known(
        Line("prefill_scores.cuh", "ldmatrix.sync.aligned.m8n8.x4.shared.b16"),
        (Line("hopper.cuh", "cp.async.cg.shared.global.L2::128B"),),
        "the queries' place becomes that of keys: after a __syncwarp one lane of each warp that has"
        " read them arrives at `empty`, where every thread that copies waits",
    ),
)
