"""The command `sightloop`: caption, ask, classify, match and embed pictures; list the models."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter

import sightloop
from sightloop.apps.cli import bootstrap, chat, convert, evaluate, regions
from sightloop.apps.cli.common import Paths, inputs, model_for, reading, require, run
from sightloop.apps.cli.options import Box, Decoding, Keeping, Machine, Writing, box_of, whole, words_or_file
from sightloop.apps.cli.output import Column, Rows, Screen, complain, say
from sightloop.apps.cli.synthetic import world
from sightloop.apps.cli.train import train
from sightloop.errors import CheckpointError, SightloopError, TokenizerError, UnsupportedError, UsageError
from sightloop.types import Done

if TYPE_CHECKING:
    from sightloop.annotation.caption_filter import Rules
    from sightloop.annotation.caption_table import CaptionTable
    from sightloop.annotation.sidecars import Sidecars
    from sightloop.inference.load import Model

_WRITING, _KEEPING, _DECODING, _MACHINE = Writing(), Keeping(), Decoding(), Machine()
_AGAIN = "The same command goes on from here."
_INTERRUPTED = 130
_PIPE_CLOSED = 141

app = App(
    name="sightloop",
    help="Read pictures at sight: caption, ask, classify, match and embed them, and find what is in them.",
    version=lambda: sightloop.__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
    help_epilogue=(
        "Exit status: 0 all went well, 1 some inputs failed, 2 wrong usage.\n"
        "Each command has its own help: sightloop caption --help"
    ),
    group_parameters=Group("Options", sort_key=0),
)


@app.command(
    help_epilogue=(
        "Examples:\n"
        "  sightloop caption photos\n"
        "  sightloop caption photos -m Salesforce/blip-image-captioning-base\n"
        "  sightloop caption 'photos/**/*.jpg' -m M --num-beams 3 --prefix 'ohwx, '\n"
        "  sightloop caption photos -m M --min-match 0.3 --judge Salesforce/blip-itm-base-coco\n"
        "  sightloop caption photos -m M --out captions.jsonl\n"
        "  sightloop caption photo.jpg -m florence-community/Florence-2-base-ft --box 10,20,200,180 --out part.jsonl"
    )
)
def caption(
    *paths: Paths,
    prompt: str | None = None,
    length: Literal["short", "detailed", "long"] | None = None,
    box: Box = None,
    writing: Writing = _WRITING,
    keeping: Keeping = _KEEPING,
    decoding: Decoding = _DECODING,
    machine: Machine = _MACHINE,
) -> int:
    """Write a caption for every picture.

    Each caption goes to a .txt file beside its picture. A picture that has
    one is skipped, so your own edits stay, and a run that was cut off goes on
    where it stopped. Empty and looping captions are dropped, and named.

    Parameters
    ----------
    prompt
        The words that every caption starts with, such as "a photo of".
    length
        How much to say; for models that were trained for it (Florence-2), and in place of a prompt.
    box
        Say what lies in this box, in pixels of the picture as it is seen; as --length.
    """
    from sightloop.annotation.caption_filter import Rules
    from sightloop.annotation.captioning import caption_pictures

    machine.check()
    rules = Rules(
        prompt=prompt,
        prefix=writing.prefix,
        suffix=writing.suffix,
        drop_if=keeping.pattern(),
        min_match=keeping.min_match,
        keep_all=keeping.keep_all,
        decoding=decoding.given() | _instead_of_prompt(prompt, length, box),
    )
    columns = [Column("name"), Column("caption")] + [Column("match", 6, True)] * (rules.min_match is not None)
    rows = Rows(columns, as_json=machine.json, go_on=True)
    with ExitStack() as stack:
        sink = stack.enter_context(closing(_sink(writing, machine, keeping, rules)))
        model, judge = _writer_and_judge(machine, keeping)
        again = "" if writing.write == "overwrite" and writing.out is None else _AGAIN
        screen = stack.enter_context(Screen("captioning", rows, again))
        screen.count_ahead(lambda: sum(1 for _ in inputs(paths)))
        job = caption_pictures((model, judge), inputs(paths), sink, rules, reading(machine, model))
        for event in stack.enter_context(closing(job)):
            screen.event(event)
            if not isinstance(event, Done):
                continue
            made = event.value
            if made.dropped:
                screen.drop(event.name, made.dropped, made.why)
            else:
                screen.row(
                    {"name": event.name, "caption": made.text} | ({"match": made.score} if judge else {})
                )
    return screen.status


@app.command(
    help_epilogue=(
        "Examples:\n"
        "  sightloop ask photos -m Salesforce/blip-vqa-base -q 'how many people are there?'\n"
        "  sightloop ask photos -m M -q 'is it day or night?' --candidates day,night --json"
    )
)
def ask(
    *paths: Paths,
    question: Annotated[list[str], Parameter(name=["--question", "-q"], negative=(), consume_multiple=False)],
    candidates: Annotated[str | None, Parameter(metavar="A,B,...|FILE")] = None,
    decoding: Decoding = _DECODING,
    machine: Machine = _MACHINE,
) -> int:
    """Answer questions about every picture.

    Parameters
    ----------
    question
        A question; give -q again for more. Each picture is read once for all of them.
    candidates
        The answers to choose from: a,b,c or a file with one a line. Without them the model writes its own.
    """
    machine.check()
    options = decoding.given()
    choices = None if candidates is None else words_or_file("--candidates", candidates)
    if any(not text.strip() for text in question):
        raise UsageError("-q: the question is empty.")
    model = model_for("answer", machine)

    def verb(pictures: list[Any]) -> list[list[str]]:
        pairs = [picture for picture in pictures for _ in question]  # the model encodes each picture once
        answers = model.answer(pairs, question * len(pictures), candidates=choices, **options)
        return [answers[i : i + len(question)] for i in range(0, len(answers), len(question))]

    columns = [Column("name"), Column("question"), Column("answer", 24)]
    with Screen("answering", Rows(columns, as_json=machine.json)) as screen:
        for event in run(screen, machine, model, paths, verb):
            for text, answer in zip(question, event.value, strict=True):
                screen.row({"name": event.name, "question": text, "answer": answer})
    return screen.status


@app.command(
    help_epilogue=(
        "Examples:\n"
        "  sightloop classify photos -m openai/clip-vit-base-patch32 --labels cat,dog,bird\n"
        "  sightloop classify photos -m M --labels classes.txt --template 'a sketch of a {}.' --top 5\n"
        "  sightloop classify photos -m run/model"
    )
)
def classify(
    *paths: Paths,
    labels: Annotated[str | None, Parameter(metavar="A,B,...|FILE")] = None,
    template: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=False)] = None,
    top: Annotated[int | None, Parameter(converter=whole)] = None,
    reading: Literal["softmax", "sigmoid"] | None = None,
    machine: Machine = _MACHINE,
) -> int:
    """Say which of your labels fits each picture best, without training, or which class of those it was trained for.

    Parameters
    ----------
    labels
        The labels: a,b,c or a file with one a line.
        Without them: the classes that the model was fine-tuned for (sightloop train classify).
    template
        A sentence with {} in the place of the label; give it again for more, which are averaged.
        Without it: "a photo of a {}."
    top
        Show this many of the best labels. Without it: 3 in the table, all with --json.
    reading
        softmax: which label it is, adding up to 1; sigmoid: whether it is this one (SigLIP). Default: as trained.
    """
    machine.check()
    given = None if labels is None else words_or_file("--labels", labels)
    if given is not None and len(given) < 2:
        raise UsageError(
            "--labels: give at least two; with one its probability is always 1 (`match` judges one text)."
        )
    if template and given is None:
        raise UsageError("--template: needs --labels; classes that were learned have no templates.")
    templates = tuple(template or ("a photo of a {}.",))
    for text in templates:
        if "{}" not in text:
            raise UsageError(f"--template {text!r}: put {{}} where the label goes.")
    if top is not None and top < 1:
        raise UsageError(f"--top {top}: must be at least 1.")
    model = model_for("classify", machine)
    if not (names := given or model.labels):
        raise UsageError(f"--labels: name some; {model.name} was not fine-tuned for classes of its own.")
    shown = top or (len(names) if machine.json else 3)

    read_as = model.reading if given is not None and reading is None else reading or "softmax"

    def verb(pictures: list[Any]) -> list[list[float]]:
        return model.classify(pictures, given, templates, reading=reading).tolist()

    heading = {"softmax": "probability"}.get(read_as, read_as)
    columns = [Column("name"), Column("label", _width(names)), Column(heading, 11, True)]
    with Screen("classifying", Rows(columns, as_json=machine.json)) as screen:
        for event in run(screen, machine, model, paths, verb):
            best = sorted(zip(event.value, names, strict=True), key=lambda pair: -pair[0])[:shown]
            if machine.json:
                scores = {label: probability for probability, label in best}
                found = {"name": event.name, "label": best[0][1], "reading": read_as, "probabilities": scores}
                screen.row(found)
                continue
            for probability, label in best:
                screen.row({"name": event.name, "label": label, heading: probability})
    return screen.status


@app.command(
    help_epilogue=(
        "Examples:\n  sightloop match photo.jpg 'a dog on a beach' 'a cat' -m Salesforce/blip-itm-base-coco"
    )
)
def match(
    image: str, *texts: Annotated[str, Parameter(name="TEXTS", required=True)], machine: Machine = _MACHINE
) -> int:
    """Judge how well texts describe one picture: for each the probability, 0 to 1, that it matches.

    Parameters
    ----------
    image
        One picture file.
    texts
        One or more texts; put them in quotes.
    """
    machine.check()
    if not texts:
        raise UsageError("TEXTS: give at least one text to judge.")
    if os.path.isdir(image):
        raise UsageError(f"{image}: this is a folder; match judges one picture.")
    model = model_for("match", machine)

    def verb(pictures: list[Any]) -> list[list[float]]:
        return [model.match(picture, list(texts)).tolist() for picture in pictures]

    columns = [Column("text", _width(texts)), Column("match", 6, True)]
    with Screen("matching", Rows(columns, as_json=machine.json)) as screen:
        for event in run(screen, machine, model, [image], verb):
            for text, probability in zip(texts, event.value, strict=True):
                screen.row({"name": event.name, "text": text, "match": probability})
    return screen.status


@app.command(
    help_epilogue=(
        "Examples:\n"
        "  sightloop embed photos -m openai/clip-vit-base-patch32 --out photos.npy\n"
        "  sightloop embed photos -m M --out photos.parquet"
    )
)
def embed(*paths: Paths, out: Annotated[Path, Parameter(metavar="FILE")], machine: Machine = _MACHINE) -> int:
    """Turn every picture into a vector of unit length, for search and comparison.

    Parameters
    ----------
    out
        x.npy (float32, one row a picture; the names go to x.names.txt) or x.parquet (columns name and embedding). It is
        written whole or not at all, and replaces an older one.
    """
    from sightloop.annotation.embedding_file import VectorFile

    machine.check()
    file = VectorFile(out, machine.source)
    model = model_for("embed", machine)

    def verb(pictures: list[Any]) -> Any:
        return model.embed_images(pictures)

    with Screen("embedding", Rows([])) as screen:
        with file:
            for event in run(screen, machine, model, paths, verb):
                file.add([event.name], event.value[None])
        if file.rows:
            screen.say(f"{out}: {file.rows:,} rows.")
        elif screen.counts.total():
            screen.say(f"{out} was not written: there is no embedding to put in it.")
    return screen.status


@app.command(help_epilogue="Examples:\n  sightloop models\n  sightloop models --job caption --json")
def models(
    *,
    job: Annotated[str | None, Parameter(metavar="VERB")] = None,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> int:
    """List the known models: what each can do, its size, licence and memory, and which to pick for which job.

    Parameters
    ----------
    job
        Only the models for this verb (caption, detect, ...): the one to start with first, with the figures that are
        published for them.
    json
        Print one JSON object a line instead of a table.
    """
    from sightloop.apps.cli.models import show_models
    from sightloop.checkpoints.catalog import JOBS

    if job not in (None, "ask", *JOBS):
        raise UsageError(f"--job {job}: must be one of {', '.join(JOBS)}.")
    show_models("answer" if job == "ask" else job, as_json=json)
    return 0


for verb in (regions.detect, regions.locate, regions.segment, regions.read):
    app.command(verb, help_epilogue=regions.EPILOGUES[verb.__name__])
app.command(chat.chat, help_epilogue=chat.EPILOGUE)
app.command(bootstrap.bootstrap, help_epilogue=bootstrap.EPILOGUE)
app.command(convert.convert, help_epilogue=convert.EPILOGUE)
app.command(evaluate.evaluate, help_epilogue=evaluate.EPILOGUE)
app.command(
    train,
    help_epilogue=(
        "Examples:\n"
        "  sightloop train captioner --data photos --out run\n"
        "  sightloop train blip_pretrain --data 'shards/{000..099}.tar' --out run --set optimiser.lr=1e-4 epochs=3\n"
        "  torchrun --nproc-per-node 8 -m sightloop train clip_pretrain --data pairs.csv --out run"
    ),
)
app.command(world, help_epilogue="Examples:\n  sightloop world world.tar --count 3000 --seed 1")


def _instead_of_prompt(prompt: str | None, length: str | None, box: str | None) -> dict[str, Any]:
    """--length or --box, as the model takes them."""
    if (prompt is not None) + (length is not None) + (box is not None) > 1:
        raise UsageError("--prompt, --length and --box: give one of them.")
    if box is not None:
        return {"region": box_of(box)}
    return {} if length is None else {"length": length}


def _width(texts: Sequence[str]) -> int:
    return min(max(5, *map(len, texts)), 40)


def _writer_and_judge(machine: Machine, keeping: Keeping) -> tuple[Model, Model | None]:
    model = model_for("caption", machine)
    if keeping.min_match is None:
        return model, None
    if keeping.judge is not None:
        return model, model_for("match", machine, keeping.judge)
    require(model, "match")
    return model, model


def _sink(writing: Writing, machine: Machine, keeping: Keeping, rules: Rules) -> Sidecars | CaptionTable:
    from sightloop.annotation.caption_table import CaptionTable
    from sightloop.annotation.sidecars import Sidecars

    if writing.out is None:
        return Sidecars(writing.write, say)
    if writing.write in ("append", "prepend"):
        raise UsageError(f"--write {writing.write} is for .txt files; with --out use skip or overwrite.")
    settings = {"model": machine.source, "judge": keeping.judge, "rules": str(rules)}
    return CaptionTable(writing.out, "overwrite" if writing.write == "overwrite" else "skip", settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, 1 (some inputs failed), 2 (wrong usage), 130 (Ctrl-C)."""
    try:
        status = app(
            arguments, exit_on_error=False, print_error=False, result_action="return_value"
        )  # None after --help and --version
        sys.stdout.flush()
        return status or 0
    except CycloptsError as error:
        complain("sightloop", " ".join(str(error).split()))
        say("`sightloop --help` lists the commands, `sightloop COMMAND --help` the options of one.")
        return 2
    except (UsageError, CheckpointError, TokenizerError, UnsupportedError) as error:
        complain("sightloop", error)
        return 2
    except SightloopError as error:
        complain("sightloop", error)
        return 1
    except KeyboardInterrupt:
        say("Interrupted; nothing is half written.")
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our rows has gone: no complaint, and none from the interpreter's last flush either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except OSError as error:  # a full disk, say: of the run itself, for a picture's own are events
        complain("sightloop", error)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        complain("sightloop", f"out of memory: use a smaller --batch-size, or --dtype bfloat16. ({error})")
        return 1
