"""Upload a converted checkpoint to the Hub."""

from __future__ import annotations

from pathlib import Path

from mlx_dgemma.errors import DgemmaError, OptionError


def check(repo: str) -> None:
    """Refuse an upload that cannot succeed, before the conversion starts.

    Raises:
        OptionError: `repo` is not a Hub id, or this machine has no Hub token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise OptionError(f"--upload-repo is {repo!r}; it should be a Hub id such as your-name/diffusiongemma-mlx.")
    if not get_token():
        raise OptionError("--upload-repo needs a Hub token; run `hf auth login` or set HF_TOKEN.")


def upload(folder: Path, repo: str) -> str:
    """Upload a folder to a model repository, which is created if it does not exist.

    Returns:
        The repository's URL.

    Raises:
        DgemmaError: the Hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Convert with mlx-dgemma")
    except Exception as error:  # the client's exceptions have no common base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DgemmaError(
            f"The checkpoint is in {folder}, but uploading it to {repo} failed ({reason}); "
            f"try again with `hf upload {repo} {folder}`."
        ) from None
    return str(url)
