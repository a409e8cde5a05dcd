"""`ray job submit --working-dir . -- python jobs/diagnose.py RUN.yaml [key=value ...]`."""

import sys

from pear_ray.cli import main

sys.exit(main(["diagnose", *sys.argv[1:]]))
