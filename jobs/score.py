"""`ray job submit --working-dir . -- python jobs/score.py RUN.yaml [key=value ...]`."""

import sys

from pear_ray.cli import main

sys.exit(main(["score", *sys.argv[1:]]))
