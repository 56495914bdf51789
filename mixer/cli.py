"""The ``mixer`` command: a table of subcommands, each loaded only when it is called.

Importing torch, streaming or Composer takes seconds, so this file imports none of them: ``mixer --help`` prints the
table below. One line on standard error and exit code 2 (wrong input) or 1 (failed run) is all that a person sees of an
error; ``mixer --debug COMMAND`` shows the traceback too.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import NoReturn

import click

import mixer
from mixer.errors import DataError, InputError

__all__ = ["main"]

# name: (module, attribute, one line for the table). Order is the order of work.
COMMANDS = {
    "demo": ("algorithms.commands.demo", "demo", "The whole job on text that every install already has."),
    "convert": ("converters.cli", "convert", "Corpora -> one set of MDS shards per domain."),
    "inspect": ("converters.cli", "inspect", "Domains, samples, tokens, shares; decoded samples."),
    "verify": ("converters.cli", "verify", "Check shards by structure or every byte; how to repair."),
    "add-column": ("converters.cli", "add_column", "Values per sample beside the shards: scores, losses."),
    "stats": ("converters.cli", "stats", "Document lengths, bytes per token, copies, entropies."),
    "train-tokenizer": ("converters.cli", "train_tokenizer", "A byte-level BPE on a seeded sample of the corpus."),
    "weigh": ("mixer.commands", "weigh", "Weights from sizes alone: uniform, temperature, unimax."),
    "simulate": ("mixer.commands", "simulate", "What a mixture will draw, without reading data."),
    "score": ("algorithms.commands.score", "score", "A reference's losses of every sample, computed once."),
    "optimize": (
        "algorithms.commands.optimize",
        "optimize",
        "Find weights with a proxy model (DoReMi, Group DRO, ...).",
    ),
    "regress": ("algorithms.commands.regress", "regress", "Weights from a table of finished runs, within bounds."),
    "upsample": ("algorithms.commands.upsample", "upsample", "Shards with the badly learnt samples several times."),
    "methods": ("algorithms.commands.methods", "methods", "What each method optimises, needs and costs; the paper."),
    "train": ("algorithms.commands.train", "train", "Train a model on a mixture; held-out loss per domain."),
    "report": ("algorithms.commands.report", "report", "One HTML page with tables and plots of finished runs."),
}


INSTALL = "pip install 'domain-mixer[composer]', or in a clone '.[composer]'"
CONTINUING = {"demo", "convert", "score", "optimize", "train"}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"no command {args[0]!r}.{hint} `mixer --help` lists them.")
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(mixer.__version__, prog_name="mixer")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Mix text domains for language-model pretraining, and find how much of each to train on.

    \b
    Examples:
      mixer demo
      mixer convert corpus/ --out shards --train-tokenizer 8192 --seq-len 512
      mixer optimize shards --method doremi --steps 400 --out run
      mixer train shards --mixture run/mixture.json --steps 400 --out main

    `mixer COMMAND --help` shows more.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with 0, 1 (failed), 2 (wrong input) or 130 (interrupted)."""
    argv = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in argv[:1]
    try:
        code = cli.main(args=argv, prog_name="mixer", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _interrupted(argv)
    except SystemExit as error:
        # Composer replaces Ctrl-C by an exit with 130 as soon as it is imported.
        if error.code != 130:
            raise
        _interrupted(argv)
    except Exception as error:
        if debug:
            traceback.print_exc()
        click.echo(f"Error: {_one_line(error)}", err=True)
        sys.exit(2 if isinstance(error, InputError) else 1)


def _interrupted(argv: list[str]) -> NoReturn:
    continues = CONTINUING & set(argv[:2])
    click.echo("\nInterrupted." + (" The same command continues where it stopped." if continues else ""), err=True)
    sys.exit(130)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in ("composer", "transformers"):
        return f"this command trains with Composer, and there is no package {error.name!r}: {INSTALL}."
    if isinstance(error, InputError | DataError):
        return text
    if isinstance(error, OSError) and error.filename:
        return f"cannot use {error.filename}: {error.strerror}."
    return f"{type(error).__name__}: {text} (run `mixer --debug ...` for the traceback)"


if __name__ == "__main__":
    main()
