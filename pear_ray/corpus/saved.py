"""Datasets of the `datasets` library: folders that it saved, and names on the hub."""

import functools

import datasets
from datasets.exceptions import DatasetsError

from pear_ray.errors import InputError
from pear_ray.tasks import hub
from pear_ray.tasks.hub import said


def reach_hub(name: str) -> None:
    """See that the hub answers, whatever it says of `name`.

    Raises:
        InputError: It does not, and `HF_HUB_OFFLINE` does not say to do without it.
    """
    try:
        hub.reach_hub(name)
    except hub.HubUnreachableError as error:
        raise InputError(
            f"corpus.path=hub:{name}: the hub cannot be reached ({error}); check the "
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
    words = said(error)
    if isinstance(error, DatasetsError) and error.__cause__:
        words += f", because of {said(error.__cause__)}"
    return (
        f"corpus.path={path}: no dataset with a split {split!r} ({words}); check the name, {check}"
    )
