"""Putting what was exported on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..converters.errors import InputError, one_line


def check_login(repo: str) -> None:
    """Raises unless `repo` is a repository's id and somebody is logged in; before any work."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repo} is no id such as you/model.") from error
    try:
        HfApi().whoami()
    except Exception as error:
        raise InputError(
            f"--push-to-hub {repo} needs the hub and a login ({one_line(error, 100)}). Run "
            "`hf auth login`."
        ) from error


def push(output: Path, repo: str, *, private: bool) -> str:
    """Uploads a model folder or a file, in one commit, and says where it is.

    Raises:
        InputError: the hub refuses; what was written here stays.
    """
    api = HfApi()
    message = "Upload by rehead"
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if output.is_dir():
            api.upload_folder(repo_id=repo, folder_path=output, commit_message=message)
        else:
            api.upload_file(
                repo_id=repo,
                path_or_fileobj=output,
                path_in_repo=output.name,
                commit_message=message,
            )
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{output} is written, and the hub refuses it for {repo}: {one_line(error, 150)}"
        ) from error
    return str(url)
