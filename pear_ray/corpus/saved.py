"""Datasets of the `datasets` library: folders that it saved, and names on the hub."""

import functools

import datasets

from pear_ray.errors import InputError


@functools.lru_cache(maxsize=2)
def open_dataset(name: str, kind: str, split: str) -> datasets.Dataset:
    """A dataset of the `datasets` library, memory-mapped: from a saved folder or from the hub.

    Raises:
        InputError: There is no such dataset or split.
    """
    try:
        if kind == "hub":
            return datasets.load_dataset(name, split=split)
        found = datasets.load_from_disk(name)
        chosen = found[split] if isinstance(found, datasets.DatasetDict) else found
    except (OSError, ValueError, KeyError) as error:
        # The hub's own errors (offline, missing, no access) are all of these.
        line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"corpus.path={name}: no dataset with a split {split!r} ({type(error).__name__}: "
            f"{line}); check the name, corpus.split, the network and HF_HUB_OFFLINE"
        ) from error
    return chosen.with_format(None)  # one saved to give arrays gives lists
