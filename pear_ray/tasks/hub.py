"""The hub, asked once whether it answers: `datasets` would ask in vain for minutes."""

import textwrap

HUB_TIMEOUT_S = 10.0  # the hub client's own, of one request
SAID_CHARACTERS = 500  # of an error: the hub's are pages


class HubUnreachableError(Exception):
    """The hub does not answer; its cause is what the client raised."""


def reach_hub(name: str) -> None:
    """See that the hub answers, whatever it says of the dataset `name`.

    Raises:
        HubUnreachableError: It does not, and `HF_HUB_OFFLINE` does not say to do without it.
    """
    import huggingface_hub  # noqa: PLC0415 - slow to import, and only hub names need it
    from huggingface_hub.errors import (  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
    )

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except (OfflineModeIsEnabled, HfHubHTTPError, HFValidationError):
        return  # opening the dataset tells more, and tries again where that may help
    except Exception as error:  # the client's errors of the network have no base of their own
        raise HubUnreachableError(said(error)) from error


def said(error: BaseException) -> str:
    """The error's kind and the beginning of its message, on one line."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), SAID_CHARACTERS)}"
