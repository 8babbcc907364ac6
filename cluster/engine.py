"""The engine: takes requests, drives the ranks step by step, gives back text.

Knows the scheduler, the tokenizer and an executor; nothing of Ray, torch or HTTP. One thread.
A failed step costs the requests that ran in it an error; those waiting are served after the ranks
have been rebuilt. Every accepted request ends in exactly one event with a ``finish_reason``.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster.detokenizer import Detokenizer
from cluster.errors import EngineDead, RequestError, WorkerFailure
from cluster.events import RequestEvent, ScoreRequest, ScoreRows
from cluster.executor import Executor, Report
from cluster.intake import Intake, Prompt
from cluster.limits import SchedulerLimits
from cluster.live_request import LiveRequest
from cluster.mailbox import Mailbox
from cluster.params import GenerationParams
from cluster.scheduler import Scheduler
from cluster.sequence import FinishReason, Request, Sequence
from cluster.stats import EngineStats
from cluster.step_result import SequenceUpdate
from cluster.tokenizer import Tokenizer
from worker.config import WorkerConfig
from worker.protocol import CacheInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine needs besides the ranks' own configuration."""

    worker: WorkerConfig
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    max_rebuilds: int = 3  # within rebuild_window_s; one more failure ends the engine
    rebuild_window_s: float = 600.0
    seed: int | None = None  # of the seeds for requests that bring none; None: a random one


