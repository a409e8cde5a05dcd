"""`ray job submit --working-dir . -- python jobs/evaluate.py RUN.yaml [key=value ...]`."""

import sys

from pear_ray.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
