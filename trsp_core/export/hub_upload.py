"""Upload to the model hub with the token of whoever asks. The token is passed on and kept nowhere."""

from __future__ import annotations

from pathlib import Path

from trsp_core.errors import TrspError
from trsp_core.models import catalog

REFUSALS = {
    401: ("The hub does not accept this token.", "Make one with the right to write in the hub's settings."),
    403: ("This token may not write to {name}.", "Take a token with the right to write, and a name of your own."),
    404: ("The hub has no place called {name} for this token.", "Check the owner's name before the slash."),
    429: ("The hub asks to wait: too many requests.", "Try again in some minutes."),
}


def own_token() -> str:
    """The token in `HF_TOKEN`, or of the hub's own login on this machine.

    Raises:
        TrspError: there is none.
    """
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise TrspError("There is no token for the hub.", "Set HF_TOKEN, or log in: hf auth login.")
    return token


def check_name(name: str) -> None:
    """Raises TrspError: `name` is not owner/name."""
    if not catalog.HUB_ID.fullmatch(name):
        raise TrspError(f"{name[:80]!r} is no name of a repository.", "Write owner/name.")


def push(folder: Path, name: str, token: str) -> str:
    """Upload `folder` to the model repository `name`, a new private one where there is none; returns its address.

    Raises:
        TrspError: no such name, a token that may not do it, or the hub cannot be reached.
    """
    check_name(name)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi(token=token)
    try:
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Pruned with TRSP Explorer")
    except HfHubHTTPError as error:
        code = error.response.status_code
        message, remedy = REFUSALS.get(code, ("The hub answered with code {code}.", "Try again later."))
        raise TrspError(message.format(name=name, code=code), remedy) from None
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = str(error).replace(token, "(token)")[:200]
        raise TrspError(
            f"{name} could not be uploaded: {type(error).__name__}: {reason}.", "Check the network, and try again."
        ) from None
    return str(address)
