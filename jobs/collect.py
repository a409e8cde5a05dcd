"""`ray job submit --working-dir . -- python jobs/collect.py RUN.yaml [key=value ...]`."""

import sys

from pear_ray.cli import main

sys.exit(main(["collect", *sys.argv[1:]]))
