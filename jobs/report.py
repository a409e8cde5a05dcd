"""`ray job submit --working-dir . -- python jobs/report.py RUN.yaml [key=value ...]`."""

import sys

from pear_ray.cli import main

sys.exit(main(["report", *sys.argv[1:]]))
