"""Ray's label for nodes that may be taken back, and who stays off them."""

from collections.abc import Mapping

from pear_ray.config.sections import ClusterConfig

MARKET_LABEL = "ray.io/market-type"
SPOT, ON_DEMAND = "spot", "on-demand"


def training_selector(cluster: ClusterConfig) -> dict[str, str]:
    """Ray's label selector for workers that train; empty where any node will do.

    A node without the label passes "not spot": a laptop, a cluster that nobody labelled.
    """
    return {MARKET_LABEL: f"!{SPOT}"} if cluster.training_nodes == "on_demand" else {}


def satisfies(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels are what a selector asks for: of Ray's spellings, `!value` alone."""
    return all(
        labels.get(name) != unwanted.removeprefix("!") for name, unwanted in selector.items()
    )
