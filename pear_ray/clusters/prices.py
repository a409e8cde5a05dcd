"""List prices, for arithmetic that the reader can redo with their own.

A cluster file says better ones under `metadata.prices`; where neither does, no cost is said.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from pear_ray.config.base import Section

LOOKED_UP = "2026-11-26"
SOURCE = (
    "list prices, check yours: SkyPilot's catalog (github.com/skypilot-org/skypilot-catalog), "
    f"looked up on {LOOKED_UP}: AWS us-west-2 from catalogs/v8 at e385a0d, Azure East US from "
    "catalogs/v6 at 098741e"
)
Dollars = Annotated[float, Field(gt=0)]


class Price(Section):
    """What a machine costs an hour."""

    on_demand: Dollars
    """US dollars an hour for a machine that stays."""
    spot: Dollars | None = None
    """US dollars an hour for one that may be taken back; it moves, and is not said where none was
    looked up."""


# Spot prices differ by zone and hour: the highest of the region's zones on that day.
LIST_PRICES: Mapping[str, Price] = {
    "c7i.4xlarge": Price(on_demand=0.714),
    "c7i.8xlarge": Price(on_demand=1.428),
    "g6.12xlarge": Price(on_demand=4.6016, spot=2.2197),
    "p4d.24xlarge": Price(on_demand=21.95764, spot=9.9817),
    "p4de.24xlarge": Price(on_demand=27.44705, spot=14.2576),
    "p5.4xlarge": Price(on_demand=6.88),
    "p5.48xlarge": Price(on_demand=55.04, spot=22.7293),
    "p5en.48xlarge": Price(on_demand=63.296, spot=24.7584),
    "Standard_NV36ads_A10_v5": Price(on_demand=3.2, spot=0.8),
    "Standard_NC24ads_A100_v4": Price(on_demand=3.673, spot=0.444433),
    "Standard_NC96ads_A100_v4": Price(on_demand=14.692, spot=1.777732),
    "Standard_NC40ads_H100_v5": Price(on_demand=6.98),
    "Standard_ND96amsr_A100_v4": Price(on_demand=32.77, spot=3.6047),
    "Standard_ND96isr_H100_v5": Price(on_demand=98.32),
}
