"""The command `hf-vla`: one function a subcommand, each a few lines that call the package."""

import logging
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Run = Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")]


@app.callback()
def _configure() -> None:
    """Plan, prove, survive: fine-tune a vision-language-action policy inside a GPU memory budget."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")


@app.command()
def evaluate(run: Run) -> None:
    """Measure a run's policy on its held-out episodes, in physical units, beside three baselines."""
    from hf_vla.evaluation import evaluate_offline

    evaluate_offline(run)


@app.command()
def rollout(run: Run, workers: Annotated[int, typer.Option(help="Simulators at a time.")] = 2) -> None:
    """Drive the simulated robot with a run's policy and its controls."""
    from hf_vla.evaluation import evaluate_rollouts

    evaluate_rollouts(run, workers)


@app.command()
def report(run: Run) -> None:
    """Write a run's report.html anew from its files."""
    from hf_vla.report import write_report

    typer.echo(write_report(run))


def main() -> None:
    """Run the command; whatever the user can mend ends in one line, not in a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    main()
