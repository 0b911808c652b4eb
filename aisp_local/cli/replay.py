"""`aisp-local replay`: a search that was written down, run again and compared."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.live import ProgressLine, stop_on_interrupt
from aisp_local.cli.names import FILE, MODEL, REWARD
from aisp_local.cli.output import print_answer
from aisp_local.trace import Trace


@click.command(cls=ExamplesFirst)
@click.argument("file", type=FILE)
@click.option("-m", "--model", type=MODEL, help="The model, where it is not where the trace says.")
@click.option("-r", "--reward", type=REWARD, help="The reward, as for generate.")
@click.option("--judge", type=REWARD, help="The judge, as for generate.")
@click.option("--threads", type=int, help="CPU threads for decoding. Default: the trace's.")
def replay(file: Path, model: Path | None, reward: Path | None, judge: Path | None, threads: int | None) -> None:
    """Run the search of a trace FILE again and compare: texts, rewards and statistics, to the bit.

    Exit code 0: all is equal. 1: something differs; the first difference of each field is shown. Another machine, build
    or number of threads may round otherwise; what is not as it was is said first. A search that a time limit or Ctrl-C
    ended runs as far as it went.

    \b
    Examples:
      aisp-local generate "Tell me a story about a fox." --trace fox.json
      aisp-local replay fox.json
    """
    trace = Trace.load(file)
    from aisp_local import replay as again

    with again.load(trace, model=model, reward=reward, judge=judge, threads=threads) as aligner:
        again.check(trace, aligner)
        for sentence in again.unlike(trace, aligner):
            click.echo(f"aisp-local: not as it was: {sentence}", err=True)
        search, found = trace["search"], trace["result"]
        line = ProgressLine(max_tokens=search["max_tokens"])
        with stop_on_interrupt() as stop:
            try:
                result = again.run(trace, aligner, stop=stop, on_progress=line)
            finally:
                line.clear()
        if stop.set:
            raise KeyboardInterrupt
        fields = again.compare(trace, result, judge=aligner.judge is not None)
    iterations, candidates = len(found["iterations"]), len(found["candidates"])
    print_answer(
        f"{search['method']}, seed {search['seed']}: {candidates} of {search['budget']} rollouts in {iterations} "
        f"iteration{'s' if iterations > 1 else ''}, {found['status']}"
    )
    if (end := found["ended_at"]) is not None:
        print_answer(f"cut short after {end} steps, and so was this one")
    for field in fields:
        said = (
            f"equal      {field.name} ({field.values})"
            if field.difference is None
            else f"different  {field.difference}"
        )
        print_answer(said)
    different = sum(field.difference is not None for field in fields)
    print_answer(f"{different} of {len(fields)} fields differ" if different else "the run is the same")
    sys.exit(1 if different else 0)