class LLMEngine:
    """Serves requests on one world of ranks."""

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        tokenizer: Tokenizer | None = None,
        *,
        report: Report = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.stats = EngineStats()
        self.dead: EngineDead | None = None
        self.last_failure: WorkerFailure | None = None
        self._executor = executor
        self._report = report
        self._clock = clock
        self._scheduler: Scheduler | None = None
        self._live: dict[int, LiveRequest] = {}
        self._next_id = 0
        self._intake = Intake(
            vocab_size=config.vocab_size,
            eos_token_ids=frozenset(config.eos_token_ids),
            seed=secrets.randbits(63) if config.seed is None else config.seed,
            tokenizer=tokenizer,
        )
        self._failures: deque[float] = deque()  # times within the rebuild window
        self._rebuild_due = False
        self._mailbox = Mailbox(self._advance, self.abort)

    def start(self) -> CacheInfo:
        """Start the ranks; what they allocated. WorkerFailure if they do not come up."""
        if self._scheduler is not None:
            raise RuntimeError("the engine has been started already")
        info = self._executor.start(self._report)
        self._scheduler = Scheduler(self._limits(info))
        return info

    def shutdown(self) -> list[RequestEvent]:
        """End the ranks; the last events (abort) of requests that were still being served."""
        for request_id in list(self._live):
            self.abort(request_id)
        self.dead = self.dead or EngineDead("the engine was shut down")
        self._rebuild_due = False
        self._executor.shutdown()
        return self._mailbox.take()

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, for its limits and counters."""
        if self._scheduler is None:
            raise RuntimeError("the engine has not been started")
        return self._scheduler

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do: requests, events to hand out, ranks to rebuild."""
        return bool(self._live or self._mailbox.has_news or self._rebuild_due)

    def _limits(self, info: CacheInfo) -> SchedulerLimits:
        return SchedulerLimits.build(self.config.worker, info, self.config.vocab_size)

    def _check_alive(self) -> None:
        if self.dead is not None:
            raise self.dead

    def add_request(self, prompt: Prompt, params: GenerationParams | None = None) -> int:
        """Queue a request and give it an id. RequestError if it cannot be served; EngineDead.

        Text is encoded after BOS, spelled control tokens as ordinary characters; ids are taken as
        they are (``tokenizer.encode_chat`` makes those of a conversation).
        """
        return self._add(prompt, params or GenerationParams(), index=0)

    def _add(self, prompt: Prompt, params: GenerationParams, index: int) -> int:
        self._check_alive()
        request = self._intake.generation(self._next_id, prompt, params, self.scheduler.limits)
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = self.tokenizer.detokenizer(
                params.stop, skip_special_tokens=params.skip_special_tokens
            )
        return self._accept(request, detokenizer, index)

    def _add_score(self, item: ScoreRequest, index: int) -> int:
        self._check_alive()
        request = self._intake.scoring(self._next_id, item, self.scheduler.limits)
        return self._accept(request, None, index)

    def _accept(self, request: Request, detokenizer: Detokenizer | None, index: int) -> int:
        seq = Sequence(request, arrival=self._clock())
        self.scheduler.add(seq)
        self._live[request.request_id] = LiveRequest(seq, detokenizer, index)
        self._next_id += 1
        return request.request_id

    def abort(self, request_id: int) -> bool:
        """End a request now; False if it has ended already or never was.

        Its blocks are free at once, its slot for the next step; its last event says ``abort``.
        """
        live = self._live.get(request_id)
        if live is None:
            return False
        self.scheduler.finish(live.seq, FinishReason.ABORT)
        self._emit(live)
        return True

    def generate(
        self,
        prompts: SequenceOf[Prompt],
        params: GenerationParams | SequenceOf[GenerationParams] | None = None,
    ) -> Iterator[RequestEvent]:
        """Serve ``prompts`` together; their events as they come, ``event.index`` tells whose.

        RequestError at once, and nothing is queued, if one of them is refused. Leaving the
        iterator early aborts what is left. Several iterators may be read in turn.
        """
        if params is None or isinstance(params, GenerationParams):
            params = [params or GenerationParams()] * len(prompts)
        return self._mailbox.submit(
            [
                partial(self._add, prompt, item, index)
                for index, (prompt, item) in enumerate(zip(prompts, params, strict=True))
            ]
        )

    def score(self, requests: SequenceOf[ScoreRequest]) -> Iterator[ScoreRows]:
        """Logit rows of ``requests``, teacher-forced, as they come; each request's in order.

        Works on token ids alone, reads no prefix cache and leaves nothing in it. RequestError at
        once if one is refused; WorkerFailure if a rank failed.
        """
        adders = [partial(self._add_score, item, index) for index, item in enumerate(requests)]
        return self._score_rows(self._mailbox.submit(adders))

    def _score_rows(self, events: Iterator[RequestEvent]) -> Iterator[ScoreRows]:
        for event in events:
            if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise self.last_failure or EngineDead(event.error or "the request was aborted")
            if event.score is not None:
                yield event.score

    def step(self) -> list[RequestEvent]:
        """Run one step and tell the news (but those of requests that an iterator reads).

        After a rank failed, the requests it cost are told at once and the next call rebuilds the
        ranks. EngineDead once that was necessary too often and all last events are handed out.
        """
        if self.dead is None or not self._mailbox.has_news:
            self._advance()
        return self._mailbox.take()

    def _advance(self) -> None:
        self._check_alive()
        if self._rebuild_due:
            self._rebuild()
            return
        plan = self.scheduler.schedule()
        if plan is None:
            return
        began = self._clock()
        for init in plan.inits:
            timings = self._live[init.request_id].seq.timings
            timings.scheduled = timings.scheduled or began
        try:
            output = self._executor.execute(plan)
            updates = self.scheduler.postprocess(output)
        except WorkerFailure as failure:
            self._fail(failure)
            return
        self.stats.add_step(plan, output, self._clock() - began)
        self.stats.prefix_queries = self.scheduler.prefix_counters.queries
        self.stats.prefix_hits = self.scheduler.prefix_counters.hits
        self.stats.num_preemptions = self.scheduler.num_preemptions
        for update in updates:
            self._tell(self._live[update.seq.request_id], update)

    def _tell(self, live: LiveRequest, update: SequenceUpdate) -> None:
        """Turn a sequence's update into an event."""
        seq = live.seq
        if seq.request.score is not None:
            self._emit(live, score=live.score_rows(update, self.config.vocab_size))
            return
        if not update.token_ids and not update.prompt_logprobs:
            return  # a chunk inside the prompt
        if update.token_ids and not seq.timings.first_token:
            seq.timings.first_token = self._clock()
        text, kept, stopped = live.decode(update.token_ids)
        if stopped:
            self.scheduler.finish(seq, FinishReason.STOP)
            del seq.token_ids[seq.num_tokens - (len(update.token_ids) - kept) :]
        self._emit(
            live,
            text=text,
            token_ids=update.token_ids[:kept],
            logprobs=update.logprobs[:kept],
            prompt_logprobs=update.prompt_logprobs,
        )

    def _emit(self, live: LiveRequest, **news: Any) -> None:
        """Hand the news to who reads the request; the last ones end it here too."""
        seq = live.seq
        if seq.is_finished and seq.finish_reason is not None:
            seq.timings.finished = self._clock()
            del self._live[seq.request_id]
            reason = seq.finish_reason.value
            self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
        self._mailbox.post(replace(live.event(), **news))

    def _fail(self, failure: WorkerFailure) -> None:
        """End what ran on the ranks; rebuild them next, or give up."""
        self.last_failure = failure
        now = self._clock()
        self._failures.append(now)
        while self._failures[0] < now - self.config.rebuild_window_s:
            self._failures.popleft()
        for seq in self.scheduler.drop_running():
            self._emit(self._live[seq.request_id], error=str(failure))
        self._rebuild_due = len(self._failures) <= self.config.max_rebuilds
        if not self._rebuild_due:
            self.dead = EngineDead(
                f"{len(self._failures)} failures in {self.config.rebuild_window_s:g} s, "
                f"{self.config.max_rebuilds} rebuilds allowed; the last: {failure}"
            )
            for live in list(self._live.values()):
                self.scheduler.finish(live.seq, FinishReason.ERROR)
                self._emit(live, error=str(self.dead))

    def _rebuild(self) -> None:
        try:
            info = self._executor.restart(self._report)
        except WorkerFailure as failure:
            self._fail(failure)
            return
        self._rebuild_due = False
        self.stats.num_rebuilds += 1
        self.scheduler.reset(self._limits(info))
        for live in list(self._live.values()):
            try:
                self.scheduler.placement.check_fits(live.seq.request.max_len)
            except RequestError as error:  # the new ranks hold less
                self.scheduler.finish(live.seq, FinishReason.ERROR)
                self._emit(live, error=str(error))
