"""`python -m pear_ray` is `pear`."""

import sys

from pear_ray.cli import main

sys.exit(main())
