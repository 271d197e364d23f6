"""Which stretches of a run to replay: the ones a forger would choose, and random ones nobody could foresee."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from openelm.optim.schedule import ScheduleConfig, warmup_steps
from openelm.release.ground import Ground
from openelm.release.publication import Objection, Publication
from openelm.train.checkpoint import load_checkpoint
from openelm.train.objectives import NextToken
from openelm.train.update import Updater


@dataclass(frozen=True)
class Segment:
    """The updates `start + 1` to `end`, from one state that is there to the next."""

    start: int
    """0: the weights that the seed stands for; otherwise the step of a checkpoint."""
    end: int
    reasons: tuple[str, ...] = ()
    """Why it is replayed."""

    def holds(self, update: int) -> bool:
        return self.start < update <= self.end


def all_segments(publication: Publication) -> list[Segment]:
    """Cut the run at every checkpoint that is there; a tail without one is a segment too."""
    ends = sorted({*publication.checkpoints, *([max(publication.updates)] if publication.updates else [])})
    return [Segment(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def choose_segments(publication: Publication, ground: Ground, count: int, seed: int) -> list[Segment]:
    """Choose the mandatory segments and `count` random others; each says why.

    Mandatory are the first, the last, every one with a start, rewind, skip, spike or boundary of the schedule, and
    the one with the largest change of the weights.
    """
    segments = all_segments(publication)
    reasons: dict[Segment, list[str]] = {segment: [] for segment in segments}
    if not segments:
        return []
    reasons[segments[0]].append("first")
    reasons[segments[-1]].append("last")
    for update, reason in _turns(publication):
        for segment in segments:
            if segment.holds(update) and reason not in reasons[segment]:
                reasons[segment].append(reason)
    reasons[_largest_change(publication, ground, segments)].append("largest change of the weights")
    others = [segment for segment in segments if not reasons[segment]]
    for segment in random.Random(seed).sample(others, min(count, len(others))):
        reasons[segment].append("random")
    return [replace(segment, reasons=tuple(found)) for segment, found in reasons.items() if found]


def _turns(publication: Publication) -> Iterator[tuple[int, str]]:
    """Yield the updates at which something other than plain training happened."""
    for line in publication.lines:
        if line.event in ("start", "resume"):
            yield line.step + 1, line.event
        elif line.event == "rewind":
            yield line.raw["to"] + 1, "rewind"
    for found in publication.updates.values():
        for line in found:
            if isinstance(line, Objection):
                yield line.step, line.event
    settings = publication.config
    for boundary in schedule_boundaries(settings.schedule, settings.train.steps):
        yield boundary, "learning-rate schedule"
        yield boundary + 1, "learning-rate schedule"


def schedule_boundaries(schedule: ScheduleConfig, steps: int) -> list[int]:
    """Return the last updates before the learning rate takes another course: the end of warm-up, the decay's start."""
    warmup = warmup_steps(schedule, steps)
    boundaries = [warmup] if warmup else []
    if schedule.shape == "warmup-stable-decay":
        boundaries.append(steps - max(1, round(steps * schedule.decay_fraction)) + 1)
    return boundaries


def _largest_change(publication: Publication, ground: Ground, segments: list[Segment]) -> Segment:
    before: Mapping[str, Tensor] = Updater(ground.run, NextToken()).weights()
    largest, chosen = -1.0, segments[0]
    for segment in segments:
        if segment.end not in publication.checkpoints:
            continue
        after = load_checkpoint(publication.folder, segment.end).weights
        change = sum(float((after[name].double() - before[name].double()).square().sum()) for name in before) ** 0.5
        if not change <= largest:
            largest, chosen = change, segment
        before = after
    return chosen
