"""`ray job submit --working-dir . -- python jobs/ready.py RUN.yaml [key=value ...]`."""

import sys

from pear_ray.cli import main

sys.exit(main(["ready", *sys.argv[1:]]))
