"""`ray job submit --working-dir . -- python jobs/rl.py RUN.yaml [key=value ...]`."""

import sys

from pear_ray.cli import main

sys.exit(main(["rl", *sys.argv[1:]]))
