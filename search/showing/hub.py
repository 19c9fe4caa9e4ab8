"""Upload of a checkpoint to the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from merge_engine.building.checksums import CHECKSUMS, listed_files
from merge_engine.building.export import RECIPE
from search.storing.folder import CARD, Interrupted
from search.study.spec import StudyError

TEMPORARY: Final = (408, 429)  # HTTP statuses of requests that may succeed later


def push(checkpoint: Path, repo: str, *, private: bool) -> str:
    """Upload a checkpoint with its card, and the recipe, in one commit; return the address.

    Only files that belong to the checkpoint are sent, whatever else is in its folder.

    Raises:
        StudyError: The id is invalid, there is no token, or the Hub refuses.
        Interrupted: The Hub cannot be reached, or fails.
    """
    api = HfApi()
    if get_token() is None:
        raise StudyError("no Hub token; log in with `hf auth login`, or set HF_TOKEN")
    sent = {name: checkpoint / name for name in (*listed_files(checkpoint), CHECKSUMS, CARD)}
    sent["recipe.yaml"] = checkpoint / RECIPE
    additions = [
        CommitOperationAdd(name, file) for name, file in sent.items() if not file.is_symlink()
    ]
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        api.create_commit(
            url.repo_id, additions, commit_message="Upload a merge found by mergesearch"
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status in TEMPORARY:
            raise Interrupted(f"{api.endpoint} fails: {_first_line(error)}") from None
        raise StudyError(
            f"{api.endpoint} refuses {repo}: {_first_line(error)}; log in with `hf auth login`, "
            "with a token that may write there"
        ) from None
    except json.JSONDecodeError as error:
        raise Interrupted(f"{api.endpoint} sends no valid response: {error}") from None
    except HFValidationError as error:
        raise StudyError(f"{repo}: {_one_line(error)}; write it like org/name") from None
    except ValueError as error:  # an invalid card, before anything is sent
        raise StudyError(f"{repo}: {_one_line(error)}") from None
    except Exception as error:  # the HTTP client's own errors
        raise Interrupted(f"{api.endpoint} cannot be reached: {_first_line(error)}") from None
    return str(url)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
