"""Datasets of the `datasets` library: folders that it saved, and names on the hub."""

import functools
import textwrap

import datasets
import huggingface_hub
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from pear_ray.errors import InputError

HUB_TIMEOUT_S = 10.0  # the hub client's own, of one request
SAID_CHARACTERS = 500  # of an error: the hub's are pages


def reach_hub(name: str) -> None:
    """See that the hub answers, whatever it says of `name`; `datasets` asks in vain for minutes.

    Raises:
        InputError: It does not, and `HF_HUB_OFFLINE` does not say to do without it.
    """
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except (OfflineModeIsEnabled, HfHubHTTPError, HFValidationError):
        return  # opening the dataset tells more, and tries again where that may help
    except Exception as error:  # the client's errors of the network have no base of their own
        raise InputError(
            f"corpus.path=hub:{name}: the hub cannot be reached ({_said(error)}); check the "
            "network, or set HF_HUB_OFFLINE=1 to use what was fetched before"
        ) from error


@functools.lru_cache(maxsize=2)
def open_dataset(name: str, kind: str, split: str) -> datasets.Dataset:
    """A dataset of the `datasets` library, memory-mapped: from a saved folder or from the hub.

    Raises:
        InputError: There is no such dataset or split, or the hub cannot be reached.
    """
    try:
        if kind == "hub":
            return datasets.load_dataset(name, split=split)
        found = datasets.load_from_disk(name)
        chosen = found[split] if isinstance(found, datasets.DatasetDict) else found
    except Exception as error:  # the libraries' errors share no base: offline, missing, broken
        raise InputError(_refusal(name, kind, split, error)) from error
    return chosen.with_format(None)  # one saved to give arrays gives lists


def _refusal(name: str, kind: str, split: str, error: Exception) -> str:
    path, check = name, "corpus.split"
    if kind == "hub":
        path = f"hub:{name}"
        check += ", HF_TOKEN where it is private, the network and HF_HUB_OFFLINE"
    if "Config name is missing" in str(error):
        check += "; no configuration can be chosen here, so save one with `Dataset.save_to_disk`"
    said = _said(error)
    if isinstance(error, DatasetsError) and error.__cause__:
        said += f", because of {_said(error.__cause__)}"
    return (
        f"corpus.path={path}: no dataset with a split {split!r} ({said}); check the name, {check}"
    )


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), SAID_CHARACTERS)}"
