"""The LoRA on the Hugging Face hub, with its model card and picture."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

from ..errors import UserError
from ..loading import run_of
from .card import PLACE
from .lora import WEIGHTS, ExportError, read_lora

CARD, PICTURE = "README.md", "before_after.png"


def push_lora(lora: Path, repository: str, private: bool = False, more: Path | None = None) -> str:
    """Uploads the weight file, the card beside it, the run's picture and `more` in one commit; returns the address.

    Makes the repository where there is none, public unless `private`. Nobody is asked for anything: UserError with the
    remedy where one is not logged in, the hub is not reached or refuses; ExportError without weights or card.
    """
    read_lora(lora)  # a damaged file stays here
    card = lora.parent / CARD
    if not card.is_file():
        raise ExportError(f"{card} is missing: a LoRA is pushed with its model card, which a run writes at its end")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), lora, card, repository, more)
        try:
            api = HfApi()
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="LoRA with model card")
        except LocalTokenNotFoundError as error:
            raise UserError("not logged in to the hub: run `hf auth login` with a token that may write") from error
        except HFValidationError as error:
            raise UserError(f"--push {repository!r} is no name of a repository, such as user/name: {error}") from error
        except HfHubHTTPError as error:
            refused = error.response.status_code in (401, 403)
            remedy = ": run `hf auth login` with a token that may write there" if refused else ""
            raise UserError(f"the hub refused {repository}{remedy}. It said: {error}") from error
        except (HTTPError, OSError) as error:  # HTTPError: of the hub's client library, whichever that is
            raise UserError(f"the hub cannot be reached (is HF_HUB_OFFLINE set?): {error}") from error
    return str(address)


def prepare(folder: Path, lora: Path, card: Path, repository: str, more: Path | None = None) -> None:
    """Fills `folder` with what is pushed; the card then says where the weights will be, and shows the picture."""
    text = card.read_text(encoding="utf-8").replace(PLACE, repository)
    run = run_of(lora)
    if run and (run / PICTURE).is_file():
        shutil.copy(run / PICTURE, folder / PICTURE)
        text += f"\n![the same prompts and noise under base and LoRA]({PICTURE})\n"
    (folder / CARD).write_text(text, encoding="utf-8")
    shutil.copy(lora, folder / WEIGHTS)
    if more:
        shutil.copy(more, folder / more.name)
