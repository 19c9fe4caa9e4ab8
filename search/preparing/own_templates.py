"""Donors' own chat templates, where they differ from the one that a study scores with.

A donor trained under another template would look worse than it is under the study's.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_engine.errors import MergeError
from merge_engine.models.chat_templates import read_chat_template
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.model_set import ModelSet
from merge_engine.models.tensor_names import input_embedding
from merge_engine.models.token_table import added_tokens, tokenizer_table
from merge_engine.models.vocabulary import load_tokenizer
from objectives.base import Objective, ObjectiveError
from search.preparing.tasks import bind_tasks, plan_tasks
from search.study.spec import StudySpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnTemplate:
    """A donor's own chat template, and the tokenizer that encodes its prompts."""

    text: str  # the template
    uses_own_tokenizer: bool  # the donor's; False: the study's
    split_up: tuple[str, ...]  # the template's special tokens that are not one token there

    @property
    def digest(self) -> str:
        """A hash by which results under it are stored."""
        return hashlib.sha256(f"{self.uses_own_tokenizer} {self.text}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class BoundTemplate:
    """A donor's own chat template, and the study's items prepared under it."""

    digest: str  # hash of the template
    tokenizer: PreTrainedTokenizerBase  # with the template
    objective: Objective  # the study's items, in their order


def find_own_templates(spec: StudySpec, models: ModelSet) -> dict[str, OwnTemplate]:
    """Find the donors whose chat template differs from the study's, if it uses one.

    White space is ignored. Prompts are encoded by the study's tokenizer if that has the template's
    special tokens, else by the donor's if the live model has rows for all of its tokens.

    Raises:
        MergeError: A tokenizer's file is damaged.
    """
    if not spec.objective.apply_chat_template:
        return {}
    study = _study_template(models)
    found = {}
    for donor in spec.models_but_base:
        text = read_chat_template(models.checkpoints[donor].tokenizer_folder)
        if text and text.split() != (study or "").split():
            found[donor] = _own_template(text, models.checkpoints[donor], models)
    return found


def template_notes(templates: Mapping[str, OwnTemplate]) -> list[str]:
    """Return a note on each template with special tokens that the study has to split up."""
    return [
        f"model {donor!r}: its own chat template has {', '.join(map(repr, own.split_up))}, which "
        "the study's tokenizer splits up, so that its score under it may be too low: write "
        "'tokenizer: {source: union}' to have them as tokens"
        for donor, own in templates.items()
        if own.split_up
    ]


def bind_own_templates(
    spec: StudySpec,
    models: ModelSet,
    templates: Mapping[str, OwnTemplate],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
) -> dict[str, BoundTemplate]:
    """Prepare the items of ``objective`` for a live model under donors' own templates.

    A template under which that fails is left out with a warning.

    Args:
        spec: The study.
        models: Base and donors.
        templates: By donor.
        model: The live model.
        tokenizer: The study's.
        objective: The items under the study's template.
    """
    found: dict[str, BoundTemplate] = {}
    for donor, template in templates.items():
        try:
            own = load_tokenizer(models.checkpoints[donor])
            if not template.uses_own_tokenizer:
                own = _with_end_of(deepcopy(tokenizer), own)
            own.chat_template = template.text
            # Tasks that are loaded again draw the same few-shot examples.
            bound, _ = bind_tasks(spec, plan_tasks(spec), model, own)
            if tuple(bound.items) != tuple(objective.items):
                raise ObjectiveError("the items are others than under the study's")
        except (MergeError, ObjectiveError) as error:
            _LOG.warning("model %r is not scored under its own chat template: %s", donor, error)
        else:
            found[donor] = BoundTemplate(template.digest, own, bound)
    return found


def _study_template(models: ModelSet) -> str | None:
    if models.vocabulary is None:
        return read_chat_template(models.reference.tokenizer_folder)
    found = models.vocabulary.tokenizer.chat_template
    template: str | None = found.get("default") if isinstance(found, dict) else found
    return template


def _own_template(text: str, donor: Checkpoint, models: ModelSet) -> OwnTemplate:
    special = {token: n for n, token in added_tokens(donor.tokenizer_folder).items()}
    special = {token: number for token, number in special.items() if token in text}
    if models.vocabulary is not None:  # rows are merged by token
        known = models.vocabulary.tokenizer.get_vocab()
        return OwnTemplate(text, False, tuple(token for token in special if token not in known))
    table = tokenizer_table(models.reference.tokenizer_folder)
    lacking = tuple(token for token, number in special.items() if table.get(number) != token)
    name = input_embedding(models.reference.tensors)
    rows = models.reference.tensors[name].shape[0] if name else 0
    fits = max(tokenizer_table(donor.tokenizer_folder), default=rows) < rows
    if lacking and fits:
        return OwnTemplate(text, True, ())
    return OwnTemplate(text, False, lacking)


def _with_end_of(
    tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Set another tokenizer's end-of-text token, if this tokenizer knows it."""
    if own.eos_token in tokenizer.get_vocab():
        tokenizer.eos_token = own.eos_token
    return tokenizer
