"""How a trainer and an engine share one device in RL."""

from typing import Literal

from pear_ray.config.base import Section


class ColocationConfig(Section):
    """Who holds the GPU's memory when; a CPU's is big enough for both."""

    sleep: bool = True
    """Take the engine's weights and cache off the GPU while the policy trains. They are given the
    memory again, and the new weights, at the weight sync."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What the trainer has in the host's memory: nothing; the optimizer's state, but for the update
    itself; or while the engine samples the weights and the reference policy as well."""
