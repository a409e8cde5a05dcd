"""`ray job submit --working-dir . -- python jobs/run.py RUN.yaml [key=value ...]`."""

import sys

from pear_ray.cli import main

sys.exit(main(["run", *sys.argv[1:]]))
