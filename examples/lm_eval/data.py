"""The local data of these tasks, for lm-eval's `custom_dataset`."""

from pathlib import Path

import datasets


def rows(folder: str = "", file: str = "", **_) -> dict[str, datasets.Dataset]:
    """One .jsonl file of the folder that `--metadata` names, as the split `test`."""
    path = Path(folder).expanduser() / file
    if not folder or not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. Give the folder that holds {file}: "
            '--metadata \'{"folder": "/path/to/bench"}\''
        )
    return datasets.load_dataset("json", data_files={"test": str(path)})
