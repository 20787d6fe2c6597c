"""Convert all steps of a run, one after another: ``convert --all-steps`` and ``--watch``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from select import select
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from ckptx.cli.options import show_report
from ckptx.conversion.options import option, switch
from ckptx.conversion.request import ConversionRequest
from ckptx.errors import CkptxError, CutShortError, PlanError, first_few
from ckptx.processes.interrupts import Interrupted, Interrupts
from ckptx.registry import runs
from ckptx.registry.runs import Signature, Step
from ckptx.text.shown import printable

if TYPE_CHECKING:
    from ckptx.conversion.report import Report

CONVERTED, PASSED, FAILED = "converted", "passed over", "failed"
SECONDS = 30.0
"""Between two looks at a run, where no other number is asked for."""
Convert: TypeAlias = "Callable[[ConversionRequest], tuple[Report, str]]"
"""Converts one step; says what is wrong with the target, empty if nothing is."""
Check: TypeAlias = Callable[[ConversionRequest, Path], str]
"""Says what is wrong with a target that was converted before."""
Wait: TypeAlias = Callable[[float], None]
"""Lets so many seconds pass; raises `Interrupted` if a signal comes."""


def run_options() -> list[click.Option]:
    """Return the options that make a source a run of several steps."""
    steps = (
        "SRC is a run: convert each of its steps (iter_N, global_stepN, checkpoint-N) to its own "
        "target in DST. What was converted before is passed over."
    )
    watch = f"Go on with steps as they appear, once they are whole; look every {SECONDS:.0f} s."
    seconds = click.FloatRange(0, min_open=True)
    more = {"is_flag": False, "flag_value": str(SECONDS), "metavar": "[SECONDS]"}
    return [switch("--all-steps", steps), option("--watch", seconds, watch, **more)]


def are_meant(args: Sequence[str]) -> bool:
    """Return whether words of a command line make the source a run, well spelled or not."""
    return any(arg.partition("=")[0] in ("--all-steps", "--watch") for arg in args)


def is_run(params: Mapping[str, Any]) -> bool:
    """Return whether the options make the source a run."""
    return bool(params.get("all_steps")) or params.get("watch") is not None


def example(run: Path, params: Mapping[str, Any]) -> Path:
    """Return a step of a run, which tells the format of all.

    Raises:
        PlanError: there is none.
    """
    if not runs.steps(run) and params["watch"] is not None:
        raise PlanError(f"{run}: holds no step yet; name their format with --from, to wait for it")
    return runs.first_step(run).path


class Runs:
    """The steps of one run, and what has become of each."""

    def __init__(
        self, job: ConversionRequest, params: Mapping[str, Any], convert: Convert, check: Check
    ) -> None:
        self.job, self.params = job, params
        self.convert, self.check = convert, check
        self.wait: Wait = lambda seconds: None
        self.outcomes: dict[Step, str] = {}
        if job.saver_options.get("iteration") is not None:
            raise click.UsageError("--iteration names one step; all steps keep their own numbers")

    def request(self, step: Step) -> ConversionRequest:
        """Return the request of one step: in a root of iterations, or in a directory of its own."""
        target, options = self.job.target / step.name, self.job.saver_options
        earlier = None
        if "iteration" in options:
            options = {**options, "iteration": step.iteration}
            target = self.job.target if options.get("iteration_directory", True) else target
            earlier = tuple(one.iteration for one in sorted(self.outcomes) if one < step)
        return replace(
            self.job, source=step.path, target=target, saver_options=options, earlier=earlier
        )

    def take(self, step: Step) -> bool:
        """Convert a step, unless that was done; return whether another try may go better."""
        from ckptx.verification.converted import converted_before

        request, report, target, again = self.request(step), None, None, False
        try:
            if reason := runs.later_than_named(self.job.source, step):
                raise CkptxError(reason)
            if target := converted_before(request):
                error = self.check(request, target)
            else:
                self.wait(0)  # a signal may have come
                report, error = self.convert(request)
        except (CkptxError, OSError) as failure:
            error = " ".join(str(failure).split())
            again = isinstance(failure, CutShortError | OSError)
        outcome = FAILED if error else CONVERTED if report else PASSED
        self.outcomes[step] = outcome
        place = report.target if report else str(target or request.target)
        self._say({"step": step.name, "outcome": outcome, "target": place, "error": error}, report)
        return again

    def _say(self, said: Mapping[str, str], report: Report | None) -> None:
        """Print what became of a step: a line of JSON, or text."""
        name = printable(said["step"])
        if self.params["as_json"]:
            click.echo(json.dumps({**said, "report": report.to_json() if report else None}))
        elif report and not self.params["quiet"]:
            click.echo(f"{name}:")
            show_report(report, False, False)
            click.echo()
        elif said["outcome"] == PASSED and not self.params["quiet"]:
            click.echo(f"{name}: passed over, was converted before to {printable(said['target'])}")
        if said["error"]:
            click.echo(f"error: {name}: {printable(said['error'])}", err=True)

    def all(self) -> None:
        """Convert every step that is there."""
        runs.first_step(self.job.source)
        for step in runs.steps(self.job.source):
            self.wait(0)
            self.take(step)

    def watch(self, seconds: float) -> None:
        """Convert every step once it is whole and stays as it is from one look to the next.

        One that fails is tried again when its files have changed, or if it was cut short, as by a
        full disk.
        """
        before: dict[Step, Signature] = {}
        tried: dict[Step, Signature] = {}
        while True:
            now: dict[Step, Signature] = {}
            for step in runs.steps(self.job.source):
                if self.outcomes.get(step) in (CONVERTED, PASSED):
                    continue
                now[step] = runs.signature(step)
                still = runs.still_written(self.job.source, step)
                ready = not still and now[step] == before.get(step) != tried.get(step)
                if ready and not self.take(step):
                    tried[step] = now[step]
            before = now
            self.wait(seconds)

    def summary(self) -> str:
        """Return in one line what has become of all steps."""
        counts = Counter(self.outcomes.values())
        failed = sorted(step for step, outcome in self.outcomes.items() if outcome == FAILED)
        named = f" ({first_few([step.name for step in failed], 5)})" if failed else ""
        said = (f"{counts[one]} {one}" for one in (CONVERTED, PASSED, FAILED) if counts[one])
        count = len(self.outcomes)
        return f"{count} step{'s' * (count != 1)}: {', '.join(said) or 'none was whole'}{named}"


def convert_all(all_of: Runs) -> None:
    """Convert all steps of a run, or watch it until a signal comes.

    Raises:
        Exit: a step has failed.
        Interrupted: a signal came.
    """
    params = all_of.params
    with Interrupts() as interrupts:
        all_of.wait = partial(_wait, interrupts)
        try:
            if params["watch"] is None:
                all_of.all()
            else:
                all_of.watch(params["watch"])
        except Interrupted as error:
            if str(error) != str(Interrupted(error.signum)):  # what a conversion has left
                raise
            raise Interrupted(error.signum, all_of.summary()) from error
    if not (params["as_json"] or params["quiet"]):
        click.echo(printable(all_of.summary()))
    if FAILED in all_of.outcomes.values():
        raise click.exceptions.Exit(1)


def _wait(interrupts: Interrupts, seconds: float) -> None:
    """Wait for a signal, so many seconds.

    Raises:
        Interrupted: one came.
    """
    select([interrupts.fileno()], [], [], seconds)
    interrupts.check()
