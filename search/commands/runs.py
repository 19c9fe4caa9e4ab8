"""Commands that start from a run folder."""

from __future__ import annotations

from merge_engine.errors import MergeError
from merge_engine.plain_files import is_text, other_than_file
from merge_engine.recipe.recipe import Recipe
from merge_engine.replacing import replace_text
from objectives.entries import PromptEntry
from search.options import ExportOptions, PushOptions, ReportOptions, SampleOptions
from search.pipeline import card_of, is_export_of, other_trial, save_checkpoint
from search.running.events import CommandDone, Listener, Note, SamplesReady
from search.running.run import Run
from search.running.sampling import of_items, of_prompts
from search.session import Session
from search.showing.hub import push as push_to_hub
from search.showing.report import make_report
from search.storing.address import Storage
from search.storing.folder import CARD, check_folder, is_held
from search.storing.intact import reading_stored
from search.storing.result import PATHS, Result, read_paths, read_result
from search.storing.resume import check_result, find_trial, stored_log, stored_spec
from search.storing.samples import store_samples
from search.storing.store import Store
from search.study.public_names import public_recipe
from search.study.spec import StudyError, StudySpec


def export(options: ExportOptions, listener: Listener) -> None:
    """Save the checkpoint of a run's winner, or of another of its trials."""
    if options.out.exists():
        raise MergeError(f"{options.out} exists; choose another folder or remove it")
    check_folder(options.out)
    spec = stored_spec(options.run, options.storage)
    result = _read_result(options, spec)
    won = result.winner.recipe if result else None
    if options.trial is not None:  # a missing trial is reported before anything is loaded
        find_trial(options.run, stored_log(options.run, options.storage), options.trial)
    elif won is None:
        raise StudyError(f"{options.run} has no winner yet; name a --trial")

    def save(run: Run) -> None:
        other = None
        if options.trial is None:
            recipe = Recipe.model_validate(won)
        else:
            recipe = run.find_recipe(options.trial)
            other = other_trial(run, options.trial, recipe, result)
        card = card_of(run, options.out, recipe, result, other)
        save_checkpoint(run, recipe, options.out, card)
        listener(CommandDone("", {"checkpoint": str(options.out)}))

    Session(spec, options.run, options, listener, source=options.run).hold(save)


def sample(options: SampleOptions, listener: Listener) -> None:
    """Show what base, donors and winner write to prompts, or to test items gained and lost."""
    if options.prompt and (odd := [text for text in options.prompt if not is_text(text)]):
        raise StudyError(f"--prompt: {odd[0][:50]!r} is not UTF-8 text; write another")
    spec = stored_spec(options.run, options.storage)
    result = _read_result(options, spec)
    if result is None:
        raise StudyError(f"{options.run} has no winner yet; ask again when the run has finished")

    def respond(run: Run) -> None:
        if options.prompt:
            prompts = PromptEntry(prompts=tuple(options.prompt), max_tokens=options.max_tokens)
            samples = of_prompts(run, result, prompts)
        else:
            samples = of_items(run, result, options.items)
        if not samples:
            raise StudyError(
                "there are no test items to show: winner and best donor score the same on all, or "
                "generate no text; give a --prompt"
            )
        store_samples(run.folder, result, samples)
        listener(SamplesReady(samples))

    Session(spec, options.run, options, listener, source=options.run).hold(respond)


def _read_result(options: ExportOptions | SampleOptions, spec: StudySpec) -> Result | None:
    """Read a run's result; refuse another run's, or one with models that are not the study's."""
    run = options.run
    result = read_result(run)
    read = Recipe.model_validate(result.winner.recipe).models_read if result else ()
    if lost := [model for model in read if model not in spec.models_read]:
        raise StudyError(
            f"{run / PATHS}: lacks the path of the winner's model {lost[0]!r}; run the study again "
            "to rewrite it"
        )
    if result:
        check_result(run, result, stored_log(run, options.storage).finished())
    return result


def report(options: ReportOptions, listener: Listener) -> None:
    """Write a run's report.html, finished or not."""
    stored_spec(options.run, options.storage)
    file = options.out or options.run / "report.html"
    if file.exists() and (kind := other_than_file(file)):
        raise StudyError(f"{file} is {kind}; name a file to write")
    check_folder(file.parent)
    store = Store(Storage.of(options.run, options.storage), begun=True)
    with reading_stored(options.run):
        page = make_report(options.run, store, held=is_held(options.run))
    replace_text(file, page)
    listener(CommandDone(str(file), {"report": str(file)}))


def push(options: PushOptions, listener: Listener) -> None:
    """Upload the checkpoint of a run's winner to the Hub."""
    run, result = options.run, read_result(options.run)
    if result is None:
        raise StudyError(f"{run} has no result yet; push it when the run has finished")
    names = {path: name for name, path in read_paths(run).items()}
    recipe = public_recipe(Recipe.model_validate(result.winner.recipe), names)
    checkpoint = run / "checkpoint"
    if not is_export_of(checkpoint, recipe) or not (checkpoint / CARD).is_file():
        raise StudyError(
            f"{checkpoint} is incomplete, or not the winner of result.json; run the study again to "
            "rebuild it"
        )
    if folders := [model for model in recipe.models_read if model.startswith("./")]:
        listener(Note(f"the recipe names folders of this machine: {', '.join(folders)}"))
    url = push_to_hub(checkpoint, options.repo, private=options.private)
    listener(CommandDone(url, {"url": url}))
